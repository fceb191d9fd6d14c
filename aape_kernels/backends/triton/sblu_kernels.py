"""SBLU in Triton: the forward kernel, and one kernel for each gradient.

Every kernel recomputes what it needs from x and the states: nothing of size tokens × window × states is ever in memory.
Sums over tokens are partial sums of a fixed number of programs, added up afterwards in order.

If RANGES, p_decay and p_frequency hold the Lambda Encoder's logits, and the gradients are those of the logits.
"""

import triton
import triton.language as tl

from .magnitudes import features_adjoint, standardise, store_features
from .state import gain
from .window import (
    from_logits,
    load_rows,
    load_weight,
    polynomials,
    product,
    responses,
    row_offsets,
    token_at,
)

# Sizes that follow the input: a kernel is not compiled again when they change.
VARYING = (
    "rows", "n_f", "n_t", "frames", "x_sb", "x_sc", "s_b", "s_i", "s_j", "g_b", "g_i", "g_j", "y_row", "f_row", "g_row",
)  # fmt: skip
STRIDES_OF_X = ("x_sf", "x_st")  # a stride of 1 is worth a version of its own


@triton.jit
def load_states(
    p_decay, p_frequency, o_state, mask, decay_low, decay_ratio, band_low, band_width, RANGES: tl.constexpr
):  # fmt: skip
    """α, ω [BN, BS] and the factors that turn their gradients into those of the inputs."""
    decay = tl.load(p_decay + o_state, mask=mask, other=0.0).to(tl.float32)
    frequency = tl.load(p_frequency + o_state, mask=mask, other=0.0).to(tl.float32)
    slope_decay, slope_frequency = 1.0, 1.0
    if RANGES:
        return from_logits(decay, frequency, decay_low, decay_ratio, band_low, band_width)
    else:
        return decay, frequency, slope_decay, slope_frequency


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=STRIDES_OF_X)
def sblu_fwd_kernel(
    p_x, p_decay, p_frequency, p_w, p_out, p_grad, p_grad_y, rows, n_f, n_t, frames,
    x_sb: tl.int64, x_sc: tl.int64, x_sf, x_st,
    s_b: tl.int64, s_i: tl.int64, s_j: tl.int64, s_s, f_row: tl.int64, g_row: tl.int64,
    decay_low, decay_ratio, band_low, band_width,
    S: tl.constexpr, P_F: tl.constexpr, R: tl.constexpr, K: tl.constexpr, S_F: tl.constexpr, S_T: tl.constexpr,
    OFFSET: tl.constexpr, WITHIN: tl.constexpr, QUADRATURE: tl.constexpr, RANGES: tl.constexpr,
    TIME_MAJOR: tl.constexpr, PLANES: tl.constexpr, OUT: tl.constexpr, GRAD: tl.constexpr, BN: tl.constexpr,
    BS: tl.constexpr, BR: tl.constexpr, DOT: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """If OUT, write features into rows f_row apart; if GRAD, also grad_y (tokens, 2S) in float32, from their cotangent
    in rows g_row apart. Unless PLANES is 2, y alone, a program must have all states of its tokens."""
    tl.static_assert(S <= BS if PLANES != 2 else not GRAD)
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    o_s = tl.program_id(1) * BS + tl.arange(0, BS)
    m_token, m_s = row < rows, o_s < S
    mask = m_token[:, None] & m_s[None, :]
    b, i, j = token_at(row, n_f, n_t, TIME_MAJOR)
    o_state = (b * s_b + i * s_i + j * s_j)[:, None] + o_s[None, :] * s_s
    decay, frequency, _, _ = load_states(
        p_decay, p_frequency, o_state, mask, decay_low, decay_ratio, band_low, band_width, RANGES
    )
    z_re, z_im, gain_re, gain_im, _, _ = gain(decay, frequency, K % 2 == 0)
    o_token, first = b * x_sb + i * S_F * x_sf, j * S_T + OFFSET
    plus_re, plus_im, minus_re, minus_im, _, _, _, _ = polynomials(
        p_x, p_w, o_token, m_token, first, z_re, z_im, o_s, m_s, frames, x_sc, x_sf, x_st,
        P_F, R, K, WITHIN, QUADRATURE, False, BN, BS, BR, DOT, NARROW, PRECISION,
    )  # fmt: skip
    y_re, y_im = responses(plus_re, plus_im, minus_re, minus_im, gain_re, gain_im, QUADRATURE)
    n, inverse = y_re, 1.0
    if PLANES != 2:
        n, inverse = standardise(y_re, y_im, m_s, S)
    long_row = row.to(tl.int64)[:, None]
    if OUT:
        store_features(p_out + long_row * f_row + o_s[None, :], y_re, y_im, n, mask, S, PLANES)
    if GRAD:
        p_token = p_grad + long_row * g_row + o_s[None, :]
        g_re, g_im = features_adjoint(p_token, y_re, y_im, n, inverse, mask, S, PLANES)
        o_y = long_row * (2 * S) + o_s[None, :]
        tl.store(p_grad_y + o_y, g_re, mask=mask)
        tl.store(p_grad_y + o_y + S, g_im, mask=mask)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=STRIDES_OF_X)
