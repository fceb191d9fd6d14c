"""What every kernel does with a block of tokens: where they lie, their states, their projected window.

Blocks are [BN tokens, BS states] and, for the R = C · P_f rows of x that a token's projection reads, [BN, BR].
Offsets into tensors are int64.
"""

import triton
import triton.language as tl

from .state import exp_parts


@triton.jit
def token_at(row, n_f, n_t, TIME_MAJOR: tl.constexpr):
    """Row of tokens -> (b, i, j), in int64; rows run over (b, i, j), or (b, j, i) if TIME_MAJOR."""
    if TIME_MAJOR:
        i, rest = row % n_f, row // n_f
        j, b = rest % n_t, rest // n_t
    else:
        j, rest = row % n_t, row // n_t
        i, b = rest % n_f, rest // n_f
    return b.to(tl.int64), i.to(tl.int64), j.to(tl.int64)


@triton.jit
def sigmoid(x):
    e, _ = exp_parts(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def from_logits(r_decay, r_frequency, decay_low, decay_ratio, band_low, band_width):
    """α, ω from the Lambda Encoder's logits, then dα/dr and dω/dr."""
    share = sigmoid(r_decay)
    exp, _ = exp_parts(decay_ratio * share)
    decay = decay_low * exp
    slope_decay = decay * decay_ratio * share * (1.0 - share)
    share = sigmoid(r_frequency)
    return decay, band_low + band_width * share, slope_decay, band_width * share * (1.0 - share)


@triton.jit
def load_rows(p_x, o_token, m_token, o_r, m_r, t, frames, x_st, WITHIN: tl.constexpr):
    """Pixels [BN, BR] of one frame of each token's window; 0 outside the clip.

    t: the frame [BN]; WITHIN says that it lies in the clip.
    """
    m = m_token
    if not WITHIN:
        m = m & (t >= 0) & (t < frames)
    return tl.load(p_x + (o_token + t * x_st)[:, None] + o_r[None, :], mask=m[:, None] & m_r[None, :], other=0.0)


@triton.jit
def load_weight(p_w, o_r, m_r, o_s, m_s, R: tl.constexpr):
    """The projection, transposed: [BR, BS] of the contiguous (S, R)."""
    return tl.load(p_w + o_s[None, :] * R + o_r[:, None], mask=m_s[None, :] & m_r[:, None], other=0.0)


@triton.jit
def product(a, b, NARROW: tl.constexpr, PRECISION: tl.constexpr):
    """a · b, accumulated in float32; operands in their own 16 bits if NARROW, else in float32."""
    if NARROW:
        return tl.dot(a, b)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)


