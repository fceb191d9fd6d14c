// The pixels under a warp's tokens, out of global memory into its lines.

#pragma once

#include "lines.cuh"

namespace aape {
namespace cuda {

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

// A lane's two rows of a block and four frames of a pair of packs, where two lanes have eight frames of float32, and half a warp
// two tokens' sixteen rows; eight steps are a warp's tokens.
struct Quarters {
  int row, of_pair, half;
  AAPE_DEVICE Quarters() {
    const int lane = threadIdx.x % kLanes;
    row = lane % 8 * 2, of_pair = lane / 8 % 2, half = lane / 16;
  }
  AAPE_DEVICE int token(int step) const { return step * 2 + of_pair; }
  AAPE_DEVICE int frame(int pair) const { return (pair + half) * 4; }
};

// Sixteen numbers in 16 bits, of which a lane of either half of the warp has every other four: these lanes exchange four, and
// have eight each that are next to each other, together a sector. Every lane of the warp comes here.
template <class O>
AAPE_DEVICE void store_sixteen(O* to, bool there, int half, const Quad<float> (&own)[2]) {
  Pack<O, 8> eight;
#pragma unroll
  for (int k = 0; k < 8; ++k) eight.at[k] = narrow<O>(own[k / 4].at[k % 4]);
  uint32_t word[4];
  memcpy(word, &eight, sizeof(word));
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, half ? word[k] : word[2 + k], kLanes / 2);
    if (half) word[k] = other;
    else word[2 + k] = other;
  }
  memcpy(&eight, word, sizeof(word));
  if (there) store_global(to + half * 8, eight);
}

// Two rows' pixels of frames `frame` … -> a token's line.
template <class S>
AAPE_DEVICE void put_two_rows(const LineParams<S>& p, float* lines, int m, int frame, int block, int row, const Quad<float>& upper,
                              const Quad<float>& lower) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int place = Layout<float>::in_line(m, p.group(frame + k, block), row);
    store_shared(lines + m * p.pitch() + place, Two<float>{{upper.at[k], lower.at[k]}});
  }
}

// For patches of sixteen frames that are kept in 16 bits.
template <class S, class Keep>
AAPE_DEVICE void load_packs_of_sixteen(const LineParams<S>& p, int tile, float* lines, Keep keep) {
  constexpr int kAtOnce = 2;
  const Quarters own;
  const int lane = threadIdx.x % kLanes, first = tile * kTokensOfWarp;
  const int mine = first + lane % kTokensOfWarp;
  const auto start = start_of(p, mine < p.tokens ? mine : p.tokens - 1).pixel;
#pragma unroll
  for (int some = 0; some < 8; some += kAtOnce) {
    Quad<float> rows[kAtOnce][2][2];  // [step][upper, lower][pair]
#pragma unroll
    for (int step = 0; step < kAtOnce; ++step) {
      const float* from = p.x + __shfl_sync(0xFFFFFFFFu, start, own.token(some + step));
      for (int n = 0; n < 2; ++n)
        for (int pair = 0; pair < 2; ++pair) {
          rows[step][n][pair] = load_pack<Quad<float>>(from + row_offset(p, own.row + n) + own.frame(2 * pair));
        }
    }
#pragma unroll
    for (int step = 0; step < kAtOnce; ++step) {
      const int m = own.token(some + step);
      for (int pair = 0; pair < 2; ++pair) {
        put_two_rows(p, lines, m, own.frame(2 * pair), 0, own.row, rows[step][0][pair], rows[step][1][pair]);
      }
      for (int n = 0; n < 2; ++n) keep.sixteen(first + m, first + m < p.tokens, own.row + n, own.half, rows[step][n]);
    }
  }
}

template <class S, class Keep>
AAPE_DEVICE void load_packs(const LineParams<S>& p, int tile, float* lines, Keep keep) {
  if constexpr (S::kUsual && Keep::kNarrow) return load_packs_of_sixteen(p, tile, lines, keep);
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
        put_two_rows(p, lines, m, frame, block, own.row, upper, lower);
      }
    }
  });
}

// Of patches nothing is wanted.
struct KeepNothing {
  static constexpr bool kNarrow = false;
  AAPE_DEVICE int at(int, int) const { return 0; }
  template <class Pixels>
  AAPE_DEVICE void operator()(int, int, const Pixels&) const {}
};

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

}  // namespace cuda
}  // namespace aape
