// What SBLU's kernels share: a block's tile of tokens, its rows of x in shared memory, and their projection.
//
// A block has kWarps warps and works on `tile` neighbouring tokens of one subband (b, i) and on 32 states, one a lane. The
// frames under its windows are projected once and kept in shared memory, u[frame][state]: where lanes are states, accesses to
// it are free of bank conflicts.
//
// These kernels do what those on tensor cores (`warp_sblu.cuh`) do not: double and float16, odd windows, patches too large for
// a warp.

#pragma once

#include "divisor.cuh"
#include "warp.cuh"

namespace aape {
namespace cuda {

// Blocks of a multiprocessor at the least: 80 registers a thread, or 255 for double's; nothing spills.
template <class T>
constexpr int kBlocks = sizeof(T) == 8 ? 1 : 3;
constexpr int kRowBlock = 16;  // rows of x in shared memory at once
constexpr int kFramePad = 8;   // frames are padded to a multiple of the longest pack

// From one row's states to the next's, eight rows' quads being in different banks.
constexpr int kPitch = kLanes + 4;

// With logits, decay and frequency hold the Lambda Encoder's r, squashed here into the ranges.
template <class T>
struct Squash {
  bool logits;
  T decay_low, decay_log_ratio, band_low, band_width;
};

template <class T>
Squash<T> squash_of(const Ranges& ranges) {
  return {ranges.logits, T(ranges.decay_low), T(ranges.decay_log_ratio), T(ranges.band_low), T(ranges.band_width)};
}

// Pointers, sizes and element strides of one call. decay and frequency (B, N_f, N_t, S) of one set of strides; weight
// (S, C·P_f) contiguous, in the arithmetic's type T. IO is x's type, or AnyFloat.
template <class T, class IO, class I>
struct SbluParams {
  GridOf<I> grid;
  Squash<T> squash;
  I tile;        // tokens of a block
  int columns;   // frames under them, padded
  Divisor<int32_t> by_tiles, by_n_f, by_patch_f;  // tiles of a subband
  const void* x;
  DType x_type;
  I x_stride[4];
  const T* decay;
  const T* frequency;
  I state_stride[4];
  const T* weight;
  int planes;  // of y and grad
  Values y;
  I y_stride[5];
  Values grad;  // the cotangent of y
  I grad_stride[5];
  // forward, where y are the stem's features and grad theirs
  T* grad_y;
  I grad_y_stride[5];
  // backward
  T* grad_decay;  // and of the frequency, of one set of strides
  T* grad_frequency;
  I grad_state_stride[4];
  T* partial;  // (programs, S, C·P_f)
  int run;     // tiles of a program
  int rounds;  // windows over one frame, at the most
  T* windows;  // (B · N_f · tiles, C·P_f, columns)

