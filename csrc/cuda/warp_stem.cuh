// The stem of bfloat16 on tensor cores, 16 tokens a warp: what its forward and its backward share.
//
// A warp has the pixels under its tokens in shared memory, turned: [token][frame][row], so that the 16 rows of one frame are
// a left factor (tokens × rows). Encoder and projection are then products frame by frame, and their sums stay in registers:
// of tokens g and g + 8 a lane has the states (or units) 8n + 2c and 8n + 2c + 1. Warps need nothing of each other.

#pragma once

#include "products.cuh"
#include "respond.cuh"

namespace aape {
namespace cuda {

constexpr int kTokensOfWarp = 16;
constexpr int kRows = 16;  // C · P_f, at the most

// Of the compiled kernels: states and hidden units, at the most, and the warps of a block, for which registers suffice.
template <int kStates_, int kHidden_, int kWarps_, bool kUsual_>
struct Sizes {
  static constexpr int kStateTiles = kStates_ / 8, kHiddenTiles = kHidden_ / 8, kMostWarps = kWarps_;
  static constexpr int kStates = kStates_, kHidden = kHidden_;
  static constexpr int kLogitSteps = 2 * kStates_ / 16, kHiddenSteps = kHidden_ / 16;  // of products over them
  // patch and window are the same 16 frames of 16 rows, everything is where 16 bytes can be moved at once
  static constexpr bool kUsual = kUsual_;
};

// A token's line of frames: those of patch and window. Frames are counted from its first one.
template <bool kUsual>
struct Line {
  int frames_, patch_, patch_first_, window_, window_first_;
  int start;  // the first frame, from the patch's
  AAPE_DEVICE int frames() const { return kUsual ? 16 : frames_; }
  AAPE_DEVICE int patch() const { return kUsual ? 16 : patch_; }
  AAPE_DEVICE int patch_first() const { return kUsual ? 0 : patch_first_; }
  AAPE_DEVICE int window() const { return kUsual ? 16 : window_; }
  AAPE_DEVICE int window_first() const { return kUsual ? 0 : window_first_; }
  // in elements, between two tokens: by 16 bytes more than they need, eight rows of a product are in different banks
  AAPE_DEVICE int pitch() const { return frames() * kRows + 8; }
};

template <class S>
struct WarpStemParams {
  GridOf<int> grid;
  Line<S::kUsual> line;
  int tokens, hidden_units, planes, row_step;
  bool time_major;
  const BFloat16* x;
  int x_stride[4];
  Divisor<int32_t> by_inner, by_outer, by_patch_f;  // the faster axis of tokens, the slower one
  Squash<float> squash;
  Values w1, b1, w2, b2, weight;
  BFloat16* operand;
  float *hidden, *r;  // written by the forward, read by the backward
  // of the backward
  const BFloat16* grad;    // the features' cotangent, (tokens, planes · S)
  int one, active;         // the operand's columns of ones and of SiLU(hidden)
  BFloat16* grad_encoder;  // (tokens, 2S + H): cotangents of r and of hidden
  float* grad_y;           // (tokens, 2S), or null
  float* partial;          // (blocks, S, C · P_f)

