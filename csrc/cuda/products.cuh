// Products of one warp on the tensor cores: sums (16 × 8), in float32, of a left factor (16 × 16) times a right one (16 × 8)
// of bfloat16. With g = lane / 4 and c = lane % 4, a lane holds
//
//     left   rows g, g + 8 of columns 2c, 2c + 1 and of columns 2c + 8, 2c + 9
//     right  column g of rows 2c, 2c + 1 and of rows 2c + 8, 2c + 9
//     sums   rows g, g + 8 of columns 2c, 2c + 1
//
// so that two sums side by side are a left factor without a word between lanes. What bfloat16 cannot hold is split in two.

#pragma once

#include "device.h"

namespace aape {
namespace cuda {

// Two numbers a word, the first in the low half.
struct Left {
  uint32_t at[4];  // (g, 2c), (g + 8, 2c), (g, 2c + 8), (g + 8, 2c + 8) and their right neighbours
};
struct Right {
  uint32_t at[2];  // (2c, g), (2c + 8, g) and their lower neighbours
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
AAPE_DEVICE void multiply(Sums& sum, const Left& a, const Right& b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum.at[0]), "+f"(sum.at[1]), "+f"(sum.at[2]), "+f"(sum.at[3])
      : "r"(a.at[0]), "r"(a.at[1]), "r"(a.at[2]), "r"(a.at[3]), "r"(b.at[0]), "r"(b.at[1]));
}

// A left factor of rows in shared memory, 16-byte aligned: `row` is row lane % 16 at column lane / 16 · 8.
AAPE_DEVICE Left load_left(const BFloat16* row) {
  Left out;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out.at[0]), "=r"(out.at[1]), "=r"(out.at[2]), "=r"(out.at[3])
               : "r"(unsigned(__cvta_generic_to_shared(row)))
               : "memory");
  return out;
}

// The same 16 × 16 as right factors: at[0], at[1] are the one of columns 0 … 7, at[2], at[3] that of columns 8 … 15.
AAPE_DEVICE Left load_rights(const BFloat16* row) {
  Left out;
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

AAPE_DEVICE float first_of(uint32_t pair) {
  pair <<= 16;
  float value;
  memcpy(&value, &pair, 4);
  return value;
}
AAPE_DEVICE float second_of(uint32_t pair) {
  pair &= 0xFFFF0000u;
  float value;
  memcpy(&value, &pair, 4);
  return value;
}

// high + low, exact to 2⁻¹⁷.
template <class Factor>
struct Split {
  Factor high, low;
  AAPE_DEVICE void set(int k, float first, float second) {
    high.at[k] = pack(first, second);
    low.at[k] = pack(first - first_of(high.at[k]), second - second_of(high.at[k]));
  }
};

AAPE_DEVICE void multiply(Sums& sum, const Left& a, const Split<Right>& b) {
  multiply(sum, a, b.low);
  multiply(sum, a, b.high);
}
AAPE_DEVICE void multiply(Sums& sum, const Split<Left>& a, const Split<Right>& b) {
  multiply(sum, a.low, b.high);
  multiply(sum, a.high, b);
}

// Sums n and n + 1 of the columns, n even, as halves of a left factor.
template <class Factor>
AAPE_DEVICE void set_half(Split<Factor>& left, int n, const Sums& sum) {
  left.set(n % 2 * 2, sum.at[0], sum.at[1]);
  left.set(n % 2 * 2 + 1, sum.at[2], sum.at[3]);
}

// Right factors in shared memory as the lanes hold them, so that a lane's is one access of 16 bytes.
using Weights = Pack<uint32_t, 4>;

AAPE_DEVICE Split<Right> load_right(const Weights* tile) {
  const Weights word = tile[threadIdx.x % 32];
  return {{{word.at[0], word.at[1]}}, {{word.at[2], word.at[3]}}};
}

// Fill `tiles` of them, the block's threads together: value(tile, row, column).
template <class Value>
AAPE_DEVICE void fill_rights(Weights* to, int tiles, Value value) {
  for (int n = threadIdx.x; n < tiles * 32; n += blockDim.x) {
    const int tile = n / 32, column = n % 32 / 4, row = n % 4 * 2;
    Split<Right> split;
    for (int half = 0; half < 2; ++half) {
      const int k = row + 8 * half;
      split.set(half, value(tile, k, column), value(tile, k + 1, column));
    }
    to[n] = {{split.high.at[0], split.high.at[1], split.low.at[0], split.low.at[1]}};
  }
}

}  // namespace cuda
}  // namespace aape
