"""The arithmetic of one state, on float32 blocks [tokens, states]: `csrc/sblu.h`, written in Triton.

Sines, cosines and exponentials are polynomials of our own: the library's sine falls back to a reduction that needs
a stack, and its exponential loses expm1.
"""

import triton
import triton.language as tl


@triton.jit
def exp_parts(x):
    """e^x and e^x − 1, each to 2 ulp, for x ≤ 88; NaN stays NaN, and below −87 they are 0 and −1."""
    bounded = tl.where(x < -87.0, -87.0, tl.where(x > 88.0, 88.0, x))
    n = tl.floor(bounded * 1.4426950408889634 + 0.5)
    # ln 2 in two parts, the first with trailing zeros so that n · ln 2 is exact
    r = (bounded - n * 0.693359375) + n * 2.12194440e-4
    p = 1.0 / 720 + r * (1.0 / 5040)
    p = 1.0 / 120 + r * p
    p = 1.0 / 24 + r * p
    p = 1.0 / 6 + r * p
    p = 0.5 + r * p
    p = r + r * r * p
    # 2^n from its bits; the sum of a NaN and anything is NaN
    scale = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    exp = scale * p + scale
    expm1 = scale * p + (scale - 1.0)
    return tl.where(x < -87.0, 0.0, exp), tl.where(x < -87.0, -1.0, expm1)


@triton.jit
def sincos(x):
    """sin x and cos x, absolute error under 1.5 ulp of 1 for |x| ≤ 1000."""
    n = tl.floor(x * 0.6366197723675814 + 0.5)
    # π/2 in three parts, the products exact
    r = ((x - n * 1.5703125) - n * 4.837512969970703125e-4) - n * 7.54978995489188216e-8
    square = r * r
    s = -1.0 / 5040 + square * (1.0 / 362880)
    s = 1.0 / 120 + square * s
    s = -1.0 / 6 + square * s
    s = r + r * square * s
    c = -1.0 / 720 + square * (1.0 / 40320)
    c = 1.0 / 24 + square * c
    c = -0.5 + square * c
    c = 1.0 + square * c
    quadrant = n.to(tl.int32) & 3
    odd = (quadrant & 1) == 1
    sin, cos = tl.where(odd, c, s), tl.where(odd, s, c)
    return tl.where(quadrant >= 2, -sin, sin), tl.where((quadrant == 1) | (quadrant == 2), -cos, cos)


@triton.jit
def gain(decay, frequency, EVEN: tl.constexpr):
    """z = e^{−Λ}, the gain γ(Λ) and γ′(Λ), as six real blocks.

    Even windows: γ = (1 − z)/Λ; odd ones: γ = 2 sinh(Λ/2)/Λ. Below |Λ| = 0.2, gain and derivative are
    series, as both cancel there. The compiler drops what the caller does not use.
    """
    sin, cos = sincos(frequency * 0.5)
    norm = decay * decay + frequency * frequency
    small = norm < 0.04
    norm = tl.where(small, 1.0, norm)
    inverse_norm = 1.0 / norm  # one division for both parts
    inverse_re, inverse_im = decay * inverse_norm, -frequency * inverse_norm  # 1/Λ
    if EVEN:
        e, em1 = exp_parts(-decay)
        top_re, top_im = 2.0 * e * sin * sin - em1, 2.0 * e * sin * cos  # 1 − z
        z_re, z_im = e * (1.0 - 2.0 * sin * sin), -top_im
        gain_re = top_re * inverse_re - top_im * inverse_im
        gain_im = top_re * inverse_im + top_im * inverse_re
        slope_re, slope_im = z_re - gain_re, z_im - gain_im  # Λ γ′
        # in −Λ: Σ (−Λ)ⁿ/(n+1)!
        v_re, v_im = -decay, -frequency
        sum_re, sum_im, der_re, der_im = series_even(v_re, v_im)
        chain_re, chain_im = -der_re, -der_im
    else:
        e, em1 = exp_parts(decay * -0.5)
        half_inverse = 0.5 / e
        sinh, cosh = -em1 * (2.0 + em1) * half_inverse, (1.0 + e * e) * half_inverse
        ee = e * e
        z_re, z_im = ee * (1.0 - 2.0 * sin * sin), ee * (-2.0 * sin * cos)
        top_re, top_im = 2.0 * sinh * cos, 2.0 * cosh * sin  # 2 sinh(Λ/2)
        gain_re = top_re * inverse_re - top_im * inverse_im
        gain_im = top_re * inverse_im + top_im * inverse_re
        slope_re, slope_im = cosh * cos - gain_re, sinh * sin - gain_im
        # in Λ²: Σ (Λ/2)²ⁿ/(2n+1)!; d(Λ²)/dΛ = 2Λ
        v_re, v_im = decay * decay - frequency * frequency, 2.0 * decay * frequency
        sum_re, sum_im, der_re, der_im = series_odd(v_re, v_im)
        chain_re = 2.0 * (der_re * decay - der_im * frequency)
        chain_im = 2.0 * (der_re * frequency + der_im * decay)
    der_re = slope_re * inverse_re - slope_im * inverse_im
    der_im = slope_re * inverse_im + slope_im * inverse_re
    gain_re, gain_im = tl.where(small, sum_re, gain_re), tl.where(small, sum_im, gain_im)
    der_re, der_im = tl.where(small, chain_re, der_re), tl.where(small, chain_im, der_im)
    return z_re, z_im, gain_re, gain_im, der_re, der_im


@triton.jit
def series_step(sum_re, sum_im, der_re, der_im, v_re, v_im, term):
    """One step of Horner's rule for Σ term vⁿ and its derivative."""
    der_re, der_im = der_re * v_re - der_im * v_im + sum_re, der_re * v_im + der_im * v_re + sum_im
    sum_re, sum_im = sum_re * v_re - sum_im * v_im + term, sum_re * v_im + sum_im * v_re
    return sum_re, sum_im, der_re, der_im


@triton.jit
def series_even(v_re, v_im):
    zero = v_re * 0.0
    a, b, c, d = zero + 1.0 / 5040, zero, zero, zero
    a, b, c, d = series_step(a, b, c, d, v_re, v_im, 1.0 / 720)
    a, b, c, d = series_step(a, b, c, d, v_re, v_im, 1.0 / 120)
    a, b, c, d = series_step(a, b, c, d, v_re, v_im, 1.0 / 24)
    a, b, c, d = series_step(a, b, c, d, v_re, v_im, 1.0 / 6)
    a, b, c, d = series_step(a, b, c, d, v_re, v_im, 0.5)
    return series_step(a, b, c, d, v_re, v_im, 1.0)


@triton.jit
def series_odd(v_re, v_im):
    zero = v_re * 0.0
    a, b, c, d = zero + 1.0 / 322560, zero, zero, zero
    a, b, c, d = series_step(a, b, c, d, v_re, v_im, 1.0 / 1920)
    a, b, c, d = series_step(a, b, c, d, v_re, v_im, 1.0 / 24)
    return series_step(a, b, c, d, v_re, v_im, 1.0)
