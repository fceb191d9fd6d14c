// The arithmetic of one state, for host and device: z, the gain, the Horner step and the adjoint step.
//
// Everything is a template over V: a scalar, or a vector of states that has the arithmetic operators. V's companion
// functions (select, exponential parts) come from Math<V>, which the including file provides beforehand for its vector
// type; Math<float> and Math<double> are here.
//
// The file is compiled once per instruction set with other flags, so nothing in it may have external linkage under one
// common name: AAPE_NAMESPACE keeps the copies apart.

#pragma once

#include <cstdint>

#ifndef AAPE_NAMESPACE
#define AAPE_NAMESPACE scalar
#endif

#if defined(__CUDACC__)
#define AAPE_FN __host__ __device__ __forceinline__
#else
#define AAPE_FN inline __attribute__((always_inline))
#endif

namespace aape {

inline namespace AAPE_NAMESPACE {

template <class V>
struct Math;  // Scalar, splat, select, exp parts

// a·b + c. On a GPU rounded once, and nvcc is told to contract nothing by itself (--fmad=false): what it would, differs
// from one instantiation of a kernel to the next. On a CPU the compiler contracts, where the instruction set can.
template <class V>
AAPE_FN V fma(V a, V b, V c) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(V) == 8) return __fma_rn(a, b, c);
  else return __fmaf_rn(a, b, c);
#else
  return a * b + c;
#endif
}

// a / b, not for subnormal b. On a GPU in float by the approximate reciprocal, to 1.5 ulp: an exact one takes ten times the
// instructions.
template <class V>
AAPE_FN V quotient(V a, V b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(V) == 4) {
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
    return a * inverse;
  }
#endif
  return a / b;
}

template <class V>
struct Complex {
  V re, im;
};

template <class V>
AAPE_FN Complex<V> operator+(Complex<V> a, Complex<V> b) { return {a.re + b.re, a.im + b.im}; }
template <class V>
AAPE_FN Complex<V> operator-(Complex<V> a, Complex<V> b) { return {a.re - b.re, a.im - b.im}; }
template <class V>
AAPE_FN Complex<V> operator*(Complex<V> a, Complex<V> b) {
  return {fma<V>(a.re, b.re, -(a.im * b.im)), fma<V>(a.re, b.im, a.im * b.re)};
}
// a·b + w for real w: one Horner step, 4 multiply-adds
template <class V>
AAPE_FN Complex<V> step(Complex<V> a, Complex<V> b, V w) {
  return {fma<V>(a.re, b.re, fma<V>(-a.im, b.im, w)), fma<V>(a.re, b.im, a.im * b.re)};
}
template <class V>
AAPE_FN Complex<V> step(Complex<V> a, Complex<V> b, Complex<V> w) {
  return {fma<V>(a.re, b.re, fma<V>(-a.im, b.im, w.re)), fma<V>(a.re, b.im, fma<V>(a.im, b.re, w.im))};
}
template <class V>
AAPE_FN Complex<V> select(typename Math<V>::Mask mask, Complex<V> a, Complex<V> b) {
  return {Math<V>::select(mask, a.re, b.re), Math<V>::select(mask, a.im, b.im)};
}

// Taylor coefficients of expm1(r)/r on |r| <= ln2/2: relative error under 1e-8 (float) and 3e-17 (double).
// sin(r)/r and cos(r) in r² on |r| <= pi/4: absolute error under 1e-9 (float) and 2e-17 (double).
// Double uses every term, float the first few.
#define AAPE_EXP_TERMS {1., 1. / 2, 1. / 6, 1. / 24, 1. / 120, 1. / 720, 1. / 5040, 1. / 40320, 1. / 362880, \
                        1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800}
#define AAPE_SIN_TERMS {1., -1. / 6, 1. / 120, -1. / 5040, 1. / 362880, -1. / 39916800, 1. / 6227020800, \
                        -1. / 1307674368000, 1. / 355687428096000}
#define AAPE_COS_TERMS {1., -1. / 2, 1. / 24, -1. / 720, 1. / 40320, -1. / 3628800, 1. / 479001600, \
                        -1. / 87178291200, 1. / 20922789888000}
// (1 − e^{−Λ})/Λ in −Λ, and 2 sinh(Λ/2)/Λ in (Λ/2)²
#define AAPE_EVEN_TERMS {1., 1. / 2, 1. / 6, 1. / 24, 1. / 120, 1. / 720, 1. / 5040, 1. / 40320, 1. / 362880, \
                         1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800, 1. / 87178291200}
#define AAPE_ODD_TERMS {1., 1. / 6, 1. / 120, 1. / 5040, 1. / 362880, 1. / 39916800, 1. / 6227020800}

