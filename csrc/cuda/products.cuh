// Products of one warp on the tensor cores: sums (16 × 8), in float32, of a left factor (16 × 16) times a right one (16 × 8),
// for pixels X of bfloat16 or float32. With g = lane / 4 and c = lane % 4, a lane holds
//
//     left   rows g, g + 8 of columns 2c, 2c + 1 and of columns 2c + 8, 2c + 9
//     right  column g of rows 2c, 2c + 1 and of rows 2c + 8, 2c + 9
//     sums   rows g, g + 8 of columns 2c, 2c + 1
//
// so that two sums side by side are a left factor without a word between lanes. Numbers are split in two, high and low: what
// bfloat16 cannot hold is exact to 2⁻¹⁷ then, and float32 as two of TF32 to 2⁻²². The product of both low parts is left out.

#pragma once

#include "device.h"

namespace aape {
namespace cuda {

// Two neighbours: of bfloat16 in one register, the first in its low half.
template <class X>
using Two = std::conditional_t<std::is_same_v<X, BFloat16>, uint32_t, Pack<float, 2>>;

template <class X_>
struct Left {
  using X = X_;
  Two<X> at[4];  // (g, 2c), (g + 8, 2c), (g, 2c + 8), (g + 8, 2c + 8) and their right neighbours
};
template <class X_>
struct Right {
  using X = X_;
  Two<X> at[2];  // (2c, g), (2c + 8, g) and their lower neighbours
};
struct Sums {
  float at[4] = {0, 0, 0, 0};  // (g, 2c), (g, 2c + 1), (g + 8, 2c), (g + 8, 2c + 1)
};

#if defined(__CUDACC__)

AAPE_DEVICE uint32_t pack(float first, float second) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&two);
}

// sum += a · b
AAPE_DEVICE void multiply(Sums& sum, const Left<BFloat16>& a, const Right<BFloat16>& b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum.at[0]), "+f"(sum.at[1]), "+f"(sum.at[2]), "+f"(sum.at[3])
      : "r"(a.at[0]), "r"(a.at[1]), "r"(a.at[2]), "r"(a.at[3]), "r"(b.at[0]), "r"(b.at[1]));
}

// Eight of the sixteen at once, of numbers that are rounded to TF32 by leaving out their last bits.
AAPE_DEVICE void multiply(Sums& sum, const Left<float>& a, const Right<float>& b) {
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum.at[0]), "+f"(sum.at[1]), "+f"(sum.at[2]), "+f"(sum.at[3])
        : "r"(__float_as_uint(a.at[2 * k].at[0])), "r"(__float_as_uint(a.at[2 * k + 1].at[0])),
          "r"(__float_as_uint(a.at[2 * k].at[1])), "r"(__float_as_uint(a.at[2 * k + 1].at[1])),
          "r"(__float_as_uint(b.at[k].at[0])), "r"(__float_as_uint(b.at[k].at[1])));
  }
}

// A left factor of rows in shared memory, 16-byte aligned: `row` is row lane % 16 at column lane / 16 · 8.
AAPE_DEVICE Left<BFloat16> load_left(const BFloat16* row) {
  Left<BFloat16> out;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out.at[0]), "=r"(out.at[1]), "=r"(out.at[2]), "=r"(out.at[3])
               : "r"(unsigned(__cvta_generic_to_shared(row)))
               : "memory");
  return out;
}

// The same 16 × 16 as right factors: at[0], at[1] are the one of columns 0 … 7, at[2], at[3] that of columns 8 … 15.
AAPE_DEVICE Left<BFloat16> load_rights(const BFloat16* row) {
  Left<BFloat16> out;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out.at[0]), "=r"(out.at[1]), "=r"(out.at[2]), "=r"(out.at[3])
               : "r"(unsigned(__cvta_generic_to_shared(row)))
               : "memory");
  return out;
}

// 8 × 8 across the warp, row g of columns 2c, 2c + 1, transposed.
AAPE_DEVICE uint32_t transposed(uint32_t pair) {
  uint32_t out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
  return out;
}

#else
#include "products.h"
#endif

