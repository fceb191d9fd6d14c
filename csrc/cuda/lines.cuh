// 16 tokens a warp: the pixels under them in its shared memory, and how warps share out tokens.
//
// Pixels are turned, [token][frame][row], so that 16 rows of one frame are a left factor (tokens × rows) or a right one.
// Warps need nothing of each other.

#pragma once

#include "products.cuh"
#include "sblu.cuh"

namespace aape {
namespace cuda {

constexpr int kTokensOfWarp = 16;
constexpr int kRows = 16;  // of a factor; C · P_f of them are padded with zeros to whole ones

// A token's line of frames: those of patch and window. Frames are counted from its first one, and are even in number.
template <bool kUsual>
struct Line {
  int frames_, patch_, patch_first_, window_, window_first_;
  int start;  // the first frame, from the patch's
  AAPE_DEVICE int frames() const { return kUsual ? 16 : frames_; }
  AAPE_DEVICE int patch() const { return kUsual ? 16 : patch_; }
  AAPE_DEVICE int patch_first() const { return kUsual ? 0 : patch_first_; }
  AAPE_DEVICE int window() const { return kUsual ? 16 : window_; }
  AAPE_DEVICE int window_first() const { return kUsual ? 0 : window_first_; }
};

// Where pixels lie, so that neither who writes them nor who reads them meets bank conflicts; in elements. A group is sixteen
// rows of a frame, and a line has an even number of them.
template <class X>
struct Layout;

// Lines are 16 bytes longer than they need, by which eight rows of a product are in different banks. Every other eight groups
// have the halves of their rows swapped, for the sake of `load_packs`.
template <>
struct Layout<BFloat16> {
  static AAPE_FN int pitch(int groups) { return groups * kRows + 8; }
  static AAPE_FN int in_line(int, int group, int row) { return group * kRows + (row ^ (group & 8)); }
  // of a right factor of rows
  static AAPE_FN int row_of(int tile, int column) { return tile * 8 + column; }
};

// A group's rows in the order 0 1 8 9 2 3 10 11 …, so that a lane has four of a left factor in one access of 16 bytes. Of
// tokens 1, 2, 5, 6, … every two groups have changed places, and of tokens 4 to 7 and 12 to 15 the halves of their rows.
template <>
struct Layout<float> {
  static AAPE_FN int pitch(int groups) { return groups * kRows; }
  static AAPE_FN int in_line(int token, int group, int row) {
    const int place = row % 8 / 2 * 4 + row / 8 * 2 + row % 2;
    return (group ^ ((token ^ token >> 1) & 1)) * kRows + (place ^ (token & 4) * 2);
  }
  // Of a right factor of rows a lane has two columns side by side: place 2 · column + tile.
  static AAPE_FN int row_of(int tile, int column) { return column / 2 * 2 + tile + column % 2 * 8; }
};

// What a warp's tokens are: S says X, the type of pixels, and whether the geometry is the usual one, where patch and window
// are the same 16 frames of 16 rows and pixels can be moved 16 bytes at once.
template <class S>
struct LineParams {
  using X = typename S::X;
  using Offset = std::conditional_t<S::kUsual, int, int64_t>;  // within x
  GridOf<int> grid;
  Line<S::kUsual> line;
  int row_blocks;  // of kRows
  int tokens;
  bool packed_;    // pixels can be moved 16 bytes at once
  bool time_major;
  const X* x;
  Offset x_stride[4];
  Divisor<int32_t> by_inner, by_outer, by_patch_f, by_blocks;  // the faster axis of tokens, the slower one

