// The whole stem's backward, a group of tokens at a time: what each token's gradients are, and the operands of the weights'.

#pragma once

#include "backward.h"
#include "stem.h"

namespace aape {
inline namespace AAPE_NAMESPACE {

// P± and dP±/dz, from one Horner run that carries both.
template <class T>
struct Jets {
  Complex<Vec<T>> plus, minus, plus_slope, minus_slope;
};

template <class T, bool Quadrature>
AAPE_FN Jets<T> jets(const T* u, int64_t states, const Fold& w, const Gain<Vec<T>>& g) {
  using M = Math<Vec<T>>;
  using C = Complex<Vec<T>>;
  Vec<T> zero = {};
  C plus = {zero, zero}, minus = plus, plus_slope = plus, minus_slope = plus;
  for (int64_t m = w.last; m >= (w.even ? 0 : 1); --m) {
    Vec<T> upper = M::load(u + (w.upper + m) * states), lower = M::load(u + (w.lower - m) * states);
    plus_slope = step<Vec<T>>(plus_slope, g.z, plus);
    plus = step<Vec<T>>(plus, g.z, upper + lower);
    if (Quadrature) {
      minus_slope = step<Vec<T>>(minus_slope, g.z, minus);
      minus = step<Vec<T>>(minus, g.z, upper - lower);
    }
  }
  if (!w.even) {
    plus_slope = step<Vec<T>>(plus_slope, g.z, plus);
    plus = step<Vec<T>>(plus, g.z, M::load(u + w.upper * states));
    if (Quadrature) {
      minus_slope = step<Vec<T>>(minus_slope, g.z, minus);
      minus = minus * g.z;
    }
  }
  return {plus, minus, plus_slope, minus_slope};
}

template <class T, bool Quadrature>
AAPE_FN Complex<Vec<T>> response(const Jets<T>& p, const Gain<Vec<T>>& g) {
  Complex<Vec<T>> y = g.gamma * p.plus;
  if (Quadrature) y.im = (g.gamma * p.minus).im;
  return y;
}

// D = Σ± conj(ḡ±)(γ′P± − γ z dP±/dz)
template <class T, bool Quadrature>
AAPE_FN Complex<Vec<T>> slope(const Jets<T>& p, const Gain<Vec<T>>& g, Complex<Vec<T>> conj_plus,
                              Complex<Vec<T>> conj_minus) {
  auto sum = adjoint<Vec<T>>(conj_plus, g, p.plus, p.plus_slope);
  if (Quadrature) sum = sum + adjoint<Vec<T>>(conj_minus, g, p.minus, p.minus_slope);
  return sum;
}

// What a state leaves for its adjoint, between the two times that it is visited.
template <class T>
struct Kept : Filter<T> {
  Jets<T> jets;
};

// Which gradients are wanted, and what that takes.
struct StemNeeds {
  bool x, encoder_first, encoder, sblu, product;
  bool first_layer() const { return x || encoder_first; }
  bool logits() const { return first_layer() || encoder; }
  bool adjoint() const { return logits() || sblu; }
  explicit StemNeeds(const EmbedCall& c)
      : x(c.grad_x.data), encoder_first(c.grad_w1.data || c.grad_b1.data), encoder(c.grad_w2.data || c.grad_b2.data),
        sblu(c.grad_sblu_w.data), product(c.grad_proj_w.data || c.grad_proj_b.data || c.grad_fusion_w.data) {}
};

// A matrix [token][column] of a wave as panels [token][kPanel columns] one behind the other: what is read together with a
// panel's row lies behind it, in few pages. The last panel has zeros behind the columns.
template <class T>
struct Panels {
  static constexpr int64_t kPanel = Block<T>::kPanel;
  int64_t columns, step;  // from panel to panel
  Buffer<T> numbers;

  Panels(int64_t columns, int64_t tokens)
      : columns(columns), step(tokens * kPanel), numbers(round_up(columns, kPanel) * tokens) {
    fill_zero(numbers.data, round_up(columns, kPanel) * tokens);
  }
  // from [column][token] the tokens of a group, the wave's from `first` on
  void store(const T* from, int64_t first, int64_t tokens) {
    constexpr int64_t line = Block<T>::kTokens;
    T* to = numbers.data + first * kPanel;
    for (int64_t c = 0; c < columns; c += kPanel, to += step)
      store_rows(to, kPanel, from + c * line, line, smaller(kPanel, columns - c), tokens);
  }
};

// What the first phase leaves for the second: rows are the wave's tokens.
template <class T>
struct Wave {
  int64_t sblu_size, pixel_line;
  Panels<T> patches, features, active;
  Buffer<T> logits, hidden, sblu, pixels;

  Wave(const StemSizes& z, const StemNeeds& need, const Grid& g, int64_t tokens)
      : sblu_size(z.states * z.projected * Simd<T>::kLanes), pixel_line(z.within ? z.patch : z.patch + z.projected * g.window),
        patches(z.patch, tokens), features(z.features, tokens), active(z.hidden, tokens), logits(tokens * 2 * z.states),
        hidden(tokens * z.hidden), sblu(need.sblu ? tokens / Block<T>::kTokens * sblu_size : 0),
        pixels(need.x ? tokens * pixel_line : 0) {}
};

// One thread's tiles.
template <class T>
struct BackwardTiles : GroupTiles<T> {
  using GroupTiles<T>::kLine;
  Buffer<T> columns, converted, grad, grad_features, grad_logits, grad_hidden, pixels;
  Buffer<Kept<T>> kept;

  BackwardTiles(const StemSizes& z, const StemNeeds& need, const Grid& g)
      : GroupTiles<T>(z, g), columns((z.patch + z.features) * kLine), converted(larger(z.dim, z.features) * kLine),
        grad(z.dim * kLine), grad_features(z.features * kLine),
        grad_logits(2 * z.states * kLine), grad_hidden(z.hidden * kLine),
        pixels(need.x ? (z.within ? z.patch : z.patch + z.projected * g.window) * kLine : 0),
        kept(z.states * Block<T>::kVectors) {}
};

// The features' cotangent [plane, state][token], zero for lanes that are no tokens.
template <class T>
AAPE_APART void load_cotangent(const EmbedCall& call, const StemWeights<T>& w, const StemSizes& z, const Group<T>& group,
                           BackwardTiles<T>& m) {
  constexpr int64_t line = Block<T>::kTokens;
  // columns [number][token] from rows of any type
  const auto load = [&](T* to, const View& from, int64_t numbers) {
    const char* rows = from.data + group.first * from.stride[0] * size_of(from.type);
    if (from.type == kTypeOf<T>)
      return load_columns(to, line, reinterpret_cast<const T*>(rows), from.stride[0], numbers, group.count);
    for (int64_t k = 0; k < group.count; ++k)
      load_row(m.converted.data + k * numbers, rows + k * from.stride[0] * size_of(from.type), from.type, 1, numbers);
    load_columns(to, line, m.converted.data, numbers, numbers, group.count);
  };
  if (call.grad.data) {
    load(m.grad.data, call.grad, z.dim);
    const Term<T> terms[] = {{{w.fusion, z.features}, m.grad.data, line, z.dim}};
    product<T, false, false>(z.features, group.vectors, m.grad_features.data, line, terms, nullptr);
    return;
  }
  load(m.grad_features.data, call.grad_features, z.features);
}

// From the features' cotangent to that of y, [Re y, Im y][state][token] in m.y's place or that of the features themselves.
template <class T>
inline Complex<T*> cotangent_of_y(const StemSizes& z, const Group<T>& group, const Planes<T>& out, const T* inverse,
                                  BackwardTiles<T>& m) {
  using M = Math<Vec<T>>;
  constexpr int64_t line = Block<T>::kTokens;
  T* grad = m.grad_features.data;
  if (z.planes == 2) return {grad, grad + z.states * line};
  const T* grad_n = grad + (z.planes - 1) * z.states * line;
  const T share = T(1) / T(z.states);
  Complex<T*> to = z.planes == 3 ? Complex<T*>{grad, grad + z.states * line}
                                 : Complex<T*>{m.y.data, m.y.data + z.states * line};
  each_vector(group, [&](int64_t v) {
    Vec<T> sum = {}, along = {};
    for (int64_t s = 0; s < z.states; ++s) {
      const auto g = M::load(grad_n + s * line + v);
      sum += g;
      along += g * M::load(out.n + s * line + v);
    }
    sum *= share;
    along *= share;
    const auto scale = M::load(inverse + v);
    for (int64_t s = 0; s < z.states; ++s) {
      const int64_t at = s * line + v;
      const auto grad_e = (M::load(grad_n + at) - sum - M::load(out.n + at) * along) * scale;
      const auto slope = log_magnitude_slope<Vec<T>>({M::load(out.re + at), M::load(out.im + at)});
      auto re = grad_e * slope.re, im = grad_e * slope.im;
      if (z.planes == 3) re += M::load(to.re + at), im += M::load(to.im + at);
      M::store(to.re + at, re);
      M::store(to.im + at, im);
    }
  });
  return to;
}

// grad[s][r][lane] = Σ_frames gu[frame][s][token] · x[r][frame][token] over the tokens of a lane, for a block of states.
template <class T>
AAPE_APART void sblu_gradient(const StemSizes& z, const Group<T>& group, int64_t window, const Windows<T>& x, const T* gu,
                          int64_t states, T* grad) {
  using M = Math<Vec<T>>;
  constexpr int64_t line = Block<T>::kTokens;
  constexpr int lanes = Simd<T>::kLanes, block = Block<T>::kRows, rows = Block<T>::kPixelRows;
  for (int64_t r = 0; r < z.projected; r += rows) {
    const int count = int(smaller(rows, z.projected - r));
    const T* from[rows];
    for (int k = 0; k < rows; ++k) from[k] = x.data + (r + smaller(k, count - 1)) * x.row;
    Vec<T> sum[block][rows] = {};
    for (int64_t f = 0; f < window; ++f)
      each_vector(group, [&](int64_t v) {
        Vec<T> pixel[rows];
#pragma GCC unroll 4
        for (int k = 0; k < rows; ++k) pixel[k] = M::load(from[k] + f * line + v);
#pragma GCC unroll 8
        for (int s = 0; s < block; ++s) {
          const auto g = M::load(gu + (f * block + s) * line + v);
#pragma GCC unroll 4
          for (int k = 0; k < rows; ++k) sum[s][k] += g * pixel[k];
        }
      });
    for (int s = 0; s < states; ++s)
      for (int k = 0; k < count; ++k) M::store(grad + (s * z.projected + r + k) * lanes, sum[s][k]);
  }
}

// Both kinds of pixels' gradients: [patch][token], and behind them those of windows that reach out of it.
template <class T>
inline void pixel_gradients(const StemWeights<T>& w, const StemSizes& z, const Group<T>& group, const EmbedCall& call,
                            BackwardTiles<T>& m) {
  constexpr int64_t line = Block<T>::kTokens;
  const Term<T> hidden[] = {{{w.w1, z.patch}, m.grad_hidden.data, line, z.hidden}};
  product<T, false, false>(z.patch, group.vectors, m.pixels.data, line, hidden, nullptr);
  if (call.grad.data) {
    const Term<T> product_[] = {{{w.proj, z.patch}, m.grad.data, line, z.dim}};
    product<T, false, true>(z.patch, group.vectors, m.pixels.data, line, product_, nullptr);
  }
}

// The first phase for one group.
template <class T, bool Quadrature>
inline void group_backward(const EmbedCall& call, const StemWeights<T>& w, const StemSizes& z, const StemNeeds& need,
                           const Group<T>& group, int64_t at, BackwardTiles<T>& m, Wave<T>& wave) {
  using M = Math<Vec<T>>;
  constexpr int64_t line = Block<T>::kTokens, block = GroupTiles<T>::kBlock;
  const Grid& g = call.grid;
  T *patches = m.columns.data, *features = patches + z.patch * line;
  gather_patches(patches, g, call.x, group);
  load_columns(m.logits.data, line, reinterpret_cast<const T*>(call.r.data) + group.first * 2 * z.states, 2 * z.states,
               2 * z.states, group.count);
  const Windows<T> x = windows_of(call, z, group, patches, m);
  if (!need.adjoint()) {
    respond_group<T, Quadrature>(call, w, z, group, x, m, features);
  } else {
    load_cotangent(call, w, z, group, m);
    const Fold fold_ = fold(g.window);
    const Planes<T> out(z, features, m.y.data);
    const auto kept = [&](int64_t s, int64_t v) -> Kept<T>& { return m.kept[s * Block<T>::kVectors + v / Simd<T>::kLanes]; };
    find_filters<T, true>(call, z, group, m.logits.data, 0, z.states, kept);
    for (int64_t first = 0; first < z.states; first += block) {
      project_states(w, z, group, g.window, x, first, m.u.data);
      each_state(group, first, smaller(first + block, z.states), [&](int64_t s, int64_t v) {
        Kept<T>& state = kept(s, v);
        state.jets = jets<T, Quadrature>(m.u.data + (s - first) * line + v, block * line, fold_, state.gain);
        const auto y = response<T, Quadrature>(state.jets, state.gain);
        M::store(out.re + s * line + v, y.re);
        M::store(out.im + s * line + v, y.im);
      });
    }
    alignas(64) T inverse[Block<T>::kTokens];
    if (out.n) find_levels(z, group, out, inverse);
    const Complex<T*> grad = cotangent_of_y(z, group, out, inverse, m);

    // the windows' pixels are added to where there are any
    T* window_pixels = need.x ? m.pixels.data + (z.within ? z.window_offset * line : z.patch * line) : nullptr;
    const int64_t pixel_row = (z.within ? g.patch_t : g.window) * line;
    // gradients of the logits first: the encoder's come before the windows' pixels, which are added to its
    each_state(group, 0, z.states, [&](int64_t s, int64_t v) {
      const Kept<T>& state = kept(s, v);
      const Vec<T> zero = {}, re = M::load(grad.re + s * line + v), im = M::load(grad.im + s * line + v);
      const auto d = slope<T, Quadrature>(state.jets, state.gain, {re, Quadrature ? zero : -im}, {zero, -im});
      M::store(m.grad_logits.data + s * line + v, d.re * state.parameters.decay_slope);
      M::store(m.grad_logits.data + (z.states + s) * line + v, -d.im * state.parameters.frequency_slope);
    });
    if (need.logits()) {
      load_columns(m.hidden.data, line, reinterpret_cast<const T*>(call.hidden.data) + group.first * z.hidden, z.hidden,
                   z.hidden, group.count);
      const Term<T> second[] = {{{w.w2, z.hidden}, m.grad_logits.data, line, 2 * z.states}};
      product<T, false, false>(z.hidden, group.vectors, m.grad_hidden.data, line, second, nullptr);
      for (int64_t h = 0; h < z.hidden; ++h)
        each_vector(group, [&](int64_t v) {
          const int64_t to = h * line + v;
          const auto value = M::load(m.hidden.data + to), share = sigmoid<T>(value);
          M::store(m.active.data + to, value * share);
          M::store(m.grad_hidden.data + to, M::load(m.grad_hidden.data + to) * share * (T(1) + value * (T(1) - share)));
        });
      store_rows(wave.logits.data + at * 2 * z.states, 2 * z.states, m.grad_logits.data, line, 2 * z.states, group.count);
      store_rows(wave.hidden.data + at * z.hidden, z.hidden, m.grad_hidden.data, line, z.hidden, group.count);
      wave.active.store(m.active.data, at, group.count);
    }
    if (need.x) {
      pixel_gradients(w, z, group, call, m);
      if (!z.within) fill_zero(m.pixels.data + z.patch * line, z.projected * g.window * line);
    }
    if (need.sblu || need.x) {
      T* sblu = need.sblu ? wave.sblu.data + at / line * wave.sblu_size : nullptr;
      for (int64_t first = 0; first < z.states; first += block) {
        const int64_t states = smaller(block, z.states - first);
        if (states < block) fill_zero(m.u.data, g.window * block * line);
        each_state(group, first, first + states, [&](int64_t s, int64_t v) {
          const Vec<T> zero = {}, re = M::load(grad.re + s * line + v), im = M::load(grad.im + s * line + v);
          spread<T, Quadrature, true, Spread::kFramesAlone>(m.u.data + (s - first) * line + v, block * line, fold_,
                                                            kept(s, v).gain, {re, Quadrature ? zero : -im}, {zero, -im});
        });
        if (sblu) sblu_gradient(z, group, g.window, x, m.u.data, states, sblu + first * z.projected * Simd<T>::kLanes);
        for (int64_t k = 0; need.x && k < g.window; ++k) {
          const Term<T> term[] = {{{w.sblu + first * z.projected, z.projected}, m.u.data + k * block * line, line, states}};
          product<T, false, true>(z.projected, group.vectors, window_pixels + k * line, pixel_row, term, nullptr);
        }
      }
    }
    if (need.x)
      store_rows(wave.pixels.data + at * wave.pixel_line, wave.pixel_line, m.pixels.data, line, wave.pixel_line, group.count);
  }
  if (need.product || need.encoder_first) wave.patches.store(patches, at, group.count);
  if (need.product) wave.features.store(features, at, group.count);
  if (call.operand.data) store_operand(call, z, group, m.columns.data);
}

}  // namespace AAPE_NAMESPACE
}  // namespace aape
