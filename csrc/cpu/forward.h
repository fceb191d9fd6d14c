// SBLU forward: windows are folded about their centre and evaluated by Horner's rule, states across the lanes.

#pragma once

#include "tile.h"

namespace aape {
inline namespace AAPE_NAMESPACE {

template <class T>
using Vec = typename Simd<T>::Vector;

// First frame pair of the fold, counted from the window's first frame: w±_m = u[upper + m] ± u[lower − m].
struct Fold {
  int64_t upper, lower, last;  // m = last … 0, or … 1 for an odd window, whose centre frame stands apart
  bool even;
};

AAPE_FN Fold fold(int64_t window) {
  bool even = window % 2 == 0;
  return {window / 2, even ? window / 2 - 1 : window / 2, (window - 1) / 2, even};
}

template <class T>
struct Parameters {
  Vec<T> decay, frequency;
  Vec<T> decay_slope, frequency_slope;  // d/dr, with logits
};

// A token's decays and frequencies, padded: lanes beyond S hold something harmless.
template <class T>
inline void load_parameters(T* decay, T* frequency, const SbluCall& call, const Tiling& t, int64_t b, int64_t i,
                            int64_t j) {
  auto load = [&](T* to, const View& from) {
    const char* at = from.data + (b * from.stride[0] + i * from.stride[1] + j * from.stride[2]) * size_of(from.type);
    load_row(to, at, from.type, from.stride[3], call.grid.states);
    for (int64_t s = call.grid.states; s < t.states; ++s) to[s] = T(1);
  };
  load(decay, call.decay);
  load(frequency, call.frequency);
}

template <class T, bool Slopes>
AAPE_FN Parameters<T> parameters(const T* decay, const T* frequency, const Ranges& ranges) {
  using M = Math<Vec<T>>;
  Parameters<T> p;
  p.decay = M::load(decay);
  p.frequency = M::load(frequency);
  if (ranges.logits) {
    Vec<T> share = T(1) / (T(1) + exp<Vec<T>>(-p.decay));
    p.decay = T(ranges.decay_low) * exp<Vec<T>>(share * T(ranges.decay_log_ratio));
    if (Slopes) p.decay_slope = p.decay * T(ranges.decay_log_ratio) * share * (T(1) - share);
    share = T(1) / (T(1) + exp<Vec<T>>(-p.frequency));
    p.frequency = T(ranges.band_low) + T(ranges.band_width) * share;
    if (Slopes) p.frequency_slope = T(ranges.band_width) * share * (T(1) - share);
  }
  return p;
}

// Re y and Im y of one vector of states; u points at the window's first frame, frames are `states` apart.
template <class T, bool Quadrature>
AAPE_FN Complex<Vec<T>> respond(const T* u, int64_t states, const Fold& w, const Gain<Vec<T>>& g) {
  using M = Math<Vec<T>>;
  using C = Complex<Vec<T>>;
  Vec<T> zero = {};
  C plus = {zero, zero}, minus = {zero, zero};
  for (int64_t m = w.last; m >= (w.even ? 0 : 1); --m) {
    Vec<T> upper = M::load(u + (w.upper + m) * states), lower = M::load(u + (w.lower - m) * states);
    plus = step<Vec<T>>(plus, g.z, upper + lower);
    if (Quadrature) minus = step<Vec<T>>(minus, g.z, upper - lower);
  }
  if (!w.even) {
    plus = step<Vec<T>>(plus, g.z, M::load(u + w.upper * states));
    if (Quadrature) minus = minus * g.z;
  }
  C y = g.gamma * plus;
  if (Quadrature) y.im = (g.gamma * minus).im;
  return y;
}

template <class T>
inline void store_response(const View& y, const T* re, const T* im, const Unit& unit, int64_t j, int64_t states) {
  char* to = y.data + (unit.b * y.stride[0] + unit.i * y.stride[1] + j * y.stride[2]) * size_of(y.type);
  store_row(to, re, y.type, y.stride[4], states);
  store_row(to + y.stride[3] * size_of(y.type), im, y.type, y.stride[4], states);
}

template <class T, bool Quadrature>
inline void forward(const SbluCall& call) {
  using M = Math<Vec<T>>;
  constexpr int lanes = Simd<T>::kLanes;
  const Grid& g = call.grid;
  const Tiling t = tiling<T>(g);
  const Fold w = fold(g.window);
  Buffer<T> weight(t.rows * t.states);
  pack_weight(weight.data, call.weight, g, t);
  const int threads = int(smaller(call.threads, t.units));
#pragma omp parallel num_threads(threads)
  {
    Buffer<T> x(t.rows * t.columns), u(t.columns * t.states), rows(4 * t.states);
    T *decay = rows.data, *frequency = decay + t.states, *re = frequency + t.states, *im = re + t.states;
#pragma omp for schedule(static)
    for (int64_t k = 0; k < t.units; ++k) {
      const Unit unit = unit_at(g, t, k);
      load_tile(x.data, call.x, g, t, unit);
      project(u.data, x.data, weight.data, t, unit.frames);
      for (int64_t n = 0; n < unit.count; ++n) {
        int64_t j = unit.first + n;
        load_parameters(decay, frequency, call, t, unit.b, unit.i, j);
        const T* window = u.data + n * g.stride_t * t.states;
        for (int64_t s = 0; s < t.states; s += lanes) {
          auto p = parameters<T, false>(decay + s, frequency + s, call.ranges);
          auto gains = gain<Vec<T>, false>(p.decay, p.frequency, w.even);
          auto y = respond<T, Quadrature>(window + s, t.states, w, gains);
          M::store(re + s, y.re);
          M::store(im + s, y.im);
        }
        store_response(call.y, re, im, unit, j, g.states);
      }
    }
  }
}

}  // namespace AAPE_NAMESPACE
}  // namespace aape