  AAPE_DEVICE int rows() const { return S::kUsual ? kRows : grid.channels * grid.patch_f; }
  AAPE_DEVICE int length() const { return rows() * line.patch(); }
  AAPE_DEVICE bool packed() const { return S::kUsual || packed_; }
  AAPE_DEVICE int blocks() const { return S::kUsual ? 1 : row_blocks; }
  AAPE_DEVICE int group(int frame, int block) const { return frame * blocks() + block; }
  AAPE_DEVICE int pitch() const { return Layout<X>::pitch(group(line.frames(), 0)); }
};

// A lane's two tokens, g and g + 8 of the warp's.
struct TwoTokens {
  int first, count;  // g, of all tokens; their number
  AAPE_DEVICE int row(int h) const { return first + 8 * h; }
  AAPE_DEVICE bool there(int h) const { return row(h) < count; }
};

template <class S>
AAPE_DEVICE TwoTokens tokens_at(const LineParams<S>& p, int tile) {
  return {tile * kTokensOfWarp + int(threadIdx.x % kLanes / 4), p.tokens};
}

// Token (b, i, j).
struct Position {
  int b, i, j;
};

template <class S>
AAPE_DEVICE Position position_of(const LineParams<S>& p, int token) {
  const auto [line, inner] = p.by_inner(token);
  const auto [b, outer] = p.by_outer(line);
  return {b, p.time_major ? inner : outer, p.time_major ? outer : inner};
}

// Where the line of a token begins: the first pixel's offset, and the clip's frame.
template <class S>
struct Start {
  typename LineParams<S>::Offset pixel;
  int frame;
};

template <class S>
AAPE_DEVICE Start<S> start_of(const LineParams<S>& p, int token) {
  const auto [b, i, j] = position_of(p, token);
  const int frame = j * p.grid.stride_t + p.line.start;
  return {b * p.x_stride[0] + i * p.grid.stride_f * p.x_stride[2] + frame * p.x_stride[3], frame};
}

// visit(block of rows, first of two packs) for all of a line's.
template <class S, class Visit>
AAPE_DEVICE void each_block(const LineParams<S>& p, int packs, Visit visit) {
  for (int block = 0; block < p.blocks(); ++block) {
#pragma unroll
    for (int pair = 0; pair < packs; pair += 2) visit(block, pair);
  }
}

// Where a row of x lies, from a token's first pixel.
template <class S>
AAPE_DEVICE typename LineParams<S>::Offset row_offset(const LineParams<S>& p, int row) {
  if (S::kUsual) return row * p.x_stride[2];
  const auto [channel, bin] = p.by_patch_f(row);
  return channel * p.x_stride[1] + bin * p.x_stride[2];
}

// Lines -> shared memory, in packs of 16 bytes; and to where keep.at(token, element of the patch) says, by
// keep(place, further elements, pack). Behind the last token are its pixels once more. Two lanes have 32 bytes that are next
// to each other: whole sectors of global memory.
//
// Of bfloat16 those are 16 frames of a row; eight lanes have rows q and q + 1 for four values of q, and what they store is, with
// those of every other token, in different banks.
template <class S, class Keep>
AAPE_DEVICE void load_packs(const LineParams<S>& p, int tile, BFloat16* lines, Keep keep) {
  using Eight = Pack<uint32_t, 4>;
  const int lane = threadIdx.x % kLanes, first = tile * kTokensOfWarp, packs = p.line.frames() / 8;
  const int mine = first + lane % kTokensOfWarp;
  const auto start = start_of(p, mine < p.tokens ? mine : p.tokens - 1).pixel;
  each_block(p, packs, [&](int block, int pair) {
    const int frame = (pair + lane % 2) * 8;
    const bool has = frame < p.line.frames();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const int m = lane / 8 * 2 + step % 2 + step / 2 * 8;
      const BFloat16* from = p.x + __shfl_sync(0xFFFFFFFFu, start, m) + frame;
      const auto to_keep = keep.at(first + m, frame);
      Eight rows[2][2];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int row = block * kRows + lane / 2 % 4 * 2 + n / 2 * 8 + n % 2;
        rows[n / 2][n % 2] = has && row < p.rows() ? load_pack<Eight>(from + row_offset(p, row)) : Eight{};
      }
      if (!has) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int of_block = lane / 2 % 4 * 2 + half * 8, row = block * kRows + of_block;
        const Eight &upper = rows[half][0], &lower = rows[half][1];
        if (first + m < p.tokens) {
          if (row < p.rows()) keep(to_keep, row * p.line.frames(), upper);
          if (row + 1 < p.rows()) keep(to_keep, (row + 1) * p.line.frames(), lower);
        }
        const auto to = [&](int k) {
          // of eight frames that are neighbouring groups all have their halves alike
          const int place = p.blocks() == 1 ? Layout<BFloat16>::in_line(m, frame, of_block) + k * kRows
                                            : Layout<BFloat16>::in_line(m, p.group(frame + k, block), of_block);
          return reinterpret_cast<uint32_t*>(lines + m * p.pitch() + place);
        };
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          *to(2 * k) = lower_halves(upper.at[k], lower.at[k]);
          *to(2 * k + 1) = upper_halves(upper.at[k], lower.at[k]);
        }
      }
    }
  });
}

// A lane's rows and frames where two lanes have eight frames of float32, and half a warp two tokens' sixteen rows:
// visit(token, row of a block, frame) for eight pairs of tokens, four at once.
struct Quarters {
  int row, of_pair, half;
  AAPE_DEVICE Quarters() {
    const int lane = threadIdx.x % kLanes;
    row = lane % 8 * 2, of_pair = lane / 8 % 2, half = lane / 16;
  }
  AAPE_DEVICE int token(int step) const { return step * 2 + of_pair; }
  AAPE_DEVICE int frame(int pair) const { return (pair + half) * 4; }
};