AAPE_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
AAPE_DEVICE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
AAPE_DEVICE uint32_t lower_halves(uint32_t a, uint32_t b) { return (a & 0xFFFFu) | b << 16; }
AAPE_DEVICE uint32_t upper_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xFFFF0000u); }

// The same of 32 bits, by halves.
AAPE_DEVICE Pack<float, 2> transposed(const Pack<float, 2>& pair) {
  const uint32_t first = bits_of(pair.at[0]), second = bits_of(pair.at[1]);
  const uint32_t lower = transposed(lower_halves(first, second)), upper = transposed(upper_halves(first, second));
  return {{float_of(lower_halves(lower, upper)), float_of(upper_halves(lower, upper))}};
}

template <class Factor>
struct Split {
  using X = typename Factor::X;
  Factor high, low;
  AAPE_DEVICE void set(int k, float first, float second) {
    if constexpr (std::is_same_v<X, BFloat16>) {
      const uint32_t word = pack(first, second);
      high.at[k] = word;
      low.at[k] = pack(first - float_of(word << 16), second - float_of(word & 0xFFFF0000u));
    } else {
      const float both[2] = {first, second};
      for (int n = 0; n < 2; ++n) {
        high.at[k].at[n] = float_of(bits_of(both[n]) & 0xFFFFE000u);
        low.at[k].at[n] = both[n] - high.at[k].at[n];
      }
    }
  }
};

AAPE_DEVICE const Left<BFloat16>& split(const Left<BFloat16>& whole) { return whole; }
AAPE_DEVICE Split<Left<float>> split(const Left<float>& whole) {
  Split<Left<float>> out;
#pragma unroll
  for (int k = 0; k < 4; ++k) out.set(k, whole.at[k].at[0], whole.at[k].at[1]);
  return out;
}

// The factors that pixels are, in the shared memory's X without loss.
template <class X, class Factor>
using Whole = std::conditional_t<std::is_same_v<X, BFloat16>, Factor, Split<Factor>>;

template <class X>
AAPE_DEVICE void multiply(Sums& sum, const Left<X>& a, const Split<Right<X>>& b) {
  multiply(sum, a, b.low);
  multiply(sum, a, b.high);
}
template <class X>
AAPE_DEVICE void multiply(Sums& sum, const Split<Left<X>>& a, const Split<Right<X>>& b) {
  multiply(sum, a.low, b.high);
  multiply(sum, a.high, b);
}

// sum += a · b, where float32 is to be kept: tensor cores round every sum towards zero, so a product is made by itself.
template <class A, class B>
AAPE_DEVICE void add_product(Sums& sum, const A& a, const B& b) {
  if constexpr (std::is_same_v<typename A::X, BFloat16>) {
    multiply(sum, a, b);
  } else {
    Sums product;
    multiply(product, a, b);
    for (int k = 0; k < 4; ++k) sum.at[k] += product.at[k];
  }
}

// Sums n and n + 1 of the columns, n even, as halves of a left factor.
template <class Factor>
AAPE_DEVICE void set_half(Split<Factor>& left, int n, const Sums& sum) {
  left.set(n % 2 * 2, sum.at[0], sum.at[1]);
  left.set(n % 2 * 2 + 1, sum.at[2], sum.at[3]);
}

// Right factors in shared memory as the lanes hold them, so that a lane's is one access of 16 bytes: of bfloat16 split.
template <class X>
using Weights = Pack<std::conditional_t<std::is_same_v<X, BFloat16>, uint32_t, float>, 4>;

AAPE_DEVICE Split<Right<BFloat16>> load_right(const Weights<BFloat16>* tile) {
  const auto word = tile[threadIdx.x % 32];
  return {{{word.at[0], word.at[1]}}, {{word.at[2], word.at[3]}}};
}
AAPE_DEVICE Split<Right<float>> load_right(const Weights<float>* tile) {
  const auto word = tile[threadIdx.x % 32];
  Split<Right<float>> out;
  out.set(0, word.at[0], word.at[1]);
  out.set(1, word.at[2], word.at[3]);
  return out;
}

