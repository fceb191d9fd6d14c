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

// What a vector of states is filtered by.
template <class T>
struct Filter {
  Parameters<T> parameters;
  Gain<Vec<T>> gain;
};

// A token's states in a tensor whose axis `axis` they are: worked on in place if they are whole vectors of T there, else by
// way of `spare`, which has room for whole vectors.
template <class T>
struct States {
  View view;
  int64_t stride, count, offset;
  T* spare;
  bool in_place;

  States(const View& of, int axis, int64_t states, T* buffer, int64_t first = 0)
      : view(of), stride(of.stride[axis]), count(states), offset(first), spare(buffer),
        in_place(of.data && of.type == kTypeOf<T> && stride == 1 && states % Simd<T>::kLanes == 0) {}

  char* at(const Unit& unit, int64_t j) const {
    const int64_t elements = offset + unit.b * view.stride[0] + unit.i * view.stride[1] + j * view.stride[2];
    return view.data + elements * size_of(view.type);
  }
  // Lanes beyond the states hold `beyond`.
  AAPE_FN const T* load(const Unit& unit, int64_t j, T beyond) const {
    if (in_place) return reinterpret_cast<const T*>(at(unit, j));
    load_row(spare, at(unit, j), view.type, stride, count);
    for (int64_t s = count; s % Simd<T>::kLanes; ++s) spare[s] = beyond;
    return spare;
  }
  // Where to write them before `store`, which does nothing for a tensor that is not there.
  AAPE_FN T* place(const Unit& unit, int64_t j) const { return in_place ? reinterpret_cast<T*>(at(unit, j)) : spare; }
  AAPE_FN void store(const Unit& unit, int64_t j) const {
    if (!in_place && view.data) store_row(at(unit, j), spare, view.type, stride, count);
  }
};

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

// The filters of a tile's tokens, for all of them first: each is a long chain of operations, and they overlap.
template <class T, bool Slopes>
AAPE_FN void find_filters(Filter<T>* filter, const States<T>& decays, const States<T>& frequencies, const Ranges& ranges,
                          const Tiling& t, const Unit& unit, bool even) {
  for (int64_t j = unit.first; j < unit.first + unit.count; ++j) {
    const T *decay = decays.load(unit, j, T(1)), *frequency = frequencies.load(unit, j, T(1));
    for (int64_t s = 0; s < t.states; s += Simd<T>::kLanes, ++filter) {
      filter->parameters = parameters<T, Slopes>(decay + s, frequency + s, ranges);
      filter->gain = gain<Vec<T>, Slopes>(filter->parameters.decay, filter->parameters.frequency, even);
    }
  }
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
    Buffer<Filter<T>> filters(t.tokens * t.states / lanes);
    const States<T> decays(call.decay, 3, g.states, rows.data), frequencies(call.frequency, 3, g.states, rows.data + t.states);
    const States<T> real(call.y, 4, g.states, rows.data + 2 * t.states);
    const States<T> imaginary(call.y, 4, g.states, rows.data + 3 * t.states, call.y.stride[3]);
#pragma omp for schedule(static)
    for (int64_t k = 0; k < t.units; ++k) {
      const Unit unit = unit_at(g, t, k);
      Rows<T> pixels = rows_of(x.data, g, t);
      const bool in_place = rows_in_place(pixels, call.x, g, unit);
      if (!in_place) load_tile(x.data, call.x, g, t, unit);
      project(u.data, pixels, weight.data, g, t, unit.frames, ahead_of<T>(call.x, g, t, k, in_place));
      find_filters<T, false>(filters.data, decays, frequencies, call.ranges, t, unit, w.even);
      const Filter<T>* filter = filters.data;
      for (int64_t n = 0; n < unit.count; ++n) {
        const int64_t j = unit.first + n;
        T *re = real.place(unit, j), *im = imaginary.place(unit, j);
        const T* window = u.data + n * g.stride_t * t.states;
        for (int64_t s = 0; s < t.states; s += lanes, ++filter) {
          const auto y = respond<T, Quadrature>(window + s, t.states, w, filter->gain);
          M::store(re + s, y.re);
          M::store(im + s, y.im);
        }
        real.store(unit, j);
        imaginary.store(unit, j);
      }
    }
  }
}

}  // namespace AAPE_NAMESPACE
}  // namespace aape
