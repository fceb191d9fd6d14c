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
// are the same 16 frames of 16 rows, the kernel is in quadrature and pixels can be moved 16 bytes at once.
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
  Divisor<int32_t> by_inner, by_outer, by_patch_f;  // the faster axis of tokens, the slower one

  AAPE_DEVICE int rows() const { return S::kUsual ? kRows : grid.channels * grid.patch_f; }
  AAPE_DEVICE int length() const { return rows() * line.patch(); }
  AAPE_DEVICE bool quadrature() const { return S::kUsual || grid.quadrature; }
  AAPE_DEVICE bool packed() const { return S::kUsual || packed_; }
  AAPE_DEVICE int blocks() const { return S::kUsual ? 1 : row_blocks; }
  AAPE_DEVICE int group(int frame, int block) const { return frame * blocks() + block; }
  template <class Y = X>
  AAPE_DEVICE int pitch() const {
    return Layout<Y>::pitch(group(line.frames(), 0));
  }
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

// A group's pixels of all tokens, as a left factor (tokens × rows).
template <class S>
AAPE_DEVICE Left<BFloat16> whole_left(const LineParams<S>& p, const BFloat16* lines, int group) {
  const int lane = threadIdx.x % kLanes;
  return load_left(lines + lane % 16 * p.pitch() + Layout<BFloat16>::in_line(lane % 16, group, lane / 16 * 8));
}
template <class S>
AAPE_DEVICE Left<float> whole_left(const LineParams<S>& p, const float* lines, int group) {
  const int lane = threadIdx.x % kLanes, m = lane / 4;
  const float* from = lines + m * p.pitch() + Layout<float>::in_line(m, group, lane % 4 * 2);
  Left<float> out;
#pragma unroll
  for (int h = 0; h < 2; ++h) {  // token m + 8 has the same places
    const auto four = load_pack<Pack<float, 4>>(from + 8 * h * p.pitch());
    out.at[h] = {{four.at[0], four.at[1]}};
    out.at[h + 2] = {{four.at[2], four.at[3]}};
  }
  return out;
}

// The same as products take it.
template <class S, class X>
AAPE_DEVICE Whole<X, Left<X>> group_left(const LineParams<S>& p, const X* lines, int group) {
  return split(whole_left(p, lines, group));
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
template <class S, class X = typename S::X>
size_t lines_bytes(const LineParams<S>& p) {
  return size_t(kTokensOfWarp) * size_t(Layout<X>::pitch(p.line.frames_ * p.row_blocks)) * sizeof(X);
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

// This warp's first tile of tokens. From lane 0, so that nvcc knows it to be that of all lanes: it would have every shuffle in the
// loop over tiles wait for lanes that might be elsewhere, by a fifth more code (benchmarks/NOTES.md).
AAPE_DEVICE int first_tile() {
  const int warp = __shfl_sync(0xFFFFFFFFu, int(threadIdx.x / kLanes), 0);
  return warp * int(gridDim.x) + int(blockIdx.x);
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
  p.x = reinterpret_cast<const typename S::X*>(x.data);
  copy_strides(p.x_stride, x, 4);
}

// Whether warps can project windows like a call's, if they find room.
inline bool has_lines(const Grid& g) {
  return g.window % 2 == 0 && g.batch * g.n_f * g.n_t < INT32_MAX && g.channels * g.patch_f < INT16_MAX &&
         g.patch_t < INT16_MAX && g.window < INT16_MAX;
}

// Whether a call that is packed has the usual geometry.
inline bool is_usual(const Grid& g, const View& x) {
  return g.quadrature && g.channels == 1 && g.patch_f == kRows && g.patch_t == 16 && is_small(x, {g.batch, g.channels, g.mel_bins, g.frames});
}

}  // namespace cuda
}  // namespace aape