  AAPE_DEVICE int rows() const { return S::kUsual ? kRows : grid.channels * grid.patch_f; }
  AAPE_DEVICE int length() const { return rows() * line.patch(); }
};

// A lane's two tokens, g and g + 8 of the warp's.
struct TwoTokens {
  int first, count;  // g's row of the operand; all rows
  AAPE_DEVICE int row(int h) const { return first + 8 * h; }
  AAPE_DEVICE bool there(int h) const { return row(h) < count; }
};

template <class S>
AAPE_DEVICE TwoTokens tokens_at(const WarpStemParams<S>& p, int tile) {
  return {tile * kTokensOfWarp + int(threadIdx.x % kLanes / 4), p.tokens};
}

// Where the line of a token begins: the first pixel's offset, and the clip's frame.
struct Start {
  int pixel, frame;
};

template <class S>
AAPE_DEVICE Start start_of(const WarpStemParams<S>& p, int token) {
  const auto [line, inner] = p.by_inner(token);
  const auto [b, outer] = p.by_outer(line);
  const int i = p.time_major ? inner : outer, j = p.time_major ? outer : inner;
  const int frame = j * p.grid.stride_t + p.line.start;
  return {b * p.x_stride[0] + i * p.grid.stride_f * p.x_stride[2] + frame * p.x_stride[3], frame};
}

// Where a row of x lies, from a token's first pixel.
template <class S>
AAPE_DEVICE int row_offset(const WarpStemParams<S>& p, int row) {
  if (S::kUsual) return row * p.x_stride[2];
  const auto [channel, bin] = p.by_patch_f(row);
  return channel * p.x_stride[1] + bin * p.x_stride[2];
}

// Elements from the beginning of a line to those of `row` in a frame. Every other eight frames have the halves of their
// rows swapped, for the sake of `load_packs`.
AAPE_DEVICE int in_line(int frame, int row) { return frame * kRows + (row ^ (frame & 8)); }

// A warp's lines -> shared memory, and its patches -> the operand. Rows behind the last token are zero.
//
// Where all of it is moved in packs of eight frames, two lanes have the 32 bytes of a token's row, so that global memory is
// asked for whole sectors; eight lanes have rows q and q + 1 for four values of q, and what they store is, with those of
// every other token, in different banks.
template <class S>
AAPE_DEVICE void load_packs(const WarpStemParams<S>& p, int tile, BFloat16* lines) {
  using Eight = Pack<uint32_t, 4>;
  const int lane = threadIdx.x % kLanes, first = tile * kTokensOfWarp, pack = lane % 2;
  const int mine = first + lane % kTokensOfWarp, start = start_of(p, mine < p.tokens ? mine : p.tokens - 1).pixel;
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const int m = lane / 8 * 2 + step % 2 + step / 2 * 8;
    const bool there = first + m < p.tokens;
    const BFloat16* from = p.x + __shfl_sync(0xFFFFFFFFu, start, m) + pack * 8;
    BFloat16* operand = p.operand + (first + m) * p.row_step + pack * 8;
    Eight rows[2][2];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int row = lane / 2 % 4 * 2 + n / 2 * 8 + n % 2;
      rows[n / 2][n % 2] = load_pack<Eight>(from + row_offset(p, row));
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 2 % 4 * 2 + half * 8;
      const Eight upper = there ? rows[half][0] : Eight{}, lower = there ? rows[half][1] : Eight{};
      if (there) {
        store_pack(operand + row * 16, upper);
        store_pack(operand + row * 16 + 16, lower);
      }
      // frames 2k and 2k + 1 of both rows
      uint32_t* to = reinterpret_cast<uint32_t*>(lines + m * p.line.pitch() + in_line(pack * 8, row));
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        to[2 * k * (kRows / 2)] = (upper.at[k] & 0xFFFFu) | lower.at[k] << 16;
        to[(2 * k + 1) * (kRows / 2)] = upper.at[k] >> 16 | (lower.at[k] & 0xFFFF0000u);
      }
    }
  }
}

// The same for any geometry, pixel by pixel.
template <class S>
AAPE_DEVICE void load_pixels(const WarpStemParams<S>& p, int tile, BFloat16* lines) {
  const int lane = threadIdx.x % kLanes;
  for (int m = lane / 4; m < kTokensOfWarp; m += 8) {
    const int token = tile * kTokensOfWarp + m;
    const bool there = token < p.tokens;
    const Start start = start_of(p, there ? token : 0);
    BFloat16 *line = lines + m * p.line.pitch(), *operand = p.operand + token * p.row_step;
    for (int row = lane % 4; row < kRows; row += 4) {
      const BFloat16* from = p.x + start.pixel + row_offset(p, row);
      for (int f = 0; f < p.line.frames(); ++f) {
        const int frame = start.frame + f, of_patch = f - p.line.patch_first();
        BFloat16 value = BFloat16(0.0f);
        if (there && row < p.rows() && frame >= 0 && frame < p.grid.frames) {
          value = from[f * p.x_stride[3]];
          if (of_patch >= 0 && of_patch < p.line.patch()) operand[row * p.line.patch() + of_patch] = value;
        }
        line[in_line(f, row)] = value;
      }
    }
  }
}

// The address that this lane names for the 16 × 16 of a frame.
template <class S>
AAPE_DEVICE const BFloat16* frame_of(const WarpStemParams<S>& p, const BFloat16* lines, int frame) {
  const int lane = threadIdx.x % kLanes;
  return lines + lane % 16 * p.line.pitch() + in_line(frame, lane / 16 * 8);
}

// The SBLU's projection (rows × states), as right factors: one for every eight states.
template <class S>
AAPE_DEVICE void fill_projection(const WarpStemParams<S>& p, Weights* to) {
  const int rows = p.rows();
  fill_rights(to, S::kStateTiles, [&](int tile, int row, int column) {
    const int s = tile * 8 + column;
    return row < rows && s < p.grid.states ? load<float>(p.weight, s * rows + row) : 0.0f;
  });
}