  // Between two rows of x in shared memory: four rows that are neighbours begin in different banks.
  AAPE_DEVICE int pitch() const { return columns + 4; }
};

// Tokens whose windows a block projects together: as many as span about this many frames. All paths of a call have the same
// tile, as the order of its sums is that of the tiles.
constexpr int64_t kTileFrames = 128;

inline int64_t tile_of(const Grid& g, int64_t bytes) {
  const int64_t budget = kTileFrames * 4 / bytes;
  // windows with gaps between them share nothing, and their gaps would be projected for nothing
  const int64_t more = g.stride_t > g.window || budget < g.window ? 0 : (budget - g.window) / g.stride_t;
  return more + 1 < g.n_t ? more + 1 : g.n_t;
}

// Of a subband.
inline int64_t tiles_of(const Grid& g, int64_t tile) { return (g.n_t + tile - 1) / tile; }

inline int columns_of(const Grid& g, int64_t tile) {
  const int64_t frames = (tile - 1) * g.stride_t + g.window;
  if (frames > INT32_MAX - kFramePad) {
    throw std::runtime_error("window: expected fewer than 2^31 frames, got " + std::to_string(g.window));
  }
  return int((frames + kFramePad - 1) / kFramePad * kFramePad);
}

template <class I>
void copy_strides(I* to, const View& view, int axes) {
  for (int axis = 0; axis < axes; ++axis) to[axis] = I(view.stride[axis]);
}

template <class T, class IO, class I>
SbluParams<T, IO, I> params(const SbluCall& call) {
  SbluParams<T, IO, I> p = {};
  p.grid = narrowed<I>(call.grid);
  p.squash = squash_of<T>(call.ranges);
  const int64_t tile = tile_of(call.grid, sizeof(T));
  p.tile = I(tile);
  p.columns = columns_of(call.grid, tile);
  p.by_tiles = Divisor<int32_t>(tiles_of(call.grid, tile));
  p.by_n_f = Divisor<int32_t>(call.grid.n_f);
  p.by_patch_f = Divisor<int32_t>(call.grid.patch_f);
  p.rounds = int((call.grid.window + call.grid.stride_t - 1) / call.grid.stride_t);
  p.x = call.x.data;
  p.x_type = call.x.type;
  p.decay = reinterpret_cast<const T*>(call.decay.data);
  p.frequency = reinterpret_cast<const T*>(call.frequency.data);
  p.weight = reinterpret_cast<const T*>(call.weight.data);
  // in the backward the cotangent of y is given, in the forward it may be asked for
  const bool features = call.grad_features.data;
  const View& grad = features ? call.grad_features : call.grad_y;
  p.planes = int(call.planes);
  p.y = {call.y.data, call.y.type};
  p.grad = {grad.data, grad.type};
  if (features) p.grad_y = reinterpret_cast<T*>(call.grad_y.data);
  p.grad_decay = reinterpret_cast<T*>(call.grad_decay.data);
  p.grad_frequency = reinterpret_cast<T*>(call.grad_frequency.data);
  copy_strides(p.x_stride, call.x, 4);
  copy_strides(p.state_stride, call.decay, 4);
  copy_strides(p.y_stride, call.y, 5);
  copy_strides(p.grad_stride, grad, 5);
  copy_strides(p.grad_y_stride, call.grad_y, 5);
  copy_strides(p.grad_state_stride, call.grad_decay, 4);
  return p;
}

inline bool is_small(const SbluCall& call) {
  const Grid& g = call.grid;
  const std::initializer_list<int64_t> states = {g.batch, g.n_f, g.n_t, g.states};
  const std::initializer_list<int64_t> responses = {g.batch, g.n_f, g.n_t, 2, g.states};
  const std::initializer_list<int64_t> features = {g.batch, g.n_f, g.n_t, call.planes, g.states};
  return is_small(call.x, {g.batch, g.channels, g.mel_bins, g.frames}) && is_small(call.decay, states) &&
         is_small(call.y, features) && is_small(call.grad_features, features) && is_small(call.grad_y, responses) &&
         is_small(call.grad_decay, states) &&
         g.states * g.channels * g.patch_f < INT32_MAX;
}

// run(p) with the call's parameters; `small`: whether all its offsets fit into 32 bits. Which of float's types x has is asked
// at run time.
template <class Run>
void dispatch(const SbluCall& call, bool small, Run run) {
  if (call.x.type == DType::kFloat64) {
    if (small) run(params<double, double, int32_t>(call));
    else run(params<double, double, int64_t>(call));
  } else {
    if (small) run(params<float, AnyFloat, int32_t>(call));
    else run(params<float, AnyFloat, int64_t>(call));
  }
}

// Blocks of tokens.
inline int64_t units(const Grid& g, int64_t tile) { return g.batch * g.n_f * tiles_of(g, tile); }

inline unsigned state_blocks(const Grid& g) { return unsigned((g.states + kLanes - 1) / kLanes); }
inline unsigned row_blocks(const Grid& g) { return unsigned((g.channels * g.patch_f + kRowBlock - 1) / kRowBlock); }

// Shared memory of a projection: u, xs and ws.
template <class T, class IO, class I>
struct Tiles {
  T *u, *xs, *ws;
  AAPE_DEVICE Tiles(const SbluParams<T, IO, I>& p, unsigned char* memory)
      : u(reinterpret_cast<T*>(memory)), xs(u + p.columns * kPitch), ws(xs + kRowBlock * p.pitch()) {}
};

inline size_t shared_bytes(int columns, size_t bytes) {
  return (size_t(columns) * kPitch + size_t(kRowBlock) * size_t(columns + 4) + kRowBlock * kPitch) * bytes;
}

// Where a block is.
template <class I>
struct Tile {
  I b, i, first, count, frame;
  int frames;
  I state;  // first of its 32
};

template <class I>
AAPE_DEVICE Tile<I> tile_from(const GridOf<I>& g, I tokens, I b, I i, I first, I state_block) {
  Tile<I> t;
  t.b = b;
  t.i = i;
  t.first = first;
  t.count = g.n_t - first < tokens ? g.n_t - first : tokens;
  t.frame = first * g.stride_t + (g.patch_t - g.window) / 2;
  t.frames = int((t.count - 1) * g.stride_t + g.window);
  t.state = state_block * kLanes;
  return t;
}

// The launch counts units in 31 bits.
template <class T, class IO, class I>
AAPE_DEVICE Tile<I> tile_at(const SbluParams<T, IO, I>& p, int unit, I state_block) {
  const auto [subband, tile] = p.by_tiles(unit);
  const auto [b, i] = p.by_n_f(subband);
  return tile_from(p.grid, p.tile, I(b), I(i), I(tile) * p.tile, state_block);
}

template <class T, class X, class IO, class I>
AAPE_DEVICE void load_rows_as(const SbluParams<T, IO, I>& p, const Tile<I>& t, int r, T* xs) {
  constexpr int kPack = 16 / sizeof(X), kStore = kPack < 4 ? kPack : 4, kOfRow = kThreads / kRowBlock;
  const GridOf<I>& g = p.grid;
  const int line = int(threadIdx.x / kOfRow), row = r + line, rows = int(g.channels * g.patch_f);
  const auto [channel, bin] = p.by_patch_f(row);
  const X* from = static_cast<const X*>(p.x) + t.b * p.x_stride[0] + channel * p.x_stride[1] +
                  (t.i * g.stride_f + bin) * p.x_stride[2] + t.frame * p.x_stride[3];
  // of the tile's frames those inside the clip; all packs of a row are aligned or none is, and the last one may reach behind the
  // tile
  const int begin = t.frame < 0 ? int(-t.frame) : 0;
  const I inside = row < rows ? g.frames - t.frame : 0;
  const int end = inside < t.frames ? int(inside) : t.frames;
  const bool packed = p.x_stride[3] == 1 && aligned<Pack<X, kPack>>(from);
  for (int f = int(threadIdx.x % kOfRow) * kPack; f < p.columns; f += kOfRow * kPack) {
    const auto put = [&](auto value) {
#pragma unroll
      for (int n = 0; n < kPack; n += kStore) {
        Pack<T, kStore> part;
#pragma unroll
        for (int k = 0; k < kStore; ++k) part.at[k] = value(n + k);
        store_shared(xs + line * p.pitch() + f + n, part);
      }
    };
    if (packed && f >= begin && f + kPack <= inside) {
      const auto pack = load_pack<Pack<X, kPack>>(from + f);
      put([&](int n) { return f + n < end ? widen<T>(pack.at[n]) : T(0); });
    } else {
      put([&](int n) { return f + n >= begin && f + n < end ? widen<T>(from[(f + n) * p.x_stride[3]]) : T(0); });
    }
  }
}

// Rows r … r + kRowBlock − 1 of x under the tile -> xs[row][frame], zero outside the clip and behind the tile. The caller
// synchronises.
template <class T, class IO, class I>
AAPE_DEVICE void load_rows(const SbluParams<T, IO, I>& p, const Tile<I>& t, int r, T* xs) {
  with_type<IO>(p.x_type, [&](auto x) { load_rows_as<T, decltype(x)>(p, t, r, xs); });
}

// The weights of rows r … r + kRowBlock − 1 and of the tile's states -> ws[row][state], lines kPitch apart. A warp
// has eight rows of four states: whole sectors of the weight, and places of ws in different banks. The caller synchronises.
template <class T, class IO, class I>
AAPE_DEVICE void load_weights(const SbluParams<T, IO, I>& p, const Tile<I>& t, int r, T* ws) {
  const int rows = int(p.grid.channels * p.grid.patch_f);
  static_assert(kRowBlock * kLanes % kThreads == 0, "every thread has as many");
#pragma unroll
  for (unsigned k = threadIdx.x, n = 0; n < kRowBlock * kLanes / kThreads; ++n, k += kThreads) {
    const int line = int(k % 8 + k / (8 * kLanes) * 8), state = int(k / 8 % kLanes), row = r + line;
    const I s = t.state + state;
    ws[line * kPitch + state] = row < rows && s < p.grid.states ? p.weight[s * rows + row] : T(0);
  }
}

// A thread's cell of its warp's 8 × 4 in a product, of which it has a few columns and rows. Lanes that differ in their lowest
// bit have the same column, and those that differ in the next one the same row: a 16-byte read of either is then two
// wavefronts, not four.
struct Cell {
  static constexpr int kColumns = 8, kRows = kLanes / kColumns;
  int column, row;
  AAPE_DEVICE Cell() {
    const int lane = int(threadIdx.x % kLanes);
    column = lane / 2 % 8;
    row = lane % 2 + lane / 16 * 2;
  }
};

// u[frame][state] = Σ_r x[r][frame] · weight[r][state] for the tile's frames, all rows. A thread has four frames of four
// states: two 16-byte reads for 16 multiply-adds.
template <class T, class IO, class I>
AAPE_DEVICE void project(const SbluParams<T, IO, I>& p, const Tile<I>& t, const Tiles<T, IO, I>& m) {
  constexpr int kOfWarp = Cell::kRows * 4, kFrames = kWarps * kOfWarp;  // of the block at once
  const Cell cell;
  const int state = cell.column * 4, first = threadIdx.x / kLanes * kOfWarp + cell.row * 4;
  const int rows = int(p.grid.channels * p.grid.patch_f);
  for (int r = 0; r < rows; r += kRowBlock) {
    if (r) __syncthreads();  // before xs is written again
    load_rows(p, t, r, m.xs);
    load_weights(p, t, r, m.ws);
    __syncthreads();
    for (int f = first; f < t.frames; f += kFrames) {
      T* const u = m.u + f * kPitch + state;
      Quad<T> sum[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (r) sum[k] = load_pack<Quad<T>>(u + k * kPitch);
        else sum[k] = Quad<T>{};
      }
#pragma unroll
      for (int row = 0; row < kRowBlock; ++row) {
        const auto x = load_pack<Quad<T>>(m.xs + row * p.pitch() + f);
        const auto w = load_pack<Quad<T>>(m.ws + row * kPitch + state);
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
          for (int s = 0; s < 4; ++s) sum[k].at[s] = fma(x.at[k], w.at[s], sum[k].at[s]);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) store_shared(u + k * kPitch, sum[k]);
    }
  }
  __syncthreads();
}

}  // namespace cuda
}  // namespace aape