def sblu_bwd_state_kernel(
    p_grad, p_x, p_decay, p_frequency, p_w, p_grad_decay, p_grad_frequency, p_y, rows, n_f, n_t, frames,
    x_sb: tl.int64, x_sc: tl.int64, x_sf, x_st,
    s_b: tl.int64, s_i: tl.int64, s_j: tl.int64, s_s,
    g_b: tl.int64, g_i: tl.int64, g_j: tl.int64, g_p, g_s, out_row: tl.int64, y_row: tl.int64,
    decay_low, decay_ratio, band_low, band_width,
    S: tl.constexpr, P_F: tl.constexpr, R: tl.constexpr, K: tl.constexpr, S_F: tl.constexpr, S_T: tl.constexpr,
    OFFSET: tl.constexpr, WITHIN: tl.constexpr, QUADRATURE: tl.constexpr, RANGES: tl.constexpr,
    TIME_MAJOR: tl.constexpr, RESPONSES: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr,
    DOT: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of decay and frequency; if RESPONSES, also y, which the same Horner run gives."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    o_s = tl.program_id(1) * BS + tl.arange(0, BS)
    m_token, m_s = row < rows, o_s < S
    mask = m_token[:, None] & m_s[None, :]
    b, i, j = token_at(row, n_f, n_t, TIME_MAJOR)
    o_state = (b * s_b + i * s_i + j * s_j)[:, None] + o_s[None, :] * s_s
    decay, frequency, slope_decay, slope_frequency = load_states(
        p_decay, p_frequency, o_state, mask, decay_low, decay_ratio, band_low, band_width, RANGES
    )
    z_re, z_im, gain_re, gain_im, der_re, der_im = gain(decay, frequency, K % 2 == 0)
    o_token, first = b * x_sb + i * S_F * x_sf, j * S_T + OFFSET
    plus_re, plus_im, minus_re, minus_im, d_plus_re, d_plus_im, d_minus_re, d_minus_im = polynomials(
        p_x, p_w, o_token, m_token, first, z_re, z_im, o_s, m_s, frames, x_sc, x_sf, x_st,
        P_F, R, K, WITHIN, QUADRATURE, True, BN, BS, BR, DOT, NARROW, PRECISION,
    )  # fmt: skip
    if RESPONSES:
        y_re, y_im = responses(plus_re, plus_im, minus_re, minus_im, gain_re, gain_im, QUADRATURE)
        o_y = row.to(tl.int64)[:, None] * y_row + o_s[None, :]
        tl.store(p_y + o_y, y_re, mask=mask)
        tl.store(p_y + o_y + S, y_im, mask=mask)
    # f′ = γ′ P − γ z dP/dz
    step_re, step_im = gain_re * z_re - gain_im * z_im, gain_re * z_im + gain_im * z_re
    f_re = der_re * plus_re - der_im * plus_im - (step_re * d_plus_re - step_im * d_plus_im)
    f_im = der_re * plus_im + der_im * plus_re - (step_re * d_plus_im + step_im * d_plus_re)
    o_grad = (b * g_b + i * g_i + j * g_j)[:, None] + o_s[None, :] * g_s
    g_re = tl.load(p_grad + o_grad, mask=mask, other=0.0).to(tl.float32)
    g_im = tl.load(p_grad + o_grad + g_p, mask=mask, other=0.0).to(tl.float32)
    # D = Σ conj(ḡ) f′ over the polynomials; Re D and −Im D
    if QUADRATURE:
        h_re = der_re * minus_re - der_im * minus_im - (step_re * d_minus_re - step_im * d_minus_im)
        h_im = der_re * minus_im + der_im * minus_re - (step_re * d_minus_im + step_im * d_minus_re)
        grad_decay = g_re * f_re + g_im * h_im
        grad_frequency = g_im * h_re - g_re * f_im
    else:
        grad_decay = g_re * f_re + g_im * f_im
        grad_frequency = g_im * f_re - g_re * f_im
    o_out = row.to(tl.int64)[:, None] * out_row + o_s[None, :]
    tl.store(p_grad_decay + o_out, grad_decay * slope_decay, mask=mask)
    tl.store(p_grad_frequency + o_out, grad_frequency * slope_frequency, mask=mask)


@triton.jit
def cotangents_of_u(g_re, g_im, q_re, q_im, QUADRATURE: tl.constexpr):
    """∂L/∂u of the folded frame to the left and to the right of the centre, from q = γ z^m."""
    if QUADRATURE:
        return g_re * q_re - g_im * q_im, g_re * q_re + g_im * q_im
    else:
        both = g_re * q_re + g_im * q_im
        return both, both


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=STRIDES_OF_X)
def sblu_bwd_weight_kernel(
    p_grad, p_x, p_decay, p_frequency, p_partial, rows, n_f, n_t, frames,
    x_sb: tl.int64, x_sc: tl.int64, x_sf, x_st,
    s_b: tl.int64, s_i: tl.int64, s_j: tl.int64, s_s,
    g_b: tl.int64, g_i: tl.int64, g_j: tl.int64, g_p, g_s,
    decay_low, decay_ratio, band_low, band_width,
    S: tl.constexpr, P_F: tl.constexpr, R: tl.constexpr, K: tl.constexpr, S_F: tl.constexpr, S_T: tl.constexpr,
    OFFSET: tl.constexpr, WITHIN: tl.constexpr, QUADRATURE: tl.constexpr, RANGES: tl.constexpr,
    TIME_MAJOR: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr, DOT: tl.constexpr,
    NARROW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """∂B[s, r] = Σ_tokens Σ_d ∂u[s, d] x[r, d]: every program adds up its run of blocks of tokens.

    partial (programs, S, R), float32. Without DOT a program has one row r.
    """
    tiles = tl.cdiv(tl.cdiv(rows, BN), tl.num_programs(0))
    o_s = tl.program_id(1) * BS + tl.arange(0, BS)
    o_r = tl.program_id(2) * BR + tl.arange(0, BR)
    m_s, m_r = o_s < S, o_r < R
    o_row = row_offsets(o_r, x_sc, x_sf, P_F)
    total = tl.zeros([BS, BR], tl.float32)
    for tile in range(tl.program_id(0) * tiles, (tl.program_id(0) + 1) * tiles):
        row = tile * BN + tl.arange(0, BN)
        m_token = row < rows
        mask = m_token[:, None] & m_s[None, :]
        b, i, j = token_at(row, n_f, n_t, TIME_MAJOR)
        o_state = (b * s_b + i * s_i + j * s_j)[:, None] + o_s[None, :] * s_s
        decay, frequency, _, _ = load_states(
            p_decay, p_frequency, o_state, mask, decay_low, decay_ratio, band_low, band_width, RANGES
        )
        z_re, z_im, q_re, q_im, _, _ = gain(decay, frequency, K % 2 == 0)
        o_grad = (b * g_b + i * g_i + j * g_j)[:, None] + o_s[None, :] * g_s
        g_re = tl.load(p_grad + o_grad, mask=mask, other=0.0).to(tl.float32)
        g_im = tl.load(p_grad + o_grad + g_p, mask=mask, other=0.0).to(tl.float32)
        o_token, first = b * x_sb + i * S_F * x_sf, j * S_T + OFFSET
        for m in range((K + 1) // 2):
            step = (K + 1) // 2 - 1 - m  # outward from the centre
            left, right = cotangents_of_u(g_re, g_im, q_re, q_im, QUADRATURE)
            if K % 2 == 1:  # the centre frame meets itself
                left, right = tl.where(m == 0, 0.5 * (left + right), left), tl.where(m == 0, 0.0, right)
            t_left, t_right = first + step, first + (K - 1 - step)
            x_left = load_rows(p_x, o_token, m_token, o_row, m_r, t_left, frames, x_st, WITHIN)
            x_right = load_rows(p_x, o_token, m_token, o_row, m_r, t_right, frames, x_st, WITHIN)
            if DOT:
                total += product(tl.trans(left), x_left, False, PRECISION)
                total += product(tl.trans(right), x_right, False, PRECISION)
            else:
                x_left, x_right = x_left.to(tl.float32), x_right.to(tl.float32)
                total += tl.sum(left * x_left + right * x_right, 0)[:, None]
            q_re, q_im = q_re * z_re - q_im * z_im, q_re * z_im + q_im * z_re
    o_out = (tl.program_id(0).to(tl.int64) * S + o_s)[:, None] * R + o_r[None, :]
    tl.store(p_partial + o_out, total, mask=m_s[:, None] & m_r[None, :])


@triton.jit(do_not_specialize=VARYING)
def sblu_bwd_window_kernel(
    p_grad, p_decay, p_frequency, p_w, p_windows, rows, n_f, n_t,
    s_b: tl.int64, s_i: tl.int64, s_j: tl.int64, s_s,
    g_b: tl.int64, g_i: tl.int64, g_j: tl.int64, g_p, g_s,
    decay_low, decay_ratio, band_low, band_width,
    S: tl.constexpr, R: tl.constexpr, K: tl.constexpr, QUADRATURE: tl.constexpr, RANGES: tl.constexpr,
    TIME_MAJOR: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Each token's gradient for the pixels of its window, (tokens, R, K) in float32; `overlap_add` joins them."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    o_r = tl.program_id(1) * BR + tl.arange(0, BR)
    m_token, m_r = row < rows, o_r < R
    b, i, j = token_at(row, n_f, n_t, TIME_MAJOR)
    o_out = (row.to(tl.int64)[:, None] * R + o_r[None, :]) * K
    m_out = m_token[:, None] & m_r[None, :]
    for s in range(0, S, BS):
        o_s = s + tl.arange(0, BS)
        m_s = o_s < S
        mask = m_token[:, None] & m_s[None, :]
        o_state = (b * s_b + i * s_i + j * s_j)[:, None] + o_s[None, :] * s_s
        decay, frequency, _, _ = load_states(
            p_decay, p_frequency, o_state, mask, decay_low, decay_ratio, band_low, band_width, RANGES
        )
        z_re, z_im, q_re, q_im, _, _ = gain(decay, frequency, K % 2 == 0)
        o_grad = (b * g_b + i * g_i + j * g_j)[:, None] + o_s[None, :] * g_s
        g_re = tl.load(p_grad + o_grad, mask=mask, other=0.0).to(tl.float32)
        g_im = tl.load(p_grad + o_grad + g_p, mask=mask, other=0.0).to(tl.float32)
        b_w = load_weight(p_w, o_r, m_r, o_s, m_s, R).to(tl.float32)  # [BR, BS]
        tl.debug_barrier()  # this block of states adds to what the last one left in p_windows
        for m in range((K + 1) // 2):
            step = (K + 1) // 2 - 1 - m
            left, right = cotangents_of_u(g_re, g_im, q_re, q_im, QUADRATURE)
            if K % 2 == 1:  # at the centre, both are the same frame
                middle = 0.5 * (left + right)
                left, right = tl.where(m == 0, middle, left), tl.where(m == 0, middle, right)
            if DOT:
                x_left = product(left, tl.trans(b_w), False, PRECISION)
                x_right = product(right, tl.trans(b_w), False, PRECISION)
            else:
                x_left = tl.sum(left * b_w, 1)[:, None]
                x_right = tl.sum(right * b_w, 1)[:, None]
            p_left, p_right = p_windows + o_out + step, p_windows + o_out + (K - 1 - step)
            if s > 0:
                x_left += tl.load(p_left, mask=m_out, other=0.0)
                x_right += tl.load(p_right, mask=m_out, other=0.0)
            tl.store(p_left, x_left, mask=m_out)
            tl.store(p_right, x_right, mask=m_out)
            q_re, q_im = q_re * z_re - q_im * z_im, q_re * z_im + q_im * z_re
