"""The stem's prologue in Triton: from x to the operand [patch | features] of the one product that makes the tokens.

`stem_fwd_kernel` runs the Lambda Encoder and the SBLU for a block of tokens; `gather_kernel` cuts the patches out
again, as rows, for the backward.
"""

import triton
import triton.language as tl

from .magnitudes import standardise, store_features
from .sblu_kernels import STRIDES_OF_X, VARYING
from .state import gain
from .window import from_logits, polynomials, product, responses, sigmoid, token_at


@triton.jit
def load_patches(p_x, o_patch, e, mask, x_sc, x_sf, x_st, P_F: tl.constexpr, P_T: tl.constexpr, ALIGN: tl.constexpr):
    """Elements e = (c · P_F + p) · P_T + q [BE] of the patches that begin at o_patch [BN]; 0 outside the mask [BN, BE].

    Every ALIGN of them, from the first on, are next to each other, at an offset that ALIGN divides: one access.
    """
    c, p, q = e // (P_F * P_T), e // P_T % P_F, e % P_T
    o_pixel = c.to(tl.int64) * x_sc + p.to(tl.int64) * x_sf + q.to(tl.int64) * x_st
    if ALIGN > 1:
        o_pixel = tl.max_contiguous(tl.multiple_of(o_pixel, ALIGN), ALIGN)
    return tl.load(p_x + o_patch[:, None] + o_pixel[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=STRIDES_OF_X)
def stem_fwd_kernel(
    p_x, p_w1, p_b1, p_w2, p_b2, p_w, p_operand, p_hidden, p_r, rows, n_f, n_t, frames,
    x_sb: tl.int64, x_sc: tl.int64, x_sf, x_st,
    decay_low, decay_ratio, band_low, band_width,
    S: tl.constexpr, H: tl.constexpr, P_F: tl.constexpr, P_T: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    S_F: tl.constexpr, S_T: tl.constexpr, OFFSET: tl.constexpr, WITHIN: tl.constexpr, QUADRATURE: tl.constexpr,
    TIME_MAJOR: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr,
    BE: tl.constexpr, BK: tl.constexpr, WIDTH: tl.constexpr, PLANES: tl.constexpr, DOT: tl.constexpr,
    NARROW_W1: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """operand = [patch | features], R · P_T and PLANES · S, in rows WIDTH apart; hidden (tokens, H) and r (tokens, 2S)
    in float32.

    w1 (H, R · P_T), w2 (2S, H) and the rest of the weights are contiguous. If one block of tokens has several
    blocks of states, each program runs the encoder, and the first one stores the patches, which all of them have.
    Log-magnitudes, in 1 and 3 planes, need all states in one block; no planes means the patches alone.
    """
    tl.static_assert(PLANES == 0 or PLANES == 2 or S <= BS)
    E: tl.constexpr = R * P_T
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    m_token = row < rows
    long_row = row.to(tl.int64)
    b, i, j = token_at(row, n_f, n_t, TIME_MAJOR)
    o_corner = b * x_sb + i * S_F * x_sf
    o_patch = tl.multiple_of(o_corner + j * S_T * x_st, ALIGN)
    first_states = tl.program_id(1) == 0

    o_h = tl.arange(0, BH)
    m_h = o_h < H
    hidden = tl.zeros([BN, BH], tl.float32)
    for e in range(0, E, BE):
        o_e = e + tl.arange(0, BE)
        m_e = o_e < E
        m_patch = m_token[:, None] & m_e[None, :]
        patch = load_patches(p_x, o_patch, o_e, m_patch, x_sc, x_sf, x_st, P_F, P_T, ALIGN)  # [BN, BE]
        tl.store(p_operand + long_row[:, None] * WIDTH + o_e[None, :], patch, mask=m_patch & first_states)
        w1 = tl.load(p_w1 + o_h[None, :] * E + o_e[:, None], mask=m_h[None, :] & m_e[:, None], other=0.0)  # [BE, BH]
        hidden += product(patch, w1, NARROW_W1, PRECISION)
    hidden += tl.load(p_b1 + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
    m_hidden = m_token[:, None] & m_h[None, :]
    tl.store(p_hidden + long_row[:, None] * H + o_h[None, :], hidden, mask=m_hidden)
    # the second layer reads it back in slices: a product as deep as H would hold all its operands in registers
    tl.debug_barrier()
    o_s = tl.program_id(1) * BS + tl.arange(0, BS)
    m_s = o_s < S
    r_decay = tl.zeros([BN, BS], tl.float32) + tl.load(p_b2 + o_s, mask=m_s, other=0.0).to(tl.float32)[None, :]
    r_frequency = tl.zeros([BN, BS], tl.float32) + tl.load(p_b2 + S + o_s, mask=m_s, other=0.0).to(tl.float32)[None, :]
    for h in range(0, H, BK):
        o_k = h + tl.arange(0, BK)
        m_k = o_k < H
        part = tl.load(p_hidden + long_row[:, None] * H + o_k[None, :], mask=m_token[:, None] & m_k[None, :], other=0.0)
        active = part * sigmoid(part)
        o_w2, m_w2 = o_s[None, :] * H + o_k[:, None], m_s[None, :] & m_k[:, None]  # [BK, BS]
        r_decay += product(active, tl.load(p_w2 + o_w2, mask=m_w2, other=0.0), False, PRECISION)
        r_frequency += product(active, tl.load(p_w2 + S * H + o_w2, mask=m_w2, other=0.0), False, PRECISION)
    mask = m_token[:, None] & m_s[None, :]
    o_r = long_row[:, None] * (2 * S) + o_s[None, :]
    tl.store(p_r + o_r, r_decay, mask=mask)
    tl.store(p_r + o_r + S, r_frequency, mask=mask)

    if PLANES > 0:
        decay, frequency, _, _ = from_logits(r_decay, r_frequency, decay_low, decay_ratio, band_low, band_width)
        z_re, z_im, gain_re, gain_im, _, _ = gain(decay, frequency, K % 2 == 0)
        plus_re, plus_im, minus_re, minus_im, _, _, _, _ = polynomials(
            p_x, p_w, o_corner, m_token, j * S_T + OFFSET, z_re, z_im, o_s, m_s, frames, x_sc, x_sf, x_st,
            P_F, R, K, WITHIN, QUADRATURE, False, BN, BS, BR, DOT, NARROW, PRECISION,
        )  # fmt: skip
        y_re, y_im = responses(plus_re, plus_im, minus_re, minus_im, gain_re, gain_im, QUADRATURE)
        n = y_re
        if PLANES != 2:
            n, _ = standardise(y_re, y_im, m_s, S)
        store_features(p_operand + long_row[:, None] * WIDTH + E + o_s[None, :], y_re, y_im, n, mask, S, PLANES)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=STRIDES_OF_X)
def gather_kernel(
    p_x, p_out, rows, n_f, n_t, x_sb: tl.int64, x_sc: tl.int64, x_sf, x_st, out_row: tl.int64,
    P_F: tl.constexpr, P_T: tl.constexpr, E: tl.constexpr, S_F: tl.constexpr, S_T: tl.constexpr,
    TIME_MAJOR: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Patches as rows: out (tokens, C · P_F · P_T), its rows out_row apart."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    o_e = tl.program_id(1) * BE + tl.arange(0, BE)
    mask = (row < rows)[:, None] & (o_e < E)[None, :]
    b, i, j = token_at(row, n_f, n_t, TIME_MAJOR)
    o_patch = tl.multiple_of(b * x_sb + i * S_F * x_sf + j * S_T * x_st, ALIGN)
    patch = load_patches(p_x, o_patch, o_e, mask, x_sc, x_sf, x_st, P_F, P_T, ALIGN)
    tl.store(p_out + row.to(tl.int64)[:, None] * out_row + o_e[None, :], patch, mask=mask)
