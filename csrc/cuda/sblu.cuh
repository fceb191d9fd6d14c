// What SBLU's kernels share: a block's tile of tokens, its rows of x in shared memory, and their projection.
//
// A block has kWarps warps and works on `tile` neighbouring tokens of one subband (b, i) and on 32 states, one a lane. The
// frames under its windows are projected once and kept in shared memory, u[frame][state]: every access to it is free of
// bank conflicts, as lanes are states.

#pragma once

#include "../calls.h"
#include "device.h"

namespace aape {
namespace cuda {

constexpr int kLanes = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kLanes * kWarps;
constexpr int kBlocks = 2;  // of a multiprocessor at the least: 128 registers a thread, which nothing spills
constexpr int kFrameBlock = 8;  // frames a thread projects at once
constexpr int kRowBlock = 16;   // rows of x in shared memory at once

// With logits, decay and frequency hold the Lambda Encoder's r, squashed here into the ranges.
template <class T>
struct Squash {
  bool logits;
  T decay_low, decay_log_ratio, band_low, band_width;
};

// Pointers, sizes and element strides of one call. decay, frequency and grad (B, N_f, N_t, …, S) by strides; weight
// (S, C·P_f) contiguous, in the arithmetic's type.
template <class T, class IO>
struct SbluParams {
  Grid grid;
  Squash<T> squash;
  int64_t tile;     // tokens of a block
  int64_t columns;  // frames under them, padded to whole frame blocks of all warps
  const IO* x;
  int64_t x_stride[4];
  const T* decay;
  const T* frequency;
  int64_t state_stride[4];
  const T* weight;
  IO* y;
  int64_t y_stride[5];
  // backward: the cotangent of y, and what is asked for; null where it is not
  const IO* grad;
  int64_t grad_stride[5];
  T* grad_decay;  // and of the frequency: (B, N_f, N_t, S) of one set of strides
  T* grad_frequency;
  int64_t grad_state_stride[4];
  T* partial;  // (programs, S, C·P_f): sums over a program's tiles
  int64_t programs;
  T* windows;  // (tiles, C·P_f, frames of a tile): gradients of x, to be added where tiles overlap
};

// Tokens whose windows a block projects together: as many as span about this many frames.
constexpr int64_t kTileFrames = 128;

inline int64_t tile_tokens(const Grid& g, int64_t bytes) {
  const int64_t budget = kTileFrames * 4 / bytes;
  // windows with gaps between them share nothing, and their gaps would be projected for nothing
  const int64_t more = g.stride_t > g.window || budget < g.window ? 0 : (budget - g.window) / g.stride_t;
  return more + 1 < g.n_t ? more + 1 : g.n_t;
}

template <class T, class IO>
SbluParams<T, IO> params(const SbluCall& call) {
  SbluParams<T, IO> p = {};
  const Grid& g = call.grid;
  p.grid = g;
  p.squash = {call.ranges.logits, T(call.ranges.decay_low), T(call.ranges.decay_log_ratio), T(call.ranges.band_low),
              T(call.ranges.band_width)};
  p.tile = tile_tokens(g, sizeof(T));
  const int64_t frames = (p.tile - 1) * g.stride_t + g.window, step = kFrameBlock;
  p.columns = (frames + step - 1) / step * step;
  p.x = reinterpret_cast<const IO*>(call.x.data);
  p.decay = reinterpret_cast<const T*>(call.decay.data);
  p.frequency = reinterpret_cast<const T*>(call.frequency.data);
  p.weight = reinterpret_cast<const T*>(call.weight.data);
  p.y = reinterpret_cast<IO*>(call.y.data);
  for (int axis = 0; axis < 4; ++axis) {
    p.x_stride[axis] = call.x.stride[axis];
    p.state_stride[axis] = call.decay.stride[axis];
  }
  p.grad = reinterpret_cast<const IO*>(call.grad_y.data);
  p.grad_decay = reinterpret_cast<T*>(call.grad_decay.data);
  p.grad_frequency = reinterpret_cast<T*>(call.grad_frequency.data);
  for (int axis = 0; axis < 4; ++axis) p.grad_state_stride[axis] = call.grad_decay.stride[axis];
  for (int axis = 0; axis < 5; ++axis) {
    p.y_stride[axis] = call.y.stride[axis];
    p.grad_stride[axis] = call.grad_y.stride[axis];
  }
  return p;
}

// Blocks of tokens.
template <class T, class IO>
int64_t units(const SbluParams<T, IO>& p) {
  return p.grid.batch * p.grid.n_f * ((p.grid.n_t + p.tile - 1) / p.tile);
}

// u, xs and ws.
template <class T, class IO>
size_t shared_bytes(const SbluParams<T, IO>& p) {
  return size_t(p.columns * (kLanes + kRowBlock) + kRowBlock * kLanes) * sizeof(T);
}

// Where a block is.
struct Tile {
  int64_t b, i, first, count, frame, frames;
  int state;  // first of its 32
};

AAPE_DEVICE Tile tile_at(const Grid& g, int64_t tokens, int64_t unit, int state_block) {
  Tile t;
  int64_t tiles = (g.n_t + tokens - 1) / tokens, row = unit / tiles;
  t.i = row % g.n_f;
  t.b = row / g.n_f;
  t.first = unit % tiles * tokens;
  t.count = g.n_t - t.first < tokens ? g.n_t - t.first : tokens;
  t.frame = t.first * g.stride_t + (g.patch_t - g.window) / 2;
  t.frames = (t.count - 1) * g.stride_t + g.window;
  t.state = state_block * kLanes;
  return t;
}

// Rows r … r + kRowBlock − 1 of x under the tile -> xs[row][columns], zero outside the clip; the weights of those rows and
// the block's states -> ws[row][lane]. The caller synchronises.
template <class T, class IO>
AAPE_DEVICE void load_rows(const SbluParams<T, IO>& p, const Tile& t, int64_t r, T* xs, T* ws) {
  const Grid& g = p.grid;
  const int64_t rows = g.channels * g.patch_f, columns = p.columns;
  const int thread = threadIdx.x;
  for (int64_t k = thread; k < kRowBlock * columns; k += kThreads) {
    int64_t row = r + k / columns, f = k % columns, at = t.frame + f;
    T value = 0;
    if (row < rows && f < t.frames && at >= 0 && at < g.frames) {
      int64_t c = row / g.patch_f, q = row % g.patch_f;
      value = widen<T>(p.x[t.b * p.x_stride[0] + c * p.x_stride[1] + (t.i * g.stride_f + q) * p.x_stride[2] +
                           at * p.x_stride[3]]);
    }
    xs[k] = value;
  }
  for (int k = thread; k < kRowBlock * kLanes; k += kThreads) {
    int64_t row = r + k / kLanes, s = t.state + k % kLanes;
    ws[k] = row < rows && s < g.states ? p.weight[s * rows + row] : T(0);
  }
}

// u[frame][lane] = Σ_r x[r][frame] · weight[r][lane] for the tile's frames, all rows. xs and ws are scratch.
template <class T, class IO>
AAPE_DEVICE void project(const SbluParams<T, IO>& p, const Tile& t, T* xs, T* ws, T* u) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t rows = p.grid.channels * p.grid.patch_f;
  for (int64_t r = 0; r < rows; r += kRowBlock) {
    if (r) __syncthreads();  // before xs is written again
    load_rows(p, t, r, xs, ws);
    __syncthreads();
    for (int64_t f = warp * kFrameBlock; f < t.frames; f += kWarps * kFrameBlock) {
      T sum[kFrameBlock];
#pragma unroll
      for (int k = 0; k < kFrameBlock; ++k) sum[k] = r ? u[(f + k) * kLanes + lane] : T(0);
#pragma unroll
      for (int row = 0; row < kRowBlock; ++row) {
        T w = ws[row * kLanes + lane];
        const T* from = xs + row * p.columns + f;  // one address for all lanes
#pragma unroll
        for (int k = 0; k < kFrameBlock; ++k) sum[k] += from[k] * w;
      }
#pragma unroll
      for (int k = 0; k < kFrameBlock; ++k) u[(f + k) * kLanes + lane] = sum[k];
    }
  }
  __syncthreads();
}

// A state's α and ω, and d/dr where they come from logits.
template <class T>
struct State {
  T decay, frequency, decay_slope, frequency_slope;
};

template <class T, class IO>
AAPE_DEVICE State<T> load_state(const SbluParams<T, IO>& p, const Tile& t, int64_t j, int64_t s) {
  int64_t at = t.b * p.state_stride[0] + t.i * p.state_stride[1] + j * p.state_stride[2] + s * p.state_stride[3];
  State<T> state = {p.decay[at], p.frequency[at], T(1), T(1)};
  if (p.squash.logits) {
    T share = T(1) / (T(1) + exp<T>(-state.decay));
    state.decay = p.squash.decay_low * exp<T>(share * p.squash.decay_log_ratio);
    state.decay_slope = state.decay * p.squash.decay_log_ratio * share * (T(1) - share);
    share = T(1) / (T(1) + exp<T>(-state.frequency));
    state.frequency = p.squash.band_low + p.squash.band_width * share;
    state.frequency_slope = p.squash.band_width * share * (T(1) - share);
  }
  return state;
}

}  // namespace cuda
}  // namespace aape
