// Products of small tiles, by a microkernel that keeps its sums in registers.
//
// In most of them lanes are tokens: the right operand is a matrix [depth][tokens], and the left one, the weights, is read
// a number at a time as it lies in memory, so that nothing is packed. Sums run over the depth in its order whatever the
// tile: a token's numbers do not depend on its neighbours, nor on how tokens are shared out.

#pragma once

#include <utility>

#include "tile.h"

namespace aape {
inline namespace AAPE_NAMESPACE {

// Registers: rows × vectors of sums, one row of vectors, one broadcast.
template <class T>
struct Block {
  static constexpr int kLanes = Simd<T>::kLanes;
  static constexpr bool kWide = AAPE_VECTOR_BYTES == 64;  // 32 registers, else 16
  static constexpr int kVectors = 3;                      // of tokens
  static constexpr int kRows = kWide ? 8 : 4;
  static constexpr int kTokens = kVectors * kLanes;
  static constexpr int kPixelRows = kWide ? 2 : 3;  // beside kRows states, for sums over tokens that stay in their lanes
  // for sums over tokens, whose lanes are columns
  static constexpr int kStrip = kWide ? 12 : 6;
  static constexpr int kPanelVectors = 2;
  static constexpr int kPanel = kPanelVectors * kLanes;
  static_assert(kTokens % kStrip == 0, "groups of tokens are whole strips");
};

// Numbers of a left operand: element (row, k) at data[row · step + k] if its rows are contiguous, else data[k · step + row].
template <class T>
struct Left {
  const T* data;
  int64_t step;
};

// One term of a sum of products: left · right, right [depth][…] with lines `line` apart.
template <class T>
struct Term {
  Left<T> left;
  const T* right;
  int64_t line, depth;
};

// Rows of the left operand from `row` on.
template <class T, int kRows, int kVectors, bool kAlongDepth>
AAPE_FN void accumulate(typename Simd<T>::Vector (&sum)[kRows][kVectors], const Term<T>& term, int64_t row) {
  using M = Math<typename Simd<T>::Vector>;
  constexpr int lanes = Simd<T>::kLanes;
  const T* right = term.right;
  const int64_t step = term.left.step;
  // three rows share a pointer: they are at it, one and two steps on
  const T* left[(kRows + 2) / 3];
#pragma GCC unroll 8
  for (int g = 0; g < (kRows + 2) / 3; ++g) left[g] = term.left.data + (row + 3 * g) * (kAlongDepth ? step : 1);
  for (int64_t k = 0; k < term.depth; ++k, right += term.line) {
    typename Simd<T>::Vector line[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) line[v] = M::load(right + v * lanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const T* at = left[i / 3];
      const auto factor = M::splat(kAlongDepth ? (i % 3 == 0 ? at[0] : i % 3 == 1 ? at[step] : at[2 * step]) : at[i % 3]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[i][v] += factor * line[v];
    }
#pragma GCC unroll 8
    for (int g = 0; g < (kRows + 2) / 3; ++g) left[g] += kAlongDepth ? 1 : step;
  }
}

// out[row][token] = bias[row] + Σ terms for kRows rows from `row` on; `bias` may be null. With kAdd, out is added to. Terms are
// not copied on the way: a copy of what has just been written in pieces waits until they are in the cache, and so for
// the products before.
template <class T, int kRows, int kVectors, bool kAlongDepth, bool kAdd, int kTerms>
inline void product_block(int64_t row, T* out, int64_t line, const Term<T> (&terms)[kTerms], const T* bias) {
  using V = typename Simd<T>::Vector;
  using M = Math<V>;
  constexpr int lanes = Simd<T>::kLanes;
  V sum[kRows][kVectors];
  out += row * line;
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (kAdd) sum[i][v] = M::load(out + i * line + v * lanes);
      else sum[i][v] = bias ? M::splat(bias[row + i]) : V{};
    }
#pragma GCC unroll 2
  for (int n = 0; n < kTerms; ++n) accumulate<T, kRows, kVectors, kAlongDepth>(sum, terms[n], row);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) M::store(out + i * line + v * lanes, sum[i][v]);
}

template <class T, int kRows, bool kAlongDepth, bool kAdd, int kTerms>
inline void product_rows(int64_t row, int vectors, T* out, int64_t line, const Term<T> (&terms)[kTerms], const T* bias) {
  if (vectors == 3) product_block<T, kRows, 3, kAlongDepth, kAdd>(row, out, line, terms, bias);
  else if (vectors == 2) product_block<T, kRows, 2, kAlongDepth, kAdd>(row, out, line, terms, bias);
  else product_block<T, kRows, 1, kAlongDepth, kAdd>(row, out, line, terms, bias);
}

// The same for any number of rows.
template <class T, bool kAlongDepth, bool kAdd, int kTerms>
inline void product(int64_t rows, int vectors, T* out, int64_t line, const Term<T> (&terms)[kTerms], const T* bias) {
  constexpr int block = Block<T>::kRows;
  int64_t row = 0;
  for (; row + block <= rows; row += block) product_rows<T, block, kAlongDepth, kAdd>(row, vectors, out, line, terms, bias);
  if (block > 4 && row + 4 <= rows) {
    product_rows<T, 4, kAlongDepth, kAdd>(row, vectors, out, line, terms, bias);
    row += 4;
  }
  if (row + 2 <= rows) {
    product_rows<T, 2, kAlongDepth, kAdd>(row, vectors, out, line, terms, bias);
    row += 2;
  }
  if (row < rows) product_rows<T, 1, kAlongDepth, kAdd>(row, vectors, out, line, terms, bias);
}

// out[row][column] = (kAdd: out +) left · right for kStrip rows and kVectors vectors of columns, of which only `rows` and
// `columns` are there to be written. Lanes are columns; the left operand is [depth][row].
template <class T, int kVectors, bool kAdd>
inline void product_columns(int64_t rows, int64_t columns, T* out, int64_t line, const Term<T> (&terms)[1]) {
  constexpr int strip = Block<T>::kStrip, width = kVectors * Simd<T>::kLanes;
  if (rows >= strip && columns >= width)
    return product_block<T, strip, kVectors, false, kAdd>(0, out, line, terms, nullptr);
  alignas(64) T edge[strip * width];
  product_block<T, strip, kVectors, false, false>(0, edge, width, terms, nullptr);
  for (int64_t k = 0; k < smaller(rows, strip); ++k)
    for (int64_t n = 0; n < smaller(columns, width); ++n)
      out[k * line + n] = edge[k * width + n] + (kAdd ? out[k * line + n] : T(0));
}

// The same for a panel of up to kPanel columns.
template <class T, bool kAdd>
inline void product_panel(int64_t rows, int64_t columns, T* out, int64_t line, const Term<T> (&terms)[1]) {
  if (columns > Simd<T>::kLanes) product_columns<T, Block<T>::kPanelVectors, kAdd>(rows, columns, out, line, terms);
  else product_columns<T, 1, kAdd>(rows, columns, out, line, terms);
}

// Transposition of lanes × lanes numbers, by exchanging halves.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define AAPE_SHUFFLES 1
#endif
#endif

#ifdef AAPE_SHUFFLES
template <int kHalf, bool kUpper, class V, size_t... kLane>
AAPE_FN V exchanged(V a, V b, std::index_sequence<kLane...>) {
  constexpr int lanes = sizeof...(kLane);
  return __builtin_shufflevector(
      a, b, (int(kLane) & kHalf ? (kUpper ? int(kLane) : int(kLane) - kHalf) + lanes : int(kLane) + (kUpper ? kHalf : 0))...);
}
template <class T, int kHalf>
AAPE_FN void exchange(typename Simd<T>::Vector (&row)[Simd<T>::kLanes]) {
  constexpr auto all = std::make_index_sequence<Simd<T>::kLanes>();
#pragma GCC unroll 16
  for (int i = 0; i < Simd<T>::kLanes; ++i) {
    if (i & kHalf) continue;
    const auto a = row[i], b = row[i + kHalf];
    row[i] = exchanged<kHalf, false>(a, b, all);
    row[i + kHalf] = exchanged<kHalf, true>(a, b, all);
  }
  if constexpr (kHalf > 1) exchange<T, kHalf / 2>(row);
}
#endif

// to[j][i] = from(i)[j] for `rows` rows of a whole vector each, the others zero; to's lines `line` apart.
template <class T, class From>
AAPE_FN void transpose(T* to, int64_t line, int rows, From from) {
  using M = Math<typename Simd<T>::Vector>;
  constexpr int lanes = Simd<T>::kLanes;
  typename Simd<T>::Vector row[lanes];
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) row[i] = i < rows ? M::load(from(i)) : typename Simd<T>::Vector{};
#ifdef AAPE_SHUFFLES
  exchange<T, lanes / 2>(row);
#else
  T flat[lanes][lanes], turned[lanes][lanes];
  for (int i = 0; i < lanes; ++i) M::store(flat[i], row[i]);
  for (int i = 0; i < lanes; ++i)
    for (int j = 0; j < lanes; ++j) turned[j][i] = flat[i][j];
  for (int i = 0; i < lanes; ++i) row[i] = M::load(turned[i]);
#endif
#pragma GCC unroll 16
  for (int j = 0; j < lanes; ++j) M::store(to + j * line, row[j]);
}

