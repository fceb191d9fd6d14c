// Division by a number that a launch fixes. GPUs have no instruction for it: for one that the compiler does not know it
// makes twenty.

#pragma once

#include "device.h"

namespace aape {
namespace cuda {

template <class I>
struct Quotient {
  I quotient, remainder;
};

// n / d and n % d for n from 0 on and d from 1 on.
template <class I>
struct Divisor {
  I divisor = 1;

  Divisor() = default;
  explicit Divisor(int64_t d) : divisor(I(d)) {}
  AAPE_DEVICE Quotient<I> operator()(I n) const { return {n / divisor, n % divisor}; }
};

// The same for n below 2³¹, by a multiplication: with l = ⌈log₂ d⌉ and f = ⌈2^(31 + l)/d⌉, which is below 2³², n/d is
// n · f / 2^(31 + l) rounded down, as that exceeds n/d by less than n/2^(31 + l) · (d − 1)/d < 1/d.
template <>
struct Divisor<int32_t> {
  int32_t divisor = 1;
  uint32_t factor = uint32_t(1) << 31;
  int32_t shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t d) : divisor(int32_t(d)) {
    while ((int64_t(1) << shift) < d) ++shift;
    factor = uint32_t(((uint64_t(1) << (31 + shift)) + uint64_t(d) - 1) / uint64_t(d));
  }
  AAPE_DEVICE Quotient<int32_t> operator()(int32_t n) const {
    const int32_t quotient = int32_t(__umulhi(uint32_t(n) << 1, factor) >> shift);
    return {quotient, n - quotient * divisor};
  }
};

}  // namespace cuda
}  // namespace aape
