"""The features of a block of states: log-magnitudes as in `csrc/magnitudes.h`, standardised over the states of a token.

A program has all S states of its tokens in one block [BN, BS]; lanes beyond S do not count. log1p is a polynomial of
our own: the library's logarithm takes 1 + q, which has already lost a small q to rounding.
"""

import triton
import triton.language as tl


@triton.jit
def scaled(y_re, y_im):
    """y and its square, scaled where |y| is loud so that the square neither overflows nor underflows; the scale."""
    loud = (tl.abs(y_re) > 5.764607523034235e17) | (tl.abs(y_im) > 5.764607523034235e17)  # 2⁵⁹
    scale = tl.where(loud, 2.117582368135751e-22, 1.0)  # 2⁻⁷²
    y_re, y_im = y_re * scale, y_im * scale
    return y_re, y_im, y_re * y_re + y_im * y_im, scale, loud


@triton.jit
def log_magnitude(y_re, y_im):
    """e = ½ log1p(|y|²/ε²), relative error under 3e-7, half of it from q = |y|²/ε²; NaN where y is not finite."""
    _, _, square, _, loud = scaled(y_re, y_im)
    q = square * 100.0
    whole = tl.where(loud, q, q + 1.0)
    bits = whole.to(tl.int32, bitcast=True)
    # 1 + q = 2ⁿ (1 + f) with f from √½ − 1 to √2 − 1
    n = (bits - 0x3F3504F3) >> 23
    f = (bits - (n << 23)).to(tl.float32, bitcast=True) - 1.0
    # of a quiet state, what 1 + q rounds off is all there is
    quiet = (q < 1.0) & (whole >= 1.0)
    f = tl.where(quiet, q, f)
    n = tl.where(loud, n + 144, tl.where(quiet, 0, n)).to(tl.float32)
    # log(1 + f) = f − s (f − r) with r = 2 atanh(s)/s − 2: f itself is exact
    s = f / (f + 2.0)
    v = s * s
    p = 1.0 / 13 + v * (1.0 / 15)
    p = 1.0 / 11 + v * p
    p = 1.0 / 9 + v * p
    p = 1.0 / 7 + v * p
    p = 1.0 / 5 + v * p
    p = 1.0 / 3 + v * p
    rest = n * 3.194618494528623e-05 - s * (f - 2.0 * v * p)
    log = n * 0.693115234375 + (f + rest)
    # the bits of ∞ and NaN have no logarithm: this adds NaN; q − q would, too, but not once it is contracted
    return 0.5 * log + square * 0.0


@triton.jit
def log_magnitude_slope(y_re, y_im):
    """∂e/∂Re y and ∂e/∂Im y: y/(|y|² + ε²)."""
    y_re, y_im, square, scale, loud = scaled(y_re, y_im)
    inverse = 1.0 / tl.where(loud, square, square + 0.01)
    return y_re * inverse * scale, y_im * inverse * scale


@triton.jit
def standardise(y_re, y_im, m_s, S: tl.constexpr):
    """n = (e − mean e)/σ [BN, BS], 0 beyond S, and 1/σ [BN, 1], with σ² = var e + 1e-5."""
    e = tl.where(m_s[None, :], log_magnitude(y_re, y_im), 0.0)
    centred = tl.where(m_s[None, :], e - tl.sum(e, 1)[:, None] / S, 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 1)[:, None] / S + 1e-5)
    return centred * inverse, inverse


@triton.jit
def store_features(p_out, y_re, y_im, n, mask, S: tl.constexpr, PLANES: tl.constexpr):
    """Write planes [n], [Re y | Im y] or [Re y | Im y | n], S apart, starting at p_out [BN, BS]."""
    if PLANES != 1:
        tl.store(p_out, y_re, mask=mask)
        tl.store(p_out + S, y_im, mask=mask)
    if PLANES != 2:
        tl.store(p_out + (PLANES - 1) * S, n, mask=mask)


@triton.jit
def features_adjoint(p_grad, y_re, y_im, n, inverse, mask, S: tl.constexpr, PLANES: tl.constexpr):
    """The cotangents of Re y and Im y, from those of the features: planes as in `store_features`, including n."""
    g = tl.load(p_grad + (PLANES - 1) * S, mask=mask, other=0.0).to(tl.float32)
    mean, along = tl.sum(g, 1)[:, None] / S, tl.sum(g * n, 1)[:, None] / S
    g = (g - mean - n * along) * inverse
    slope_re, slope_im = log_magnitude_slope(y_re, y_im)
    g_re, g_im = g * slope_re, g * slope_im
    if PLANES == 3:
        g_re += tl.load(p_grad, mask=mask, other=0.0).to(tl.float32)
        g_im += tl.load(p_grad + S, mask=mask, other=0.0).to(tl.float32)
    return g_re, g_im


@triton.jit(do_not_specialize=("rows",))
def standardise_kernel(
    p_y, p_out, p_grad, rows, f_row: tl.int64, g_row: tl.int64,
    S: tl.constexpr, PLANES: tl.constexpr, OUT: tl.constexpr, GRAD: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """If OUT, write the features of y (tokens, 2S) into rows f_row apart; if GRAD, overwrite y with its cotangent,
    computed from that of the features in rows g_row apart."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    o_s = tl.arange(0, BS)
    m_s = o_s < S
    mask = (row < rows)[:, None] & m_s[None, :]
    long_row = row.to(tl.int64)[:, None]
    p_state = p_y + long_row * (2 * S) + o_s[None, :]
    y_re, y_im = tl.load(p_state, mask=mask, other=0.0), tl.load(p_state + S, mask=mask, other=0.0)
    n, inverse = standardise(y_re, y_im, m_s, S)
    if OUT:
        store_features(p_out + long_row * f_row + o_s[None, :], y_re, y_im, n, mask, S, PLANES)
    if GRAD:
        p_token = p_grad + long_row * g_row + o_s[None, :]
        g_re, g_im = features_adjoint(p_token, y_re, y_im, n, inverse, mask, S, PLANES)
        tl.store(p_state, g_re, mask=mask)
        tl.store(p_state + S, g_im, mask=mask)