// Columns to rows: to[token][row] = from[row][token] for `rows` rows and `tokens` tokens; to's rows `line` apart.
template <class T>
inline void store_rows(T* to, int64_t line, const T* from, int64_t from_line, int64_t rows, int64_t tokens) {
  constexpr int lanes = Simd<T>::kLanes;
  alignas(64) T turned[lanes * lanes];
  for (int64_t i = 0; i < rows; i += lanes) {
    const int count = int(smaller(lanes, rows - i));
    for (int64_t m = 0; m < tokens; m += lanes) {
      const T* block = from + i * from_line + m;
      const auto at = [&](int k) { return block + k * from_line; };
      if (count == lanes && tokens - m >= lanes) {
        transpose<T>(to + m * line + i, line, lanes, at);
      } else {
        transpose<T>(turned, lanes, count, at);
        for (int64_t k = 0; k < smaller(lanes, tokens - m); ++k)
          for (int n = 0; n < count; ++n) to[(m + k) * line + i + n] = turned[k * lanes + n];
      }
    }
  }
}

// Rows to columns: to[row][token] = from[token][row], zero for tokens beyond `tokens` up to whole vectors.
template <class T>
AAPE_APART void load_columns(T* to, int64_t line, const T* from, int64_t from_line, int64_t rows, int64_t tokens) {
  constexpr int lanes = Simd<T>::kLanes;
  alignas(64) T copied[lanes * lanes];
  for (int64_t m = 0; m < tokens; m += lanes) {
    const int count = int(smaller(lanes, tokens - m));
    for (int64_t i = 0; i < rows; i += lanes) {
      const T* block = from + m * from_line + i;
      if (rows - i >= lanes) {
        transpose<T>(to + i * line + m, line, count, [&](int k) { return block + k * from_line; });
        continue;
      }
      fill_zero(copied, lanes * lanes);
      for (int k = 0; k < count; ++k) std::memcpy(copied + k * lanes, block + k * from_line, (rows - i) * sizeof(T));
      for (int64_t n = 0; n < rows - i; ++n)
        for (int k = 0; k < lanes; ++k) to[(i + n) * line + m + k] = copied[k * lanes + n];
    }
  }
}

}  // namespace AAPE_NAMESPACE
}  // namespace aape
