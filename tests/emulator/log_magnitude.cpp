// csrc/magnitudes.h against the logarithm of long double: the worst error in units of the last place, float's and double's.

#include "emulator.h"

#include "../../csrc/cuda/device.h"
#include "../../csrc/magnitudes.h"

#include <cstdio>
#include <random>

namespace {

template <class T>
double worst() {
  std::mt19937_64 random(0);
  std::uniform_real_distribution<double> turn(0, 6.283185307179586), wide(-8, 8), near(-2, 1);
  double found = 0;
  for (int k = 0; k < 2000000; ++k) {
    const double size = std::pow(10, k % 2 ? wide(random) : near(random)), angle = turn(random);
    const aape::Complex<T> y = {T(size * std::cos(angle)), T(size * std::sin(angle))};
    const long double q = ((long double)(y.re) * y.re + (long double)(y.im) * y.im) * 100;
    const long double want = log1pl(q) / 2;
    const T rounded = T(want), place = std::nextafter(rounded, T(INFINITY)) - rounded;
    found = std::max(found, double(fabsl(aape::log_magnitude<T>(y) - want) / place));
  }
  return found;
}

}  // namespace

int main() { std::printf("%g %g\n", worst<float>(), worst<double>()); }
