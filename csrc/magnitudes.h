// The log-magnitude of one state (docs/maths.md §4), e = ½ log1p(|y|²/ε²), and its slope; for host and device.
//
// log1p, not log(|y|² + ε²): standardising takes the constant out, but not the rounding it leaves in quiet patches.

#pragma once

#include "sblu.h"

namespace aape {
inline namespace AAPE_NAMESPACE {

constexpr double kEpsilon = 0.1;
constexpr double kPerSquare = 100;      // 1/ε², which 1/(kEpsilon · kEpsilon) is not
constexpr double kVarianceFloor = 1e-5;  // of n = (e − mean e)/sqrt(var e + floor)

// atanh(s)/s − 1 over s², in s², |s| <= 1/3: relative error of the whole under 2e-8 (7 terms, float) and 1e-17 (16, double)
#define AAPE_ATANH_TERMS                                                                                             \
  {1. / 3, 1. / 5, 1. / 7, 1. / 9, 1. / 11, 1. / 13, 1. / 15, 1. / 17, 1. / 19, 1. / 21, 1. / 23, 1. / 25, 1. / 27, \
   1. / 29, 1. / 31, 1. / 33}

// |y| brought to where its square neither overflows nor counts against 1: scale · y, and log2 of 1/scale².
template <class V>
struct Scaled {
  typename Math<V>::Mask loud;
  Complex<V> y;
  V square;  // of |scale · y|
};

template <class V>
AAPE_FN V loud_scale(typename Math<V>::Mask loud) {
  using S = typename Math<V>::Scalar;
  return Math<V>::select(loud, Math<V>::splat(Math<V>::kDouble ? S(0x1p-600) : S(0x1p-72f)), Math<V>::splat(S(1)));
}

template <class V>
AAPE_FN Scaled<V> scaled(Complex<V> y) {
  using M = Math<V>;
  using S = typename M::Scalar;
  constexpr S limit = M::kDouble ? S(0x1p500) : S(0x1p59f);
  Scaled<V> out;
  out.loud = (y.re > limit) | (y.re < -limit) | (y.im > limit) | (y.im < -limit);
  const V scale = loud_scale<V>(out.loud);
  out.y = {y.re * scale, y.im * scale};
  out.square = fma<V>(out.y.re, out.y.re, out.y.im * out.y.im);
  return out;
}

// e, to 3 ulp, of which the rounding of q makes up to 2; not finite where y is not.
template <class V>
AAPE_FN V log_magnitude(Complex<V> y) {
  using M = Math<V>;
  using S = typename M::Scalar;
  constexpr double terms[] = AAPE_ATANH_TERMS;
  constexpr int count = M::kDouble ? 16 : 7;
  // log 2, the first part of so few bits that a product with an exponent is exact
  constexpr S kHigh = M::kDouble ? S(0x1.62e42feep-1) : S(0x1.62ep-1f), kLow = S(0.69314718055994530942 - double(kHigh));
  constexpr S doublings = M::kDouble ? S(1200) : S(144);
  const Scaled<V> at = scaled<V>(y);
  const V q = at.square * S(kPerSquare);
  const V sum = M::select(at.loud, q, q + S(1));
  V exponent;
  V f = M::split(sum, exponent) - S(1);  // sum = 2^exponent (1 + f), f from √½ − 1 to √2 − 1
  // what 1 + q has rounded off is all there is of a quiet state
  const auto quiet = (q < S(1)) & (sum >= S(1));
  f = M::select(quiet, q, f);
  exponent = M::select(quiet, M::splat(S(0)), exponent);
  exponent = exponent + M::select(at.loud, M::splat(doublings), M::splat(S(0)));
  // log(1 + f) = f − s (f − r) with s = f/(2 + f) and r = 2 atanh(s)/s − 2: f itself is exact
  const V s = quotient<V>(f, f + S(2)), square = s * s;
  const V r = S(2) * square * horner<V>(terms, count, square);
  const V rest = fma<V>(exponent, M::splat(kLow), -s * (f - r));
  const V log = fma<V>(exponent, M::splat(kHigh), f + rest);
  // the bits of ∞ and NaN have no logarithm: ∞ − ∞ and NaN are NaN (of q, a product, contraction could leave a remainder)
  return fma<V>(log, M::splat(S(0.5)), sum - sum);
}

// ∂e/∂Re y and ∂e/∂Im y: y/(|y|² + ε²).
template <class V>
AAPE_FN Complex<V> log_magnitude_slope(Complex<V> y) {
  using M = Math<V>;
  using S = typename M::Scalar;
  const Scaled<V> at = scaled<V>(y);
  const V floor = M::select(at.loud, M::splat(S(0)), M::splat(S(kEpsilon * kEpsilon)));
  const V inverse = quotient<V>(loud_scale<V>(at.loud), at.square + floor);
  return {at.y.re * inverse, at.y.im * inverse};
}

}  // namespace AAPE_NAMESPACE
}  // namespace aape