template <class S, class Keep>
AAPE_DEVICE void load_packs(const LineParams<S>& p, int tile, float* lines, Keep keep) {
  using Four = Pack<float, 4>;
  constexpr int kAtOnce = 4;
  const Quarters own;
  const int lane = threadIdx.x % kLanes, first = tile * kTokensOfWarp;
  const int mine = first + lane % kTokensOfWarp;
  const auto start = start_of(p, mine < p.tokens ? mine : p.tokens - 1).pixel;
  each_block(p, p.line.frames() / 4, [&](int block, int pair) {
    const int row = block * kRows + own.row, frame = own.frame(pair);
    const bool has = frame < p.line.frames();
#pragma unroll
    for (int some = 0; some < 8; some += kAtOnce) {
      Four rows[kAtOnce][2];
#pragma unroll
      for (int step = 0; step < kAtOnce; ++step) {
        const float* from = p.x + __shfl_sync(0xFFFFFFFFu, start, own.token(some + step)) + frame;
        for (int n = 0; n < 2; ++n) {
          rows[step][n] = has && row + n < p.rows() ? load_pack<Four>(from + row_offset(p, row + n)) : Four{};
        }
      }
      if (!has) continue;
#pragma unroll
      for (int step = 0; step < kAtOnce; ++step) {
        const int m = own.token(some + step);
        const Four &upper = rows[step][0], &lower = rows[step][1];
        if (first + m < p.tokens) {
          const auto to_keep = keep.at(first + m, frame);
          if (row < p.rows()) keep(to_keep, row * p.line.frames(), upper);
          if (row + 1 < p.rows()) keep(to_keep, (row + 1) * p.line.frames(), lower);
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int place = Layout<float>::in_line(m, p.group(frame + k, block), own.row);
          store_pack(lines + m * p.pitch() + place, Two<float>{{upper.at[k], lower.at[k]}});
        }
      }
    }
  });
}

// The same for any geometry, pixel by pixel, zero outside the clip.
template <class S, class X, class Keep>
AAPE_DEVICE void load_pixels(const LineParams<S>& p, int tile, X* lines, Keep keep) {
  const int lane = threadIdx.x % kLanes;
  for (int m = lane / 4; m < kTokensOfWarp; m += 8) {
    const int token = tile * kTokensOfWarp + m;
    const bool there = token < p.tokens;
    const Start<S> start = start_of(p, there ? token : p.tokens - 1);
    const auto to_keep = keep.at(token, 0);
    X* line = lines + m * p.pitch();
    for (int row = lane % 4; row < p.blocks() * kRows; row += 4) {
      const X* from = p.x + start.pixel + row_offset(p, row);
      for (int f = 0; f < p.line.frames(); ++f) {
        const int frame = start.frame + f, of_patch = f - p.line.patch_first();
        X value = X(0.0f);
        if (row < p.rows() && frame >= 0 && frame < p.grid.frames) {
          value = from[f * p.x_stride[3]];
          if (there && of_patch >= 0 && of_patch < p.line.patch()) keep(to_keep, row * p.line.patch() + of_patch, value);
        }
        line[Layout<X>::in_line(m, p.group(f, row / kRows), row % kRows)] = value;
      }
    }
  }
}

// A group's pixels of all tokens, as a left factor (tokens × rows).
template <class S>
AAPE_DEVICE Left<BFloat16> group_left(const LineParams<S>& p, const BFloat16* lines, int group) {
  const int lane = threadIdx.x % kLanes;
  return load_left(lines + lane % 16 * p.pitch() + Layout<BFloat16>::in_line(lane % 16, group, lane / 16 * 8));
}
template <class S>
AAPE_DEVICE Split<Left<float>> group_left(const LineParams<S>& p, const float* lines, int group) {
  const int lane = threadIdx.x % kLanes, m = lane / 4;
  const float* from = lines + m * p.pitch() + Layout<float>::in_line(m, group, lane % 4 * 2);
  Split<Left<float>> out;
#pragma unroll
  for (int h = 0; h < 2; ++h) {  // token m + 8 has the same places
    const auto four = load_pack<Pack<float, 4>>(from + 8 * h * p.pitch());
    out.set(h, four.at[0], four.at[1]);
    out.set(h + 2, four.at[2], four.at[3]);
  }
  return out;
}

// The same as two right factors (tokens × rows), of the rows `Layout::row_of`.
template <class X>
struct TwoRights {
  Whole<X, Right<X>> tile[2];
};

