// Vectors of states: GCC and clang vector extensions, of the width that AAPE_VECTOR_BYTES says. One source for every
// instruction set; the including translation unit is compiled with that set's flags.

#pragma once

#include <cstdint>
#include <cstring>

#include "../sblu.h"

namespace aape {
inline namespace AAPE_NAMESPACE {

template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef float Vector __attribute__((vector_size(AAPE_VECTOR_BYTES)));
  typedef int32_t Mask __attribute__((vector_size(AAPE_VECTOR_BYTES)));
  static constexpr int kLanes = AAPE_VECTOR_BYTES / 4;
};
template <>
struct Simd<double> {
  typedef double Vector __attribute__((vector_size(AAPE_VECTOR_BYTES)));
  typedef int64_t Mask __attribute__((vector_size(AAPE_VECTOR_BYTES)));
  static constexpr int kLanes = AAPE_VECTOR_BYTES / 8;
};

template <class T>
struct VectorMath {
  using Scalar = T;
  using V = typename Simd<T>::Vector;
  using Mask = typename Simd<T>::Mask;
  static constexpr bool kDouble = sizeof(T) == 8;
  // 1.5 · 2^mantissa bits: adding it leaves the nearest integer in the low bits
  static constexpr T kRound = kDouble ? T(6755399441055744.0) : T(12582912.0);
  static constexpr int kMantissa = kDouble ? 52 : 23;

  // not V{} + value: the sum with zero cannot be left out, as it turns −0 into 0
  static AAPE_FN V splat(T value) { return value - V{}; }
  static AAPE_FN V select(Mask mask, V a, V b) { return mask ? a : b; }
  static AAPE_FN V round(V x) { return (x + kRound) - kRound; }
  // of a multiple of a quarter
  static AAPE_FN V floor(V x) { return round(x - T(0.375)); }
  static AAPE_FN V exp2(V n) {
    Mask bits = (Mask)(n + kRound) - (Mask)splat(kRound);
    return (V)((bits << kMantissa) + (Mask)splat(T(1)));
  }
  // x = 2^exponent · result, the result from √½ to √2; for positive normal x
  static AAPE_FN V split(V x, V& exponent) {
    constexpr T least = T(0.70710678118654752440);
    const Mask bits = (Mask)x - (Mask)splat(least);
    const Mask n = bits >> kMantissa;
    exponent = (V)(n + (Mask)splat(kRound)) - kRound;
    return (V)((Mask)x - (n << kMantissa));
  }
  static AAPE_FN bool any(Mask mask) {
    typedef int64_t Half __attribute__((vector_size(16)));
    Half part[AAPE_VECTOR_BYTES / 16];
    std::memcpy(part, &mask, sizeof(mask));
    Half all = part[0];
    for (int k = 1; k < AAPE_VECTOR_BYTES / 16; ++k) all |= part[k];
    return (all[0] | all[1]) != 0;
  }
  static AAPE_FN V load(const T* from) {
    V value;
    std::memcpy(&value, from, sizeof(V));
    return value;
  }
  static AAPE_FN void store(T* to, V value) { std::memcpy(to, &value, sizeof(V)); }
};
template <>
struct Math<Simd<float>::Vector> : VectorMath<float> {};
template <>
struct Math<Simd<double>::Vector> : VectorMath<double> {};

}  // namespace AAPE_NAMESPACE
}  // namespace aape