template <class V>
AAPE_FN V horner(const double* terms, int count, V x) {
  using S = typename Math<V>::Scalar;
  V sum = Math<V>::splat(S(terms[count - 1]));
  for (int n = count - 2; n >= 0; --n) sum = fma<V>(sum, x, Math<V>::splat(S(terms[n])));
  return sum;
}

// e^x and e^x − 1, each with a relative error under 2 ulp: x = n ln2 + r, p = expm1(r), 2^n (1 + p). NaN stays NaN; where
// e^x is below the smallest normal number they are 0 and −1, above the largest one the largest.
template <class V>
struct Exp {
  V exp, expm1;
};

template <class V>
AAPE_FN Exp<V> exp_parts(V x) {
  using M = Math<V>;
  using S = typename M::Scalar;
  constexpr double terms[] = AAPE_EXP_TERMS;
  constexpr int count = M::kDouble ? 13 : 7;
  constexpr S low = M::kDouble ? S(-708) : S(-87), high = M::kDouble ? S(709) : S(88);
  V bounded = M::select(x < low, M::splat(low), M::select(x > high, M::splat(high), x));
  V n = M::round(bounded * S(1.4426950408889634));
  // ln2 in two parts, the first with trailing zeros so that n·ln2 is exact
  constexpr S ln2_high = M::kDouble ? S(6.93147180369123816490e-01) : S(0.693359375);
  constexpr S ln2_low = M::kDouble ? S(1.90821492927058770002e-10) : S(-2.12194440e-4);
  V r = fma<V>(n, M::splat(-ln2_low), fma<V>(n, M::splat(-ln2_high), bounded));
  V p = r * horner<V>(terms, count, r);
  V scale = M::exp2(n);
  V exp = fma<V>(scale, p, scale), expm1 = fma<V>(scale, p, scale - S(1));
  return {M::select(x < low, M::splat(S(0)), exp), M::select(x < low, M::splat(S(-1)), expm1)};
}

// e^x alone. On a GPU in float by its exponential of two, to 2 ulp; above the largest number infinity.
template <class V>
AAPE_FN V exp(V x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(V) == 4) {
    // log2 e in two parts: x · log2 e rounded once would lose as many bits as it has before the point
    const float high = x * 1.44269502f, low = fma<float>(x, 1.44269502f, -high);
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(high));
    return power * fma<float>(fma<float>(x, 1.92596299e-8f, low), 0.693147181f, 1.0f);
  }
#endif
  return exp_parts<V>(x).exp;
}

template <class V>
AAPE_FN V sigmoid(V x) {
  const V one = Math<V>::splat(typename Math<V>::Scalar(1));
  return quotient<V>(one, one + exp<V>(-x));
}

template <class V>
struct SinCos {
  V sin, cos;
};

// Absolute error under 1.5 ulp of 1 for |x| <= 1000; beyond it the reduction loses digits in proportion to |x|.
template <class V>
AAPE_FN SinCos<V> sincos(V x) {
  using M = Math<V>;
  using S = typename M::Scalar;
  constexpr double sin_terms[] = AAPE_SIN_TERMS, cos_terms[] = AAPE_COS_TERMS;
  constexpr int count = M::kDouble ? 9 : 5;
  V n = M::round(x * S(0.63661977236758134));
  // pi/2 in three parts, exact products for |n| < 2^11 (float), 2^20 (double)
  constexpr S high = M::kDouble ? S(1.57079632673412561417e+00) : S(1.5703125);
  constexpr S middle = M::kDouble ? S(6.07710050630396597660e-11) : S(4.837512969970703125e-4);
  constexpr S low = M::kDouble ? S(2.02226624879595063154e-21) : S(7.54978995489188216e-8);
  V r = fma<V>(n, M::splat(-low), fma<V>(n, M::splat(-middle), fma<V>(n, M::splat(-high), x)));
  V square = r * r;
  V sin = r * horner<V>(sin_terms, count, square), cos = horner<V>(cos_terms, count, square);
  // quadrant n mod 4 as a number in {0, 1, 2, 3}
  V quadrant = fma<V>(M::splat(S(-4)), M::floor(n * S(0.25)), n);
  using Mask = typename M::Mask;
  Mask odd = (quadrant == S(1)) | (quadrant == S(3));
  Mask negative_sin = quadrant >= S(2), negative_cos = (quadrant == S(1)) | (quadrant == S(2));
  V s = M::select(odd, cos, sin), c = M::select(odd, sin, cos);
  return {M::select(negative_sin, -s, s), M::select(negative_cos, -c, c)};
}