template <class S>
AAPE_DEVICE TwoRights<BFloat16> group_rights(const LineParams<S>& p, const BFloat16* lines, int group) {
  const int lane = threadIdx.x % kLanes;
  const auto four = load_rights(lines + lane % 16 * p.pitch() + Layout<BFloat16>::in_line(lane % 16, group, lane / 16 * 8));
  return {{{{four.at[0], four.at[1]}}, {{four.at[2], four.at[3]}}}};
}
template <class S>
AAPE_DEVICE TwoRights<float> group_rights(const LineParams<S>& p, const float* lines, int group) {
  const int lane = threadIdx.x % kLanes;
  const int row = Layout<float>::row_of(0, lane / 4);
  TwoRights<float> out;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Two<float> rows[2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int m = lane % 4 * 2 + n;
      rows[n] = load_pack<Two<float>>(lines + (m + 8 * half) * p.pitch() + Layout<float>::in_line(m, group, row));
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) out.tile[tile].set(half, rows[0].at[tile], rows[1].at[tile]);
  }
  return out;
}

// Bytes of one warp's.
template <class S>
size_t lines_bytes(const LineParams<S>& p) {
  return size_t(kTokensOfWarp) * size_t(Layout<typename S::X>::pitch(p.line.frames_ * p.row_blocks)) * sizeof(typename S::X);
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

// Fewer would leave the tensor cores idle: long lines on a small chip.
constexpr int kLeastWarps = 4;

// Of a block of a backward kernel, for which registers suffice: of float32 two warps a scheduler.
template <class X>
constexpr int backward_warps(int forward) {
  return std::is_same_v<X, BFloat16> ? forward : 8;
}

// This warp's first tile of tokens.
AAPE_DEVICE int first_tile() { return int(threadIdx.x / kLanes * gridDim.x + blockIdx.x); }

// visit(tokens) for the tiles of this warp, few of which are spread over all blocks first, with their lines in shared memory;
// keep is given the patches, as by `load_packs`.
template <class S, class X, class Keep, class Visit>
AAPE_DEVICE void each_tile(const LineParams<S>& p, X* lines, Keep keep, Visit visit) {
  const int tiles = (p.tokens + kTokensOfWarp - 1) / kTokensOfWarp;
  for (int tile = first_tile(); tile < tiles; tile += int(blockDim.x / kLanes * gridDim.x)) {
    if (p.packed()) load_packs(p, tile, lines, keep);
    else if constexpr (!S::kUsual) load_pixels(p, tile, lines, keep);
    __syncwarp();
    visit(tokens_at(p, tile));
    __syncwarp();  // before the lines are written again
  }
}

// Whether a call's pixels can be moved in packs of 16 bytes, of lines that are patches.
template <class X>
bool is_packed(const Grid& g, const View& x) {
  constexpr int64_t kPack = 16 / sizeof(X);
  bool packed = g.patch_t == g.window && g.patch_t % kPack == 0 && g.stride_t % kPack == 0 && x.stride[3] == 1 &&
                aligned<Pack<float, 4>>(x.data);
  for (int axis = 0; axis < 3; ++axis) packed = packed && x.stride[axis] % kPack == 0;
  return packed;
}

// Set all that p has of lines.
template <class S>
void set_lines(LineParams<S>& p, const Grid& g, const View& x, bool packed, bool time_major) {
  p.packed_ = packed;
  p.grid = narrowed<int>(g);
  const int offset = int(g.patch_t - g.window) / 2, start = offset < 0 ? offset : 0;
  const int end = int(offset + g.window > g.patch_t ? offset + g.window : g.patch_t);
  p.line = {end - start, int(g.patch_t), -start, int(g.window), offset - start, start};
  p.row_blocks = int((g.channels * g.patch_f + kRows - 1) / kRows);
  p.tokens = int(g.batch * g.n_f * g.n_t);
  p.time_major = time_major;
  p.by_inner = Divisor<int32_t>(time_major ? g.n_f : g.n_t);
  p.by_outer = Divisor<int32_t>(time_major ? g.n_t : g.n_f);
  p.by_patch_f = Divisor<int32_t>(g.patch_f);
  p.by_blocks = Divisor<int32_t>(p.row_blocks);
  p.x = reinterpret_cast<const typename S::X*>(x.data);
  copy_strides(p.x_stride, x, 4);
}

// Whether warps can project windows like a call's, if they find room.
inline bool has_lines(const Grid& g) {
  return g.quadrature && g.window % 2 == 0 && g.batch * g.n_f * g.n_t < INT32_MAX && g.channels * g.patch_f < INT16_MAX &&
         g.patch_t < INT16_MAX && g.window < INT16_MAX;
}

// Whether a call that is packed has the usual geometry.
inline bool is_usual(const Grid& g, const View& x) {
  return g.channels == 1 && g.patch_f == kRows && g.patch_t == 16 && is_small(x, {g.batch, g.channels, g.mel_bins, g.frames});
}

}  // namespace cuda
}  // namespace aape