// u of the frames m and K − 1 − m of the windows, for states 8n …
template <class S>
AAPE_DEVICE void project(const WarpStemParams<S>& p, const BFloat16* lines, const Weights* projection, int m,
                         Sums& left, Sums& right) {
  const Split<Right> weight = load_right(projection);
  const int first = p.line.window_first();
  multiply(left, load_left(frame_of(p, lines, first + m)), weight);
  multiply(right, load_left(frame_of(p, lines, first + p.line.window() - 1 - m)), weight);
}

// Of the four lanes that share tokens g and g + 8.
AAPE_DEVICE float token_sum(float value) {
  value += __shfl_xor_sync(0xFFFFFFFFu, value, 1);
  return value + __shfl_xor_sync(0xFFFFFFFFu, value, 2);
}

// Column k of row `row`, and the next where there are two, in one access where the address allows it.
template <class O>
AAPE_DEVICE void store_two(O* to, float first, float second, bool two) {
  using Two = Pack<O, 2>;
  if (two && aligned<Two>(to)) {
    store_pack(to, Two{{narrow<O>(first), narrow<O>(second)}});
  } else {
    to[0] = narrow<O>(first);
    if (two) to[1] = narrow<O>(second);
  }
}

template <class O>
AAPE_DEVICE void load_two(const O* from, bool two, float& first, float& second) {
  using Two = Pack<O, 2>;
  if (two && aligned<Two>(from)) {
    const Two pair = load_pack<Two>(from);
    first = widen<float>(pair.at[0]);
    second = widen<float>(pair.at[1]);
  } else {
    first = widen<float>(from[0]);
    if (two) second = widen<float>(from[1]);
  }
}

// visit(h, k, column, two) for what a lane has of sums of `count` columns, tile n: token h, sums k and, of two, k + 1.
template <class Visit>
AAPE_DEVICE void each_pair(const TwoTokens& at, int n, int count, Visit visit) {
  const int column = n * 8 + int(threadIdx.x % 4) * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (at.there(h) && column < count) visit(h, 2 * h, column, column + 1 < count);
  }
}

// The features of two tokens from y, and their adjoint. Sums over the states of a token: sum k belongs to token k / 2.
template <class S>
struct Levels {
  float level[S::kStateTiles][4];  // n, the standardised log-magnitude
  float inverse[2];                // 1/σ

  AAPE_DEVICE void set(const Complex<float> (&y)[S::kStateTiles][4], int states) {
    float mean[2] = {0, 0}, variance[2] = {0, 0};
    for_each(states, [&](int n, int k) { mean[k / 2] += level[n][k] = log_magnitude<float>(y[n][k]); });
    for (float& value : mean) value = token_sum(value) * (1.0f / float(states));
    for_each(states, [&](int n, int k) {
      level[n][k] -= mean[k / 2];
      variance[k / 2] = fma(level[n][k], level[n][k], variance[k / 2]);
    });
    for (int h = 0; h < 2; ++h) {
      inverse[h] = 1.0f / sqrtf(token_sum(variance[h]) * (1.0f / float(states)) + float(kVarianceFloor));
    }
    for_each(states, [&](int n, int k) { level[n][k] *= inverse[k / 2]; });
  }

  template <class Visit>
  static AAPE_DEVICE void for_each(int states, Visit visit) {
#pragma unroll
    for (int n = 0; n < S::kStateTiles; ++n)
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (n * 8 + int(threadIdx.x % 4) * 2 + k % 2 < states) visit(n, k);
  }
};

template <class S>
AAPE_DEVICE void store_planes(const WarpStemParams<S>& p, const TwoTokens& at,
                              const Complex<float> (&y)[S::kStateTiles][4], const Levels<S>& levels) {
  const int states = p.grid.states;
#pragma unroll
  for (int n = 0; n < S::kStateTiles; ++n) {
    each_pair(at, n, states, [&](int h, int k, int s, bool two) {
      BFloat16* to = p.operand + at.row(h) * p.row_step + p.length() + s;
      if (p.planes != 1) {
        store_two(to, y[n][k].re, y[n][k + 1].re, two);
        store_two(to + states, y[n][k].im, y[n][k + 1].im, two);
      }
      if (p.planes != 2) store_two(to + (p.planes - 1) * states, levels.level[n][k], levels.level[n][k + 1], two);
    });
  }
}

// Of one warp.
template <bool kUsual>
size_t lines_bytes(const Line<kUsual>& line) {
  return size_t(kTokensOfWarp) * size_t(line.frames_ * kRows + 8) * sizeof(BFloat16);
}

