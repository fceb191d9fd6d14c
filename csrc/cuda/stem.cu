// The stem's prologue: Lambda Encoder, SBLU and the operand [patch | features], a block for 64 tokens; where `warp_stem` cannot do it.
//
// The encoder's two layers are products of tiles in shared memory; the second reads back what the first wrote. The
// patches that the first one reads go into the operand on the way; the SBLU reads its rows of x again, from the cache.

#include "api.h"
#include "patches.cuh"
#include "respond.cuh"

namespace aape {
namespace cuda {

// Of a multiprocessor at the least: the encoder's sums and operands take up to 128 registers.
template <class T>
constexpr int kStemBlocks = sizeof(T) == 8 ? 1 : 2;
constexpr int kDepth = 32;           // of a product at once
constexpr int kLine = kDepth + 4;    // between two lines in shared memory: eight lines' quads are in different banks

// What a block's warps share out, 16 × 32 each: tokens × columns, which are hidden units or logits.
struct Product {
  static constexpr int kColumns = 64, kTokens = kWarps * 16 * 32 / kColumns;
  static constexpr int kLines = kTokens + kColumns;  // of shared memory
  int token, column;  // a thread's first ones
  AAPE_DEVICE Product() {
    const int warp = threadIdx.x / kLanes;
    const Cell cell;
    token = warp / (kColumns / 32) * 16 + cell.row;
    column = warp % (kColumns / 32) * 32 + cell.column;
  }
};

template <class T, class IO, class I>
struct StemParams {
  SbluParams<T, IO, I> sblu;  // decay and frequency are r; y is the operand's tail
  PatchParams<IO, I> patches;
  int hidden_units;
  I row_step;                 // elements between two rows of the operand
  I tile, bands;              // a block's tokens: `tile` neighbours of `bands` subbands
  Divisor<int32_t> by_tiles, by_tile;  // tiles of a subband, tokens of a tile
  Divisor<I> by_n_f;
  const T *w1, *b1, *w2, *b2;
  Values operand;
  T *hidden, *r;
};

// Where a block's tokens are: a patch's first pixel, and the token's row, −1 where there is none.
template <class I>
struct Places {
  I *corner, *row;
};

template <class I>
struct Band {
  I first, count, j;  // subbands b · N_f + i, and the first token
};

template <class T, class IO, class I>
AAPE_DEVICE Band<I> band_at(const StemParams<T, IO, I>& p, int unit) {
  const GridOf<I>& g = p.sblu.grid;
  const I all = g.batch * g.n_f;
  const auto [of_bands, of_tiles] = p.by_tiles(unit);
  Band<I> band;
  band.first = I(of_bands) * p.bands;
  band.count = all - band.first < p.bands ? all - band.first : p.bands;
  band.j = I(of_tiles) * p.tile;
  return band;
}

template <class T, class IO, class I>
AAPE_DEVICE void find_places(const StemParams<T, IO, I>& p, const Band<I>& band, const Places<I>& at) {
  const GridOf<I>& g = p.sblu.grid;
  for (int m = threadIdx.x; m < Product::kTokens; m += kThreads) {
    const auto [n, of_tile] = p.by_tile(m);
    const auto [b, i] = p.by_n_f(band.first + n);
    const I j = band.j + of_tile;
    const bool there = n < band.count && j < g.n_t;
    at.corner[m] = there ? corner(p.patches, b, i, j) : 0;
    at.row[m] = there ? row_of(p.patches, b, i, j) : -1;
  }
  __syncthreads();
}

// A thread's part of a product: tokens and columns 4 and 8 apart.
template <class T>
struct Sum {
  T at[4][4] = {};
};

// kLines lines of kDepth numbers in shared memory, four at once.
template <int kLines, class T, class Load>
AAPE_DEVICE void fill(T* to, Load load) {
  constexpr int kQuads = kDepth / 4, kAtOnce = kThreads / kQuads;
  static_assert(kLines % kAtOnce == 0, "every thread has as many");
  const int first = int(threadIdx.x / kQuads), q = int(threadIdx.x % kQuads) * 4;
#pragma unroll
  for (int line = first, n = 0; n < kLines / kAtOnce; ++n, line += kAtOnce) store_shared(to + line * kLine + q, load(line, q));
}

// sum += Σ_k a[token][k] b[column][k] over `depth`, in steps of kDepth; load_a(token, k) and load_b(column, k) give four.
template <class T, class A, class B>
AAPE_DEVICE void multiply(int depth, T* as, Sum<T>& sum, A load_a, B load_b) {
  using Whole = Product;
  const Whole own;
  T* const bs = as + Whole::kTokens * kLine;
  const T *a = as + own.token * kLine, *b = bs + own.column * kLine;
  for (int k = 0; k < depth; k += kDepth) {
    fill<Whole::kTokens>(as, [&](int token, int q) { return load_a(token, k + q); });
    fill<Whole::kColumns>(bs, [&](int column, int q) { return load_b(column, k + q); });
    __syncthreads();
#pragma unroll
    for (int q = 0; q < kDepth; q += 4) {
      Quad<T> left[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) left[m] = load_pack<Quad<T>>(a + 4 * m * kLine + q);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const auto right = load_pack<Quad<T>>(b + 8 * n * kLine + q);
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
          for (int e = 0; e < 4; ++e) sum.at[m][n] = fma(left[m].at[e], right.at[e], sum.at[m][n]);
      }
    }
    __syncthreads();  // before as and bs are written again
  }
}

// to[row][column] = sum + bias, rows `width` apart; a last column may be missing
template <class T, class I>
AAPE_DEVICE void store_sum(const Sum<T>& sum, const Places<I>& at, int first, int width, const T* bias, T* to) {
  const Product own;
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const I row = at.row[own.token + 4 * m];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int column = first + own.column + 8 * n;
      if (row >= 0 && column < width) to[row * width + column] = sum.at[m][n] + bias[column];
    }
  }
}

