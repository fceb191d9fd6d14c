// The whole stem, forward: one walk over groups of tokens, from pixels to tokens, or to the rows of an operand for a
// product that is done elsewhere.

#pragma once

#include "stem.h"

namespace aape {
inline namespace AAPE_NAMESPACE {

// Groups that take their turn at a block of the output's weights, which then is read from the second-level cache once for
// all of them.
constexpr int kGroupsATurn = 3;

template <class T, bool Quadrature>
inline void stem_forward(const EmbedCall& call) {
  constexpr int64_t line = Block<T>::kTokens;
  constexpr int lanes = Simd<T>::kLanes;
  const Grid& g = call.grid;
  const StemSizes z(call);
  const StemWeights<T> w(call);
  const int64_t depth = z.patch + z.features;
  const int64_t vectors = (z.rows + lanes - 1) / lanes;  // of tokens
  const int64_t work = z.rows * (depth * z.dim + z.patch * (z.hidden + z.states));
  const int64_t threads = threads_for(work, vectors, call.threads);
#pragma omp parallel for num_threads(int(threads)) schedule(static)
  for (int64_t share = 0; share < threads; ++share) {
    GroupTiles<T> m(z, g);
    Buffer<T> columns(kGroupsATurn * depth * line), block(lanes * line);
    const int64_t end = smaller(z.rows, (share + 1) * vectors / threads * lanes);
    for (int64_t first = share * vectors / threads * lanes; first < end; first += kGroupsATurn * line) {
      const int64_t turn = smaller(kGroupsATurn, (end - first + line - 1) / line);
      for (int64_t n = 0; n < turn; ++n) {
        const int64_t row = first + n * line;
        const Group<T> group(g, call.x, call.time_major, row, smaller(line, end - row));
        T* patches = columns.data + n * depth * line;
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
      for (int64_t d = 0; d < z.dim; d += lanes) {
        const int64_t rows = smaller(lanes, z.dim - d);
        for (int64_t n = 0; n < turn; ++n) {
          const T* patches = columns.data + n * depth * line;
          const int64_t row = first + n * line, count = smaller(line, end - row);
          const Term<T> terms[] = {{{w.proj + d * z.patch, z.patch}, patches, line, z.patch},
                                   {{w.fusion + d * z.features, z.features}, patches + z.patch * line, line, z.features}};
          product<T, true, false>(rows, int((count + lanes - 1) / lanes), block.data, line, terms, w.bias ? w.bias + d : nullptr);
          store_rows(reinterpret_cast<T*>(call.tokens.data) + row * z.dim + d, z.dim, block.data, line, rows, count);
        }
      }
    }
  }
}

}  // namespace AAPE_NAMESPACE
}  // namespace aape