// A block a multiprocessor, of as many warps as find room; none if that is not one.
struct Launch {
  int blocks, warps;
  size_t shared;
};
inline Launch launch_of(int tokens, int most_warps, size_t common, size_t own) {
  const size_t limit = shared_limit();
  if (limit < common + own) return {0, 0, 0};
  const size_t room = (limit - common) / own;
  const int warps = room < size_t(most_warps) ? int(room) : most_warps;
  const int tiles = (tokens + kTokensOfWarp - 1) / kTokensOfWarp, chip = multiprocessors();
  return {tiles < chip ? tiles : chip, warps, common + size_t(warps) * own};
}

// This warp's first tile of tokens.
AAPE_DEVICE int first_tile() { return int(threadIdx.x / kLanes * gridDim.x + blockIdx.x); }

// visit(tokens) for the tiles of this warp, few of which are spread over all blocks first, with their lines in shared
// memory.
template <class S, class Visit>
AAPE_DEVICE void each_tile(const WarpStemParams<S>& p, BFloat16* lines, Visit visit) {
  const int tiles = (p.tokens + kTokensOfWarp - 1) / kTokensOfWarp;
  for (int tile = first_tile(); tile < tiles; tile += int(blockDim.x / kLanes * gridDim.x)) {
    if constexpr (S::kUsual) load_packs(p, tile, lines);
    else load_pixels(p, tile, lines);
    __syncwarp();
    visit(tokens_at(p, tile));
    __syncwarp();  // before the lines are written again
  }
}

// Fewer would leave the tensor cores idle: long lines on a small chip.
constexpr int kLeastWarps = 4;

template <class S>
WarpStemParams<S> warp_stem_params(const StemCall& call) {
  WarpStemParams<S> p = {};
  const Grid& g = call.grid;
  p.grid = narrowed<int>(g);
  const int offset = int(g.patch_t - g.window) / 2, start = offset < 0 ? offset : 0;
  const int end = int(offset + g.window > g.patch_t ? offset + g.window : g.patch_t);
  p.line = {end - start, int(g.patch_t), -start, int(g.window), offset - start, start};
  p.tokens = int(g.batch * g.n_f * g.n_t);
  p.hidden_units = int(call.hidden_units);
  p.planes = int(call.planes);
  p.row_step = int(call.operand.stride[0]);
  p.time_major = call.time_major;
  p.by_inner = Divisor<int32_t>(call.time_major ? g.n_f : g.n_t);
  p.by_outer = Divisor<int32_t>(call.time_major ? g.n_t : g.n_f);
  p.by_patch_f = Divisor<int32_t>(g.patch_f);
  p.x = reinterpret_cast<const BFloat16*>(call.x.data);
  copy_strides(p.x_stride, call.x, 4);
  p.squash = squash_of<float>(call.ranges);
  const auto values = [](const View& view) { return Values{view.data, view.type}; };
  p.w1 = values(call.w1);
  p.b1 = values(call.b1);
  p.w2 = values(call.w2);
  p.b2 = values(call.b2);
  p.weight = values(call.weight);
  p.operand = reinterpret_cast<BFloat16*>(call.operand.data);
  p.hidden = reinterpret_cast<float*>(call.hidden.data);
  p.r = reinterpret_cast<float*>(call.r.data);
  return p;
}

// run(Sizes()) with the kernel's that a call fits into; false if it fits into none, or run says so.
template <class Run>
bool with_sizes(const StemCall& call, Run run) {
  const Grid& g = call.grid;
  const int64_t rows = g.channels * g.patch_f, tokens = g.batch * g.n_f * g.n_t;
  const bool fits = call.x.type == DType::kBFloat16 && call.operand.type == DType::kBFloat16 && g.quadrature &&
                    g.window % 2 == 0 && rows <= kRows && g.states <= 32 && call.hidden_units <= 64 && call.planes &&
                    tokens * call.operand.stride[0] < INT32_MAX && tokens * 192 < INT32_MAX &&  // r, hidden and cotangents
                    is_small(call.x, {g.batch, g.channels, g.mel_bins, g.frames});
  if (!fits) return false;
  bool usual = g.channels == 1 && rows == kRows && g.patch_t == 16 && g.window == 16 && g.stride_t % 8 == 0 &&
               call.x.stride[3] == 1 && call.operand.stride[0] % 8 == 0;
  for (int axis = 0; axis < 3; ++axis) usual = usual && call.x.stride[axis] % 8 == 0;
  for (const char* data : {call.x.data, call.operand.data}) usual = usual && aligned<Pack<float, 4>>(data);
  if (g.states <= 16 && call.hidden_units <= 32) {
    return usual ? run(Sizes<16, 32, 16, true>()) : run(Sizes<16, 32, 12, false>());
  }
  return usual ? run(Sizes<32, 64, 8, true>()) : run(Sizes<32, 64, 8, false>());
}

}  // namespace cuda
}  // namespace aape