// Elements k … k + 3 of row `row` of a contiguous matrix (rows, width), zero outside.
template <class T, class I>
AAPE_DEVICE Quad<T> load_row(const T* matrix, I row, I rows, int k, int width) {
  const T* from = matrix + row * width + k;
  if (row < rows && k + 4 <= width && aligned<Quad<T>>(from)) return load_pack<Quad<T>>(from);
  Quad<T> out;
#pragma unroll
  for (int n = 0; n < 4; ++n) out.at[n] = row < rows && k + n < width ? from[n] : T(0);
  return out;
}

template <class T, class IO, class I>
AAPE_DEVICE void encode(const StemParams<T, IO, I>& p, const Places<I>& at, T* lines) {
  constexpr int kColumns = Product::kColumns;
  const int length = p.patches.length(), units = p.hidden_units, logits = 2 * int(p.sblu.grid.states);
  for (int h = 0; h < units; h += kColumns) {
    Sum<T> sum;
    const auto patch = [&](int token, int e) {
      if (at.row[token] < 0) return Quad<T>{};
      const Quad<T> value = load_patch<T>(p.patches, at.corner[token], e);
      if (h == 0 && e < length) {
        store_quad(p.operand, at.row[token] * p.row_step + e, value, length - e < 4 ? length - e : 4);
      }
      return value;
    };
    const auto weight = [&](int unit, int e) { return load_row<T, I>(p.w1, h + unit, units, e, length); };
    multiply(length, lines, sum, patch, weight);
    store_sum(sum, at, h, units, p.b1, p.hidden);
  }
  __syncthreads();  // hidden, which this block reads again
  for (int c = 0; c < logits; c += kColumns) {
    Sum<T> sum;
    const auto active = [&](int token, int h) {
      if (at.row[token] < 0) return Quad<T>{};
      Quad<T> value = load_row<T, I>(p.hidden, at.row[token], at.row[token] + 1, h, units);
#pragma unroll
      for (int k = 0; k < 4; ++k) value.at[k] *= sigmoid<T>(value.at[k]);  // SiLU
      return value;
    };
    const auto weight = [&](int column, int h) { return load_row<T, I>(p.w2, c + column, logits, h, units); };
    multiply(units, lines, sum, active, weight);
    store_sum(sum, at, c, logits, p.b2, p.r);
  }
  __syncthreads();  // r, likewise
}

template <class T, class IO, class I>
__global__ void __launch_bounds__(kThreads, kStemBlocks<T>) stem_kernel(const StemParams<T, IO, I> p) {
  AAPE_DYN_SHARED(memory);
  constexpr int kTokens = Product::kTokens;
  const Places<I> at = {reinterpret_cast<I*>(memory), reinterpret_cast<I*>(memory) + kTokens};
  const GridOf<I>& g = p.sblu.grid;
  const Band<I> band = band_at(p, int(blockIdx.x));
  find_places(p, band, at);
  encode(p, at, reinterpret_cast<T*>(at.row + kTokens));
  if (!p.sblu.planes) return;

  const Tiles<T, IO, I> m(p.sblu, memory);
  for (I n = 0; n < band.count; ++n) {
    const auto [b, i] = p.by_n_f(band.first + n);
    for (I j = band.j; j < g.n_t && j < band.j + p.tile; j += p.sblu.tile) {
      const I left = band.j + p.tile - j;
      for (I block = 0; block * kLanes < g.states; ++block) {
        const Tile<I> t = tile_from(g, left < p.sblu.tile ? left : p.sblu.tile, b, i, j, block);
        project(p.sblu, t, m);
        respond(p.sblu, t, m.u);
      }
    }
  }
}