// A thread's parts of what many do together: the first one, and how far they are apart.
struct Share {
  int first, apart;
};
AAPE_DEVICE Share of_block() { return {int(threadIdx.x), int(blockDim.x)}; }
AAPE_DEVICE Share of_launch() { return {int(blockIdx.x * blockDim.x + threadIdx.x), int(gridDim.x * blockDim.x)}; }

// What a lane has of one, from its numbers.
template <class W>
AAPE_DEVICE W right_of(const float (&of_lane)[4]) {
  if constexpr (std::is_same_v<W, Weights<float>>) {
    return {{of_lane[0], of_lane[1], of_lane[2], of_lane[3]}};
  } else {
    Split<Right<BFloat16>> split;
    split.set(0, of_lane[0], of_lane[1]);
    split.set(1, of_lane[2], of_lane[3]);
    return {{split.high.at[0], split.high.at[1], split.low.at[0], split.low.at[1]}};
  }
}
// The row of number k of a lane.
AAPE_DEVICE int row_of(int lane, int k) { return lane % 4 * 2 + k % 2 + k / 2 * 8; }

// Fill `tiles` of them, whose columns are neighbours in memory: value(tile, row, column).
template <class W, class Value>
AAPE_DEVICE void fill_rights(W* to, int tiles, Value value) {
  for (int n = int(threadIdx.x); n < tiles * 32; n += int(blockDim.x)) {
    const int tile = n / 32, lane = n % 32;
    float of_lane[4];
    for (int k = 0; k < 4; ++k) of_lane[k] = value(tile, row_of(lane, k), lane / 4);
    to[n] = right_of<W>(of_lane);
  }
}

// Lanes n and n + 4 have two words each: the lower one gets both of their first words, the upper one both of the second.
AAPE_DEVICE Pack<uint32_t, 2> of_lower_and_upper(bool upper, uint32_t first, uint32_t second) {
  const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, upper ? first : second, 4);
  return upper ? Pack<uint32_t, 2>{{other, second}} : Pack<uint32_t, 2>{{first, other}};
}

// The same where rows are, value(tile, row, column) of two of them: eight lanes read the sixteen of a column, and so whole
// sectors. Lanes that have rows 2c and 2c + 8 fill one place.
template <class W, class Value>
AAPE_DEVICE void fill_rights_of_rows(W* to, int tiles, Value value, const Share& share) {
  for (int n = share.first; n < tiles * 64; n += share.apart) {
    const int pair = n % 8, half = pair / 4;
    const Pack<float, 2> two = value(n / 64, 2 * pair, n / 8 % 8);
    const auto place = [&](auto out) { store_pack(&to[n / 8 * 4 + pair % 4].at[2 * half], out); };
    if constexpr (std::is_same_v<W, Weights<float>>) {
      place(two);
    } else {
      Split<Right<BFloat16>> split;
      split.set(0, two.at[0], two.at[1]);
      place(of_lower_and_upper(half, split.high.at[0], split.low.at[0]));
    }
  }
}

// The same of `apart` for each of the frames where these are, value(frame, tile of it, row, column) of two of them: a warp has
// sixteen, so that it reads whole sectors.
template <class W, class Value>
AAPE_DEVICE void fill_rights_of_frames(W* to, int frames, int apart, Value value, const Share& share) {
  for (int first = 0; first < frames; first += 16) {
    for (int n = share.first; n < apart * 256; n += share.apart) {
      const int lane = n / 32 % 8 * 4 + n % 4, frame = first + n % 32 / 4 * 2, tile = n / 256;
      if (frame >= frames) continue;
      float of_lane[2][4];
      for (int k = 0; k < 4; ++k) {
        const Pack<float, 2> two = value(frame, tile, row_of(lane, k), lane / 4);
        of_lane[0][k] = two.at[0];
        of_lane[1][k] = two.at[1];
      }
      W* const at = to + (frame * apart + tile) * 32 + lane;
      *at = right_of<W>(of_lane[0]);
      if (frame + 1 < frames) at[apart * 32] = right_of<W>(of_lane[1]);
    }
  }
}

}  // namespace cuda
}  // namespace aape
