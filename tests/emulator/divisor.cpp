// csrc/cuda/divisor.cuh against division: where quotients step, for divisors and quotients of every size.

#include "emulator.h"

#include "../../csrc/cuda/divisor.cuh"

#include <cstdio>
#include <random>

namespace {

int64_t checked = 0;

bool right(const aape::cuda::Divisor<int32_t>& by, int64_t d, int64_t n) {
  if (n < 0 || n > INT32_MAX) return true;
  ++checked;
  const auto [quotient, remainder] = by(int32_t(n));
  if (quotient == n / d && remainder == n % d) return true;
  std::printf("%lld / %lld: got %d, remainder %d\n", (long long)n, (long long)d, quotient, remainder);
  return false;
}

}  // namespace

int main() {
  std::mt19937_64 random(0);
  std::vector<int64_t> divisors;
  for (int64_t d = 1; d <= 1024; ++d) divisors.push_back(d);
  for (int shift = 10; shift <= 31; ++shift)
    for (int64_t d = (int64_t(1) << shift) - 3; d <= (int64_t(1) << shift) + 3; ++d)
      if (d <= INT32_MAX) divisors.push_back(d);
  for (int k = 0; k < 4000; ++k) divisors.push_back(1 + int64_t(random() >> (33 + random() % 30)));
  for (int64_t d : divisors) {
    const aape::cuda::Divisor<int32_t> by(d);
    const int64_t last = INT32_MAX / d;
    for (int64_t q = 0; q <= 256; ++q)
      for (int64_t quotient : {q, last - q, last * q / 256})
        for (int64_t n = quotient * d - 1; n <= quotient * d + 1; ++n)
          if (!right(by, d, n)) return 1;
    for (int64_t n : {int64_t(INT32_MAX), int64_t(INT32_MAX) - 1})
      if (!right(by, d, n)) return 1;
  }
  std::printf("%lld checked\n", (long long)checked);
}