// The strides of (B, N_f, N_t, …) in a tensor of tokens whose rows are `row` elements apart.
void by_token(const StemCall& call, int64_t row, int64_t* stride) {
  const Grid& g = call.grid;
  stride[0] = g.n_f * g.n_t * row;
  stride[1] = call.time_major ? row : g.n_t * row;
  stride[2] = call.time_major ? g.n_f * row : row;
}

// The SBLU's part of the call: r as logits, the features as the operand's tail.
SbluCall sblu_part(const StemCall& call) {
  SbluCall part;
  const Grid& g = call.grid;
  const int64_t length = g.channels * g.patch_f * g.patch_t, bytes = call.r.type == DType::kFloat64 ? 8 : 4;
  const int64_t width = call.operand.type == DType::kFloat64 ? 8 : call.operand.type == DType::kFloat32 ? 4 : 2;
  part.grid = g;
  part.ranges = call.ranges;
  part.planes = call.planes;
  part.x = call.x;
  part.weight = call.weight;
  part.decay = part.frequency = call.r;
  part.frequency.data += g.states * bytes;
  by_token(call, 2 * g.states, part.decay.stride);
  part.decay.stride[3] = 1;
  part.y = call.operand;
  part.y.data += length * width;
  by_token(call, call.operand.stride[0], part.y.stride);
  part.y.stride[3] = g.states;
  part.y.stride[4] = 1;
  return part;
}

template <class T, class IO, class I>
void launch_stem(const StemCall& call, const SbluParams<T, IO, I>& sblu, void* stream) {
  using Whole = Product;
  constexpr int kTokens = Whole::kTokens;
  StemParams<T, IO, I> p = {};
  const Grid& g = call.grid;
  p.sblu = sblu;
  p.patches = patch_params<IO, I>(g, call.x, call.time_major);
  p.hidden_units = int(call.hidden_units);
  p.row_step = I(call.operand.stride[0]);
  p.tile = I(g.n_t < kTokens ? g.n_t : kTokens);
  p.bands = I(kTokens / p.tile);
  p.by_tile = Divisor<int32_t>(p.tile);
  p.by_n_f = Divisor<I>(g.n_f);
  p.w1 = reinterpret_cast<const T*>(call.w1.data);
  p.b1 = reinterpret_cast<const T*>(call.b1.data);
  p.w2 = reinterpret_cast<const T*>(call.w2.data);
  p.b2 = reinterpret_cast<const T*>(call.b2.data);
  p.operand = {call.operand.data, call.operand.type};
  p.hidden = reinterpret_cast<T*>(call.hidden.data);
  p.r = reinterpret_cast<T*>(call.r.data);
  const int64_t bands = (g.batch * g.n_f + p.bands - 1) / p.bands, tiles = (g.n_t + p.tile - 1) / p.tile;
  p.by_tiles = Divisor<int32_t>(tiles);
  const size_t encoder = Whole::kLines * kLine * sizeof(T) + 2 * kTokens * sizeof(I);
  const size_t filters = shared_bytes(p.sblu.columns, sizeof(T));
  AAPE_LAUNCH("embed", (stem_kernel<T, IO, I>), dim3(blocks(bands * tiles, "embed")), dim3(kThreads),
              encoder > filters ? encoder : filters, stream, p);
}

void stem(const StemCall& call, void* stream) {
  const SbluCall part = sblu_part(call);
  const Grid& g = call.grid;
  const int64_t rows = g.batch * g.n_f * g.n_t, width = call.hidden_units;
  const int64_t length = g.channels * g.patch_f * g.patch_t, most = 2 * g.states > length ? 2 * g.states : length;
  const bool small = is_small(part) && rows * call.operand.stride[0] < INT32_MAX && rows * width < INT32_MAX &&
                     width * most < INT32_MAX;
  dispatch(part, small, [&](const auto& p) { launch_stem(call, p, stream); });
}

}  // namespace cuda
}  // namespace aape
