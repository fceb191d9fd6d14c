// SBLU backward. Every output element is written by one unit, or summed in an order that follows from the shapes alone:
// the same bits on every run and any number of threads.

#pragma once

#include "forward.h"

namespace aape {
inline namespace AAPE_NAMESPACE {

// What `spread` makes: cotangents of the window's frames alone, or D beside them; kFrames has the bits of kFramesAndSlope,
// kFramesAlone takes fewer operations.
enum class Spread { kFramesAlone, kFrames, kFramesAndSlope };

// Cotangents of the folded frames, Re(conj(ḡ±) γ z^m), added to those of the window's frames `to`, or stored there; and D, of
// the window's frames u: γ′ Σ a_m − γ Σ m a_m with a_m = Σ± conj(ḡ±) u±_m z^m. The powers of z are at hand here, and no term
// waits for another, as those of P and dP/dz by Horner's rule do.
template <class T, bool Quadrature, bool kStore, Spread kMade>
AAPE_FN Complex<Vec<T>> spread(T* to, int64_t states, const Fold& w, const Gain<Vec<T>>& g, Complex<Vec<T>> plus,
                               Complex<Vec<T>> minus, const T* u = nullptr) {
  using V = Vec<T>;
  using M = Math<V>;
  constexpr bool kSlope = kMade == Spread::kFramesAndSlope, kGainFirst = kMade == Spread::kFramesAlone;
  auto add = [&](int64_t frame, V value) {
    T* at = to + frame * states;
    M::store(at, kStore ? value : M::load(at) + value);
  };
  auto cotangent = [&](Complex<V> power) {
    return kGainFirst ? power.re : fma<V>(power.re, g.gamma.re, -(power.im * g.gamma.im));
  };
  if (kGainFirst) plus = plus * g.gamma, minus = minus * g.gamma;
  const V zero = {}, one = M::splat(T(1));
  Complex<V> sum = {zero, zero}, moment = {zero, zero};
  V order = w.even ? zero : one;
  if (!w.even) {
    if (kSlope) {
      const V centre = M::load(u + w.upper * states);
      sum = {centre * plus.re, centre * plus.im};
    }
    add(w.upper, cotangent(plus));
    plus = plus * g.z;
    if (Quadrature) minus = minus * g.z;
  }
  for (int64_t m = w.even ? 0 : 1; m <= w.last; ++m) {
    if (kSlope) {
      const V upper = M::load(u + (w.upper + m) * states), lower = M::load(u + (w.lower - m) * states);
      const V even = upper + lower, odd = upper - lower;
      Complex<V> term = {even * plus.re, even * plus.im};
      if (Quadrature) term = {fma<V>(odd, minus.re, term.re), fma<V>(odd, minus.im, term.im)};
      sum = sum + term;
      moment = {fma<V>(order, term.re, moment.re), fma<V>(order, term.im, moment.im)};
      order = order + one;
    }
    const V outer = cotangent(plus), inner = Quadrature ? cotangent(minus) : zero;
    add(w.upper + m, Quadrature ? outer + inner : outer);
    add(w.lower - m, Quadrature ? outer - inner : outer);
    plus = plus * g.z;
    if (Quadrature) minus = minus * g.z;
  }
  return g.derivative * sum - g.gamma * moment;
}

// grad_weight[r][s] += Σ_t x[r][t] · grad_u[t][s]
template <class T>
inline void accumulate_weight(T* grad, const Rows<T>& x, const T* grad_u, const Grid& g, const Tiling& t, int64_t frames) {
  using M = Math<Vec<T>>;
  constexpr int lanes = Simd<T>::kLanes;
  constexpr int block = 8;  // rows at once: with fewer sums, multiply-adds wait for each other
  for (int64_t r = 0; r < t.rows; r += block) {
    int count = int(smaller(block, t.rows - r));
    const T* row[block];
    for (int k = 0; k < count; ++k) row[k] = row_at(x, g, r + k);
    for (int64_t s = 0; s < t.states; s += lanes) {
      Vec<T> sum[block] = {};
      if (count == block) {
        for (int64_t f = 0; f < frames; ++f) {
          auto value = M::load(grad_u + f * t.states + s);
          for (int k = 0; k < block; ++k) sum[k] += row[k][f] * value;
        }
      } else {
        for (int64_t f = 0; f < frames; ++f) {
          auto value = M::load(grad_u + f * t.states + s);
          for (int k = 0; k < count; ++k) sum[k] += row[k][f] * value;
        }
      }
      for (int k = 0; k < count; ++k) {
        T* at = grad + (r + k) * t.states + s;
        M::store(at, M::load(at) + sum[k]);
      }
    }
  }
}

// weight [C·P_f][states] -> [S][rows], rows padded to whole vectors with zeros
template <class T>
inline void transpose_weight(T* to, const T* weight, const Grid& g, const Tiling& t, int64_t rows) {
  fill_zero(to, g.states * rows);
  for (int64_t s = 0; s < g.states; ++s)
    for (int64_t r = 0; r < t.rows; ++r) to[s * rows + r] = weight[r * t.states + s];
}

// grad_x[r][t] += Σ_s grad_u[t][s] · weight[s][r], inside the clip only; `tile` is scratch, [columns][rows]
template <class T>
inline void accumulate_x(const View& grad_x, const T* grad_u, const T* weight, T* tile, int64_t rows, const Grid& g,
                         const Tiling& t, const Unit& unit) {
  using M = Math<Vec<T>>;
  constexpr int lanes = Simd<T>::kLanes;
  for (int64_t f = 0; f < unit.frames; f += kSums) {
    for (int64_t r = 0; r < rows; r += lanes) {
      Vec<T> sum[kSums] = {};
      for (int64_t s = 0; s < g.states; ++s) {
        auto w = M::load(weight + s * rows + r);
        for (int k = 0; k < kSums; ++k) sum[k] += grad_u[(f + k) * t.states + s] * w;
      }
      for (int k = 0; k < kSums; ++k) M::store(tile + (f + k) * rows + r, sum[k]);
    }
  }
  int64_t begin = larger(0, -unit.frame), end = smaller(unit.frames, g.frames - unit.frame);
  for (int64_t c = 0; c < g.channels; ++c) {
    for (int64_t p = 0; p < g.patch_f; ++p) {
      int64_t at = unit.b * grad_x.stride[0] + c * grad_x.stride[1] + (unit.i * g.stride_f + p) * grad_x.stride[2];
      T* row = reinterpret_cast<T*>(grad_x.data) + at + unit.frame * grad_x.stride[3];
      const T* from = tile + c * g.patch_f + p;
      for (int64_t f = begin; f < end; ++f) row[f * grad_x.stride[3]] += from[f * rows];
    }
  }
}

enum Passes : int { kParameters = 1, kWeight = 2, kInput = 4 };

// One thread's scratch, and what it does with a unit.
template <class T, bool Quadrature>
struct Worker {
  const SbluCall& call;
  const Tiling& t;
  const T* weight;
  Fold w;
  int64_t padded_rows;  // of x, to whole vectors
  Buffer<T> x, u, grad_u, rows, across, tile;
  Buffer<Filter<T>> filters;
  States<T> decays, frequencies, real, imaginary, grad_decays, grad_frequencies;

  Worker(const SbluCall& c, const Tiling& tiles, const T* packed)
      : call(c), t(tiles), weight(packed), w(fold(c.grid.window)),
        padded_rows(c.grad_x.data ? round_up(t.rows, Simd<T>::kLanes) : 0), x(t.rows * t.columns),
        u(t.columns * t.states), grad_u(t.columns * t.states), rows(6 * t.states),
        across(c.grid.states * padded_rows), tile(t.columns * padded_rows),
        filters(t.tokens * t.states / Simd<T>::kLanes),
        decays(c.decay, 3, c.grid.states, rows.data), frequencies(c.frequency, 3, c.grid.states, rows.data + t.states),
        real(c.grad_y, 4, c.grid.states, rows.data + 2 * t.states),
        imaginary(c.grad_y, 4, c.grid.states, rows.data + 3 * t.states, c.grad_y.stride[3]),
        grad_decays(c.grad_decay, 3, c.grid.states, rows.data + 4 * t.states),
        grad_frequencies(c.grad_frequency, 3, c.grid.states, rows.data + 5 * t.states) {
    if (c.grad_x.data) {
      transpose_weight(across.data, weight, c.grid, t, padded_rows);
      // the last frame block reads a few frames beyond the tile
      fill_zero(grad_u.data, t.columns * t.states);
    }
  }

  inline void run(int64_t k, int passes, T* grad_weight) {
    using M = Math<Vec<T>>;
    constexpr int lanes = Simd<T>::kLanes;
    const Grid& g = call.grid;
    const Unit unit = unit_at(g, t, k);
    const bool slopes = passes & kParameters, frames = passes & (kWeight | kInput);
    const bool store = !frames || g.stride_t >= g.window;  // no frame is in two windows, or nobody reads the sums
    Rows<T> pixels = rows_of<T>(x.data, g, t);
    const bool reads = slopes || passes & kWeight;
    const bool in_place = reads && rows_in_place(pixels, call.x, g, unit);
    if (reads && !in_place) load_tile(x.data, call.x, g, t, unit);
    if (slopes) project(u.data, pixels, weight, g, t, unit.frames, ahead_of<T>(call.x, g, t, k, in_place));
    if (!store) fill_zero(grad_u.data, unit.frames * t.states);
    find_filters<T, true>(filters.data, decays, frequencies, call.ranges, t, unit, w.even);
    const Filter<T>* filter = filters.data;
    for (int64_t n = 0; n < unit.count; ++n) {
      int64_t j = unit.first + n, at = n * g.stride_t * t.states;
      const T *re = real.load(unit, j, T(0)), *im = imaginary.load(unit, j, T(0));
      T *grad_decay = grad_decays.place(unit, j), *grad_frequency = grad_frequencies.place(unit, j);
      for (int64_t s = 0; s < t.states; s += lanes, ++filter) {
        const auto& [p, gains] = *filter;
        Vec<T> zero = {}, gr = M::load(re + s), gi = M::load(im + s);
        // conj ḡ: split by polynomial for the quadrature kernel
        Complex<Vec<T>> plus = {gr, Quadrature ? zero : -gi}, minus = {zero, -gi};
        T* window = grad_u.data + at + s;
        if (!slopes) {
          constexpr Spread made = Spread::kFrames;
          if (store) spread<T, Quadrature, true, made>(window, t.states, w, gains, plus, minus);
          else spread<T, Quadrature, false, made>(window, t.states, w, gains, plus, minus);
        } else {
          constexpr Spread made = Spread::kFramesAndSlope;
          const T* heard = u.data + at + s;
          auto d = store ? spread<T, Quadrature, true, made>(window, t.states, w, gains, plus, minus, heard)
                         : spread<T, Quadrature, false, made>(window, t.states, w, gains, plus, minus, heard);
          d.im = -d.im;
          if (call.ranges.logits) d = {d.re * p.decay_slope, d.im * p.frequency_slope};
          M::store(grad_decay + s, d.re);
          M::store(grad_frequency + s, d.im);
        }
      }
      if (slopes) {
        grad_decays.store(unit, j);
        grad_frequencies.store(unit, j);
      }
    }
    if (passes & kWeight) accumulate_weight(grad_weight, pixels, grad_u.data, g, t, unit.frames);
    if (passes & kInput) accumulate_x(call.grad_x, grad_u.data, across.data, tile.data, padded_rows, g, t, unit);
  }
};

template <class T, bool Quadrature>
inline void backward(const SbluCall& call) {
  const Grid& g = call.grid;
  const Tiling t = tiling<T>(g);
  Buffer<T> weight(t.rows * t.states);
  pack_weight(weight.data, call.weight, g, t);

  // Units of one group are summed one after the other, and groups in their order: how many there are follows from the
  // shapes, so that the sum's order does not depend on the number of threads.
  int64_t size = t.rows * t.states;
  int64_t groups = smaller(t.units, larger(8, smaller(64, (int64_t(1) << 20) / size)));
  Buffer<T> partial(call.grad_weight.data ? groups * size : 0);
  if (call.grad_weight.data) fill_zero(partial.data, groups * size);

  // Tiles whose frames or mel bins overlap may not add to grad_x at the same time: colours keep them apart.
  bool apart = g.stride_t >= g.window && g.stride_f >= g.patch_f;
  int passes = (call.grad_decay.data || call.grad_frequency.data ? kParameters : 0) |
               (call.grad_weight.data ? kWeight : 0) | (call.grad_x.data && apart ? kInput : 0);
  if (passes) {
    const int threads = int(smaller(call.threads, groups));
#pragma omp parallel num_threads(threads)
    {
      Worker<T, Quadrature> worker(call, t, weight.data);
#pragma omp for schedule(static)
      for (int64_t group = 0; group < groups; ++group) {
        int64_t end = (group + 1) * t.units / groups;
        for (int64_t k = group * t.units / groups; k < end; ++k) worker.run(k, passes, partial.data + group * size);
      }
    }
  }
  if (call.grad_weight.data) {
    for (int64_t group = 1; group < groups; ++group)
      for (int64_t k = 0; k < size; ++k) partial[k] += partial[group * size + k];
    const View& to = call.grad_weight;
    for (int64_t c = 0; c < g.channels; ++c) {
      for (int64_t p = 0; p < g.patch_f; ++p) {
        char* at = to.data + (c * to.stride[1] + p * to.stride[2]) * size_of(to.type);
        store_row(at, partial.data + (c * g.patch_f + p) * t.states, to.type, to.stride[0], g.states);
      }
    }
  }
  if (call.grad_x.data && !apart) {
    int64_t mel_colours = (g.patch_f + g.stride_f - 1) / g.stride_f;
    int64_t reach = t.tokens * g.stride_t;  // from one tile's first frame to the next one's
    int64_t time_colours = (t.frames + reach - 1) / reach;
    const int threads = int(smaller(call.threads, t.units));
#pragma omp parallel num_threads(threads)
    {
      Worker<T, Quadrature> worker(call, t, weight.data);
      for (int64_t mel = 0; mel < mel_colours; ++mel) {
        for (int64_t time = 0; time < time_colours; ++time) {
#pragma omp for schedule(static)
          for (int64_t k = 0; k < t.units; ++k) {
            if (k % t.tiles % time_colours != time || k / t.tiles % g.n_f % mel_colours != mel) continue;
            worker.run(k, kInput, nullptr);
          }
        }
      }
    }
  }
}

}  // namespace AAPE_NAMESPACE
}  // namespace aape
