// The whole stem, forward: one walk over groups of tokens, from pixels to tokens, or to the rows of an operand for a
// product that is done elsewhere.

#pragma once

#include "processor.h"
#include "stem.h"

namespace aape {
inline namespace AAPE_NAMESPACE {

// Groups that take their turn at a block of the output's weights, which then is read once for all of them. The fewer, the
// fewer rows of tokens are written at a time, and the processor asks for their next lines by itself: that is worth more
// where a large cache holds the weights.
inline int64_t groups_a_turn() { return has_large_second_cache() ? 2 : 6; }

// The output's bias and weights as panels [1 + patch + features][kPanel columns], for tokens whose operand begins with a
// one: tokens then come out as rows. Either the weights or the tokens have to be transposed: the weights where tokens are
// twice as many as the operand's columns.
template <class T>
struct OutputPanels {
  static constexpr int64_t kPanel = Block<T>::kPanel;
  int64_t depth, dim, count;
  Buffer<T> numbers;

  OutputPanels(const StemSizes& z, bool wanted)
      : depth(1 + z.patch + z.features), dim(z.dim), count(wanted && z.rows >= 2 * depth ? (z.dim + kPanel - 1) / kPanel : 0),
        numbers(count * depth * kPanel) {}

  // a panel at a time, by any thread
  void pack(const StemWeights<T>& w, const StemSizes& z, int64_t panel) {
    const int64_t first = panel * kPanel, columns = smaller(kPanel, dim - first);
    T* to = numbers.data + panel * depth * kPanel;
    if (columns < kPanel) fill_zero(to, depth * kPanel);
    for (int64_t k = 0; k < columns; ++k) to[k] = w.bias ? w.bias[first + k] : T(0);
    load_columns(to + kPanel, kPanel, w.proj + first * z.patch, z.patch, z.patch, columns);
    load_columns(to + (1 + z.patch) * kPanel, kPanel, w.fusion + first * z.features, z.features, z.features, columns);
  }

  // rows of `tokens` from groups of operands, [group][depth][token]
  void multiply(const T* operands, int64_t rows, T* tokens) const {
    constexpr int64_t line = Block<T>::kTokens, strip = Block<T>::kStrip;
    for (int64_t panel = 0; panel < count; ++panel) {
      const int64_t column = panel * kPanel;
      const T* weights = numbers.data + column * depth;
      for (int64_t row = 0; row < rows; row += strip) {
        const Term<T> term[] = {{{operands + row / line * line * depth + row % line, line}, weights, kPanel, depth}};
        product_panel<T, false>(rows - row, dim - column, tokens + row * dim + column, dim, term);
      }
    }
  }
};

// The same with the weights as they lie, a block of columns at a time, which then is transposed.
template <class T>
inline void multiply_few(const StemWeights<T>& w, const StemSizes& z, const T* operands, int64_t rows, T* tokens) {
  constexpr int64_t line = Block<T>::kTokens;
  constexpr int lanes = Simd<T>::kLanes;
  alignas(64) T block[lanes * line];
  for (int64_t d = 0; d < z.dim; d += lanes) {
    const int64_t columns = smaller(lanes, z.dim - d);
    for (int64_t row = 0; row < rows; row += line) {
      const T* patches = operands + row * (1 + z.patch + z.features) + line;
      const int64_t count = smaller(line, rows - row);
      const Term<T> terms[] = {{{w.proj + d * z.patch, z.patch}, patches, line, z.patch},
                               {{w.fusion + d * z.features, z.features}, patches + z.patch * line, line, z.features}};
      product<T, true, false>(columns, int((count + lanes - 1) / lanes), block, line, terms, w.bias ? w.bias + d : nullptr);
      store_rows(tokens + row * z.dim + d, z.dim, block, line, columns, count);
    }
  }
}

template <class T, bool Quadrature>
inline void stem_forward(const EmbedCall& call) {
  constexpr int64_t line = Block<T>::kTokens;
  constexpr int lanes = Simd<T>::kLanes;
  const Grid& g = call.grid;
  const StemSizes z(call);
  const StemWeights<T> w(call);
  const int64_t depth = 1 + z.patch + z.features;  // of the operand [1 | patch | features]
  const int64_t vectors = (z.rows + lanes - 1) / lanes;  // of tokens
  const int64_t work = z.rows * (depth * z.dim + z.patch * (z.hidden + z.states));
  const int64_t threads = threads_for(work, vectors, call.threads), most = groups_a_turn();
  OutputPanels<T> panels(z, call.tokens.data);
#pragma omp parallel num_threads(int(threads))
  {
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < panels.count; ++panel) panels.pack(w, z, panel);
#pragma omp for schedule(static)
    for (int64_t share = 0; share < threads; ++share) {
      GroupTiles<T> m(z, g);
      Buffer<T> columns(most * depth * line);
      for (int64_t n = 0; n < most; ++n)
        for (int64_t k = 0; k < line; ++k) columns[n * depth * line + k] = T(1);
      const int64_t end = smaller(z.rows, (share + 1) * vectors / threads * lanes);
      for (int64_t first = share * vectors / threads * lanes; first < end; first += most * line) {
        const int64_t turn = smaller(most, (end - first + line - 1) / line);
        for (int64_t n = 0; n < turn; ++n) {
          const int64_t row = first + n * line;
          const Group<T> group(g, call.x, call.time_major, row, smaller(line, end - row));
          T* patches = columns.data + (n * depth + 1) * line;
          gather_patches(patches, g, call.x, group);
          encode(w, z, group, patches, m);
          store_rows(reinterpret_cast<T*>(call.hidden.data) + row * z.hidden, z.hidden, m.hidden.data, line, z.hidden, group.count);
          store_rows(reinterpret_cast<T*>(call.r.data) + row * 2 * z.states, 2 * z.states, m.logits.data, line, 2 * z.states,
                     group.count);
          const Windows<T> x = windows_of(call, z, group, patches, m);
          respond_group<T, Quadrature>(call, w, z, group, x, m, patches + z.patch * line);
          if (call.operand.data) store_operand(call, z, group, patches);
        }
        if (!call.tokens.data) continue;
        T* tokens = reinterpret_cast<T*>(call.tokens.data) + first * z.dim;
        if (panels.count) panels.multiply(columns.data, smaller(turn * line, end - first), tokens);
        else multiply_few(w, z, columns.data, smaller(turn * line, end - first), tokens);
      }
    }
  }
}

}  // namespace AAPE_NAMESPACE
}  // namespace aape