// The same for 0 <= x <= π/2 without reduction, absolute error under 1.2 ulp of 1: what a frequency from a band needs.
template <class V>
AAPE_FN SinCos<V> sincos_of_quarter(V x) {
  using M = Math<V>;
  constexpr double sin_terms[] = AAPE_SIN_TERMS, cos_terms[] = AAPE_COS_TERMS;
  static_assert(!M::kDouble, "as many terms as float needs");
  const V square = x * x;
  return {x * horner<V>(sin_terms, 7, square), horner<V>(cos_terms, 7, square)};
}

// z = e^{−Λ}, the gain γ(Λ) and, where Derivative, γ′(Λ). docs/maths.md §2.4: below |Λ| = 0.2 gain and derivative
// are series, elsewhere 1 − z comes from expm1 and the half angle.
template <class V>
struct Gain {
  Complex<V> z, gamma, derivative;
};

// InBand: 0 <= frequency <= π, and float.
template <class V, bool Derivative, bool InBand = false>
AAPE_FN Gain<V> gain(V decay, V frequency, bool even) {
  using M = Math<V>;
  using S = typename M::Scalar;
  Gain<V> out;
  SinCos<V> half;
  if constexpr (InBand) half = sincos_of_quarter<V>(frequency * S(0.5));
  else half = sincos<V>(frequency * S(0.5));
  auto [s, c] = half;
  V norm = fma<V>(decay, decay, frequency * frequency);
  typename M::Mask small = norm < S(0.04);
  const V inverse_norm = quotient<V>(M::splat(S(1)), norm);  // one division for both parts
  Complex<V> inverse = {decay * inverse_norm, -frequency * inverse_norm};  // 1/Λ
  Complex<V> derivative_top;                               // Λ γ′
  const V one = M::splat(S(1)), minus_twice_s = S(-2) * s;
  if (even) {
    auto [e, em1] = exp_parts<V>(-decay);
    const V es = e * minus_twice_s;
    out.z = {e * fma<V>(minus_twice_s, s, one), es * c};
    Complex<V> one_minus_z = {fma<V>(-es, s, -em1), -out.z.im};
    out.gamma = one_minus_z * inverse;
    derivative_top = out.z - out.gamma;
  } else {
    auto [e, em1] = exp_parts<V>(decay * S(-0.5));
    V half_inverse = quotient<V>(M::splat(S(0.5)), e);
    V sinh = -em1 * (S(2) + em1) * half_inverse, cosh = fma<V>(e, e, one) * half_inverse;
    V ee = e * e;
    out.z = {ee * fma<V>(minus_twice_s, s, one), ee * (minus_twice_s * c)};
    Complex<V> twice_sinh = {S(2) * sinh * c, S(2) * cosh * s};
    out.gamma = twice_sinh * inverse;
    derivative_top = Complex<V>{cosh * c, sinh * s} - out.gamma;
  }
  if (Derivative) out.derivative = derivative_top * inverse;
  if (M::any(small)) {
    constexpr double even_terms[] = AAPE_EVEN_TERMS, odd_terms[] = AAPE_ODD_TERMS;
    constexpr int even_count = M::kDouble ? 14 : 8, odd_count = M::kDouble ? 7 : 4;
    Complex<V> lambda = {decay, frequency};
    Complex<V> variable = even ? Complex<V>{-decay, -frequency} : lambda * lambda;
    const double* terms = even ? even_terms : odd_terms;
    int count = even ? even_count : odd_count;
    double base = even ? 1.0 : 0.25;  // odd: the variable is Λ², the terms are those of (Λ/2)²
    double power[14];
    power[0] = 1.0;
    for (int n = 1; n < count; ++n) power[n] = power[n - 1] * base;
    V zero = M::splat(S(0));
    Complex<V> sum = {M::splat(S(terms[count - 1] * power[count - 1])), zero}, slope = {zero, zero};
    for (int n = count - 2; n >= 0; --n) {
      slope = step<V>(slope, variable, sum);
      sum = step<V>(sum, variable, M::splat(S(terms[n] * power[n])));
    }
    out.gamma = select<V>(small, sum, out.gamma);
    if (Derivative) {
      // d(−Λ)/dΛ = −1, d(Λ²)/dΛ = 2Λ
      Complex<V> chain = even ? Complex<V>{-slope.re, -slope.im} : slope * Complex<V>{S(2) * decay, S(2) * frequency};
      out.derivative = select<V>(small, chain, out.derivative);
    }
  }
  return out;
}

// One cotangent's share of ∂L/∂Λ: conj(ḡ)(γ′P − γ z dP/dz), to be summed over the polynomials; the caller takes Re for
// the decay and −Im for the frequency.
template <class V>
AAPE_FN Complex<V> adjoint(Complex<V> conj_cotangent, const Gain<V>& g, Complex<V> polynomial, Complex<V> slope) {
  return conj_cotangent * (g.derivative * polynomial - g.gamma * (g.z * slope));
}

}  // namespace AAPE_NAMESPACE
}  // namespace aape
