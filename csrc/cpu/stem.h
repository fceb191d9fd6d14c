// What forward and backward of the whole stem do with a group of tokens: encoder, filters, features. Lanes are tokens, so
// that any number of states fills them, and what is summed over states or over the depth of a product is summed in order.

#pragma once

#include "../magnitudes.h"
#include "forward.h"
#include "group.h"

namespace aape {
inline namespace AAPE_NAMESPACE {

// Operations that are worth a thread's waking.
constexpr int64_t kThreadWork = int64_t(1) << 20;

inline int64_t threads_for(int64_t work, int64_t units, int64_t most) {
  return larger(1, smaller(most, smaller(units, work / kThreadWork)));
}

// Sizes that both directions need.
struct StemSizes {
  int64_t rows, projected, patch, states, hidden, features, dim, planes, window_offset;
  bool within;  // windows lie in their patches

  explicit StemSizes(const EmbedCall& call) {
    const Grid& g = call.grid;
    rows = g.batch * g.n_f * g.n_t;
    projected = g.channels * g.patch_f;
    patch = projected * g.patch_t;
    states = g.states;
    hidden = call.hidden_units;
    planes = call.planes;
    features = planes * states;
    dim = call.dim;
    window_offset = (g.patch_t - g.window) / 2;
    within = window_offset >= 0;
  }
};

template <class T>
struct StemWeights {
  const T *w1, *b1, *w2, *b2, *sblu, *proj, *bias, *fusion;
  explicit StemWeights(const EmbedCall& c)
      : w1(at(c.w1)), b1(at(c.b1)), w2(at(c.w2)), b2(at(c.b2)), sblu(at(c.sblu_w)), proj(at(c.proj_w)), bias(at(c.proj_b)),
        fusion(at(c.fusion_w)) {}
  static const T* at(const View& view) { return reinterpret_cast<const T*>(view.data); }
};

// One thread's tiles for one group. Lines are `kLine` numbers, a token each.
template <class T>
struct GroupTiles {
  static constexpr int64_t kLine = Block<T>::kTokens;
  static constexpr int64_t kBlock = Block<T>::kRows;  // states that are projected together
  Buffer<T> hidden, active, logits, window, u, y;
  Buffer<Filter<T>> filters;  // of a block of states

  explicit GroupTiles(const StemSizes& z, const Grid& g)
      : hidden(z.hidden * kLine), active(z.hidden * kLine), logits(2 * z.states * kLine),
        window(z.within ? 0 : z.projected * g.window * kLine), u(g.window * kBlock * kLine), y(2 * z.states * kLine),
        filters(kBlock * Block<T>::kVectors) {}
};

template <class T>
AAPE_FN Vec<T> sigmoid(Vec<T> x) {
  return T(1) / (T(1) + exp<Vec<T>>(-x));
}

template <class T, class Run>
AAPE_FN void each_vector(const Group<T>& group, Run run) {
  for (int v = 0; v < group.vectors; ++v) run(int64_t(v) * Simd<T>::kLanes);
}

// run(state, first token of a vector) for states from `first` to `last`. What a state goes through is one long chain of
// operations: step by step for all of them, the chains of several states overlap.
template <class T, class Run>
AAPE_FN void each_state(const Group<T>& group, int64_t first, int64_t last, Run run) {
  for (int64_t s = first; s < last; ++s) each_vector(group, [&](int64_t v) { run(s, v); });
}

// The Lambda Encoder: patches [pixel][token] -> hidden, SiLU(hidden) and logits, likewise.
template <class T>
inline void encode(const StemWeights<T>& w, const StemSizes& z, const Group<T>& group, const T* patches, GroupTiles<T>& m) {
  using M = Math<Vec<T>>;
  constexpr int64_t line = GroupTiles<T>::kLine;
  const Term<T> first[] = {{{w.w1, z.patch}, patches, line, z.patch}};
  product<T, true, false>(z.hidden, group.vectors, m.hidden.data, line, first, w.b1);
  for (int64_t h = 0; h < z.hidden; ++h)
    each_vector(group, [&](int64_t v) {
      const auto value = M::load(m.hidden.data + h * line + v);
      M::store(m.active.data + h * line + v, value * sigmoid<T>(value));
    });
  const Term<T> second[] = {{{w.w2, z.hidden}, m.active.data, line, z.hidden}};
  product<T, true, false>(2 * z.states, group.vectors, m.logits.data, line, second, w.b2);
}

// A group's windows: in its patches, or gathered into a tile of their own.
template <class T>
inline Windows<T> windows_of(const EmbedCall& call, const StemSizes& z, const Group<T>& group, T* patches, GroupTiles<T>& m) {
  constexpr int64_t line = GroupTiles<T>::kLine;
  if (z.within) return {patches + z.window_offset * line, call.grid.patch_t * line};
  gather_windows(m.window.data, call.grid, call.x, group);
  return {m.window.data, call.grid.window * line};
}

// u[frame][state − s][token] for a block of states from s on.
template <class T>
inline void project_states(const StemWeights<T>& w, const StemSizes& z, const Group<T>& group, int64_t window,
                           const Windows<T>& x, int64_t s, T* u) {
  constexpr int64_t line = GroupTiles<T>::kLine, block = GroupTiles<T>::kBlock;
  for (int64_t k = 0; k < window; ++k) {
    const Term<T> term[] = {{{w.sblu + s * z.projected, z.projected}, x.data + k * line, x.row, z.projected}};
    product<T, true, false>(smaller(block, z.states - s), group.vectors, u + k * block * line, line, term, nullptr);
  }
}

// n of levels e[state][token], in their place, and 1/σ of every token.
template <class T>
inline void standardise(const StemSizes& z, const Group<T>& group, T* e, T* inverse) {
  using M = Math<Vec<T>>;
  constexpr int64_t line = GroupTiles<T>::kLine;
  const T share = T(1) / T(z.states);
  each_vector(group, [&](int64_t v) {
    Vec<T> sum = {}, squares = {};
    for (int64_t s = 0; s < z.states; ++s) sum += M::load(e + s * line + v);
    const Vec<T> mean = sum * share;
    for (int64_t s = 0; s < z.states; ++s) {
      const Vec<T> centred = M::load(e + s * line + v) - mean;
      squares += centred * centred;
      M::store(e + s * line + v, centred);
    }
    const Vec<T> variance = squares * share + T(kVarianceFloor);
    T root[Simd<T>::kLanes];
    M::store(root, variance);
    for (T& value : root) value = T(1) / std::sqrt(value);
    const Vec<T> scale = M::load(root);
    M::store(inverse + v, scale);
    for (int64_t s = 0; s < z.states; ++s) M::store(e + s * line + v, M::load(e + s * line + v) * scale);
  });
}

// Where features go in a tile of `features` lines: planes of y, and of n, or null.
template <class T>
struct Planes {
  T *re, *im, *n;
  Planes(const StemSizes& z, T* features, T* spare_y) {
    constexpr int64_t line = GroupTiles<T>::kLine;
    T* y = z.planes == 1 ? spare_y : features;
    re = y;
    im = y + z.states * line;
    n = z.planes == 2 ? nullptr : features + (z.planes - 1) * z.states * line;
  }
};

// Filters of states from `first` to `last`, to those that at(state, first token of a vector) names.
template <class T, bool Slopes, class At>
inline void find_filters(const EmbedCall& call, const StemSizes& z, const Group<T>& group, const T* logits, int64_t first,
                         int64_t last, At at) {
  constexpr int64_t line = GroupTiles<T>::kLine;
  const bool even = call.grid.window % 2 == 0;
  each_state(group, first, last, [&](int64_t s, int64_t v) {
    const T* decay = logits + s * line + v;
    at(s, v).parameters = parameters<T, Slopes>(decay, decay + z.states * line, call.ranges);
  });
  each_state(group, first, last, [&](int64_t s, int64_t v) {
    auto& filter = at(s, v);
    filter.gain = gain<Vec<T>, Slopes>(filter.parameters.decay, filter.parameters.frequency, even);
  });
}

// n of a group's y, and 1/σ of every token.
template <class T>
inline void find_levels(const StemSizes& z, const Group<T>& group, const Planes<T>& of, T* inverse) {
  using M = Math<Vec<T>>;
  constexpr int64_t line = GroupTiles<T>::kLine;
  each_state(group, 0, z.states, [&](int64_t s, int64_t v) {
    const int64_t at = s * line + v;
    M::store(of.n + at, log_magnitude<Vec<T>>({M::load(of.re + at), M::load(of.im + at)}));
  });
  standardise(z, group, of.n, inverse);
}

// y and n of a group, from logits.
template <class T, bool Quadrature>
inline void respond_group(const EmbedCall& call, const StemWeights<T>& w, const StemSizes& z, const Group<T>& group,
                          const Windows<T>& x, GroupTiles<T>& m, T* features) {
  using M = Math<Vec<T>>;
  constexpr int64_t line = GroupTiles<T>::kLine, block = GroupTiles<T>::kBlock;
  const Fold fold_ = fold(call.grid.window);
  const Planes<T> out(z, features, m.y.data);
  for (int64_t first = 0; first < z.states; first += block) {
    const int64_t last = smaller(first + block, z.states);
    const auto filter = [&](int64_t s, int64_t v) -> Filter<T>& {
      return m.filters[(s - first) * Block<T>::kVectors + v / Simd<T>::kLanes];
    };
    project_states(w, z, group, call.grid.window, x, first, m.u.data);
    find_filters<T, false>(call, z, group, m.logits.data, first, last, filter);
    each_state(group, first, last, [&](int64_t s, int64_t v) {
      const auto y = respond<T, Quadrature>(m.u.data + (s - first) * line + v, block * line, fold_, filter(s, v).gain);
      M::store(out.re + s * line + v, y.re);
      M::store(out.im + s * line + v, y.im);
    });
  }
  alignas(64) T inverse[Block<T>::kTokens];
  if (out.n) find_levels(z, group, out, inverse);
}

// A group's columns [patch | features] as rows of the operand, in its type.
template <class T>
AAPE_APART void store_operand(const EmbedCall& call, const StemSizes& z, const Group<T>& group, const T* columns) {
  constexpr int64_t line = Block<T>::kTokens;
  const View& to = call.operand;
  const int64_t depth = z.patch + z.features;
  Buffer<T> rows(group.count * depth);
  store_rows(rows.data, depth, columns, line, depth, group.count);
  for (int64_t k = 0; k < group.count; ++k)
    store_row(to.data + (group.first + k) * to.stride[0] * size_of(to.type), rows.data + k * depth, to.type, 1, depth);
}

}  // namespace AAPE_NAMESPACE
}  // namespace aape