@triton.jit
def row_offsets(r, x_sc, x_sf, P_F: tl.constexpr):
    return (r // P_F).to(tl.int64) * x_sc + (r % P_F).to(tl.int64) * x_sf


@triton.jit
def fold(
    p_x, p_w, o_token, m_token, first, step, o_s, m_s, frames, x_sc, x_sf, x_st,
    P_F: tl.constexpr, R: tl.constexpr, K: tl.constexpr, WITHIN: tl.constexpr, QUADRATURE: tl.constexpr,
    BN: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr, DOT: tl.constexpr, NARROW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """w⁺ and w⁻ [BN, BS] of the window's frames `step` and K − 1 − `step`, projected."""
    plus = tl.zeros([BN, BS], tl.float32)
    minus = tl.zeros([BN, BS], tl.float32)
    t_left, t_right = first + step, first + (K - 1 - step)
    if DOT:
        for r in range(0, R, BR):
            r_block = r + tl.arange(0, BR)
            m_r = r_block < R
            o_r = row_offsets(r_block, x_sc, x_sf, P_F)
            b_w = load_weight(p_w, r_block, m_r, o_s, m_s, R)  # [BR, BS]
            left = load_rows(p_x, o_token, m_token, o_r, m_r, t_left, frames, x_st, WITHIN)  # [BN, BR]
            right = load_rows(p_x, o_token, m_token, o_r, m_r, t_right, frames, x_st, WITHIN)
            if NARROW:  # the fold would not fit into 16 bits: project first
                u_left, u_right = product(left, b_w, True, PRECISION), product(right, b_w, True, PRECISION)
                plus += u_right + u_left
                minus += u_right - u_left
            else:
                left, right = left.to(tl.float32), right.to(tl.float32)
                plus += product(right + left, b_w, False, PRECISION)
                if QUADRATURE:
                    minus += product(right - left, b_w, False, PRECISION)
    else:
        for r in range(R):
            one = tl.full([1], r, tl.int32)
            every = one >= 0
            o_r = row_offsets(one, x_sc, x_sf, P_F)
            b_w = load_weight(p_w, one, every, o_s, m_s, R).to(tl.float32)  # [1, BS]
            left = load_rows(p_x, o_token, m_token, o_r, every, t_left, frames, x_st, WITHIN).to(tl.float32)  # [BN, 1]
            right = load_rows(p_x, o_token, m_token, o_r, every, t_right, frames, x_st, WITHIN).to(tl.float32)
            plus += (right + left) * b_w
            minus += (right - left) * b_w
    return plus, minus


@triton.jit
def horner(re, im, z_re, z_im, w):
    """One step P ← P z + w for real w: 4 fused multiply-adds."""
    return re * z_re - (im * z_im - w), re * z_im + im * z_re


@triton.jit
def polynomials(
    p_x, p_w, o_token, m_token, first, z_re, z_im, o_s, m_s, frames, x_sc, x_sf, x_st,
    P_F: tl.constexpr, R: tl.constexpr, K: tl.constexpr, WITHIN: tl.constexpr, QUADRATURE: tl.constexpr,
    DERIVATIVE: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr, DOT: tl.constexpr,
    NARROW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P⁺, P⁻ and, if DERIVATIVE, dP⁺/dz, dP⁻/dz by one Horner run from the window's ends to its centre.

    Eight blocks (re, im of each); the bilateral kernel's P⁻ and derivatives not asked for are zeros.
    """
    zero = tl.zeros([BN, BS], tl.float32)
    plus_re, plus_im, minus_re, minus_im = zero, zero, zero, zero
    d_plus_re, d_plus_im, d_minus_re, d_minus_im = zero, zero, zero, zero
    for step in range((K + 1) // 2):
        plus, minus = fold(
            p_x, p_w, o_token, m_token, first, step, o_s, m_s, frames, x_sc, x_sf, x_st,
            P_F, R, K, WITHIN, QUADRATURE, BN, BS, BR, DOT, NARROW, PRECISION,
        )  # fmt: skip
        if K % 2 == 1:  # the centre frame meets itself: it counts once, and w⁻ is 0 there
            plus = tl.where(step == K // 2, 0.5 * plus, plus)
        if DERIVATIVE:
            d_re = d_plus_re * z_re - (d_plus_im * z_im - plus_re)
            d_plus_re, d_plus_im = d_re, d_plus_re * z_im + (d_plus_im * z_re + plus_im)
        plus_re, plus_im = horner(plus_re, plus_im, z_re, z_im, plus)
        if QUADRATURE:
            if DERIVATIVE:
                d_re = d_minus_re * z_re - (d_minus_im * z_im - minus_re)
                d_minus_re, d_minus_im = d_re, d_minus_re * z_im + (d_minus_im * z_re + minus_im)
            minus_re, minus_im = horner(minus_re, minus_im, z_re, z_im, minus)
    return plus_re, plus_im, minus_re, minus_im, d_plus_re, d_plus_im, d_minus_re, d_minus_im


@triton.jit
def responses(plus_re, plus_im, minus_re, minus_im, gain_re, gain_im, QUADRATURE: tl.constexpr):
    """Re y = Re γP⁺; Im y = Im γP⁺ (bilateral) or Im γP⁻ (quadrature)."""
    y_re = gain_re * plus_re - gain_im * plus_im
    if QUADRATURE:
        y_im = gain_re * minus_im + gain_im * minus_re
    else:
        y_im = gain_re * plus_im + gain_im * plus_re
    return y_re, y_im
