// csrc/cuda/products.cuh's instructions, by what lanes leave for each other: included there, in its namespace.

#include <cmath>

inline float bfloat16_of(uint32_t half) { return from_bfloat16(uint16_t(half)); }

inline uint32_t pack(float first, float second) {
  return to_bfloat16(first) | uint32_t(to_bfloat16(second)) << 16;
}

// Tensor cores round sums towards zero.
inline float towards_zero(double value) {
  const float nearest = float(value);
  return std::abs(double(nearest)) > std::abs(value) ? std::nextafter(nearest, 0.0f) : nearest;
}

inline void multiply(Sums& sum, const Left<BFloat16>& a, const Right<BFloat16>& b) {
  const auto pair = [](uint32_t low, uint32_t high) { return low | uint64_t(high) << 32; };
  const emulator::Words mine = {pair(a.at[0], a.at[1]), pair(a.at[2], a.at[3]), pair(b.at[0], b.at[1])};
  const unsigned lane = emulator::thread_number() % 32, g = lane / 4, c = lane % 4;
  emulator::current()->meet(mine, [&](auto words_of) {
    for (int n = 0; n < 4; ++n) {
      const unsigned lower = n / 2, column = 2 * c + n % 2;
      double total = sum.at[n];
      for (unsigned k = 0; k < 16; ++k) {
        const emulator::Words left = words_of(g * 4 + k % 8 / 2), right = words_of(column * 4 + k % 8 / 2);
        const uint64_t a_word = left[k / 8] >> (32 * lower), b_word = right[2] >> (32 * (k / 8));
        total += double(bfloat16_of(uint32_t(a_word) >> (k % 2 * 16))) * bfloat16_of(uint32_t(b_word) >> (k % 2 * 16));
      }
      sum.at[n] = towards_zero(total);
    }
  });
}

// Two of eight columns by eight rows: a lane has columns c and c + 4 of rows g and g + 8, rows c and c + 4 of column g.
inline void multiply(Sums& sum, const Left<float>& a, const Right<float>& b) {
  const auto pair = [](float low, float high) {
    uint32_t bits[2];
    std::memcpy(bits, &low, 4);
    std::memcpy(bits + 1, &high, 4);
    return (bits[0] & 0xFFFFE000u) | uint64_t(bits[1] & 0xFFFFE000u) << 32;
  };
  const auto number = [](uint64_t word, unsigned which) {
    const uint32_t bits = uint32_t(word >> (32 * which));
    float value;
    std::memcpy(&value, &bits, 4);
    return double(value);
  };
  const unsigned lane = emulator::thread_number() % 32, g = lane / 4, c = lane % 4;
  for (int part = 0; part < 2; ++part) {
    const Pack<float, 2>&upper = a.at[2 * part], &lower = a.at[2 * part + 1], &right = b.at[part];
    const emulator::Words mine = {pair(upper.at[0], lower.at[0]), pair(upper.at[1], lower.at[1]),
                                  pair(right.at[0], right.at[1])};
    emulator::current()->meet(mine, [&](auto words_of) {
      for (int n = 0; n < 4; ++n) {
        double total = sum.at[n];
        for (unsigned k = 0; k < 8; ++k) {
          total += number(words_of(g * 4 + k % 4)[k / 4], n / 2) * number(words_of((2 * c + n % 2) * 4 + k % 4)[2], k / 4);
        }
        sum.at[n] = towards_zero(total);
      }
    });
  }
}

// word(matrix, row, column pair) of the four 8 × 8 whose rows the lanes name
template <bool kTransposed>
inline Left<BFloat16> load_matrices(const BFloat16* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) throw std::invalid_argument("a row of a matrix that is not aligned");
  const unsigned lane = emulator::thread_number() % 32, g = lane / 4, c = lane % 4;
  Left<BFloat16> out;
  emulator::current()->meet({reinterpret_cast<uint64_t>(row)}, [&](auto words_of) {
    const auto at = [&](int matrix, unsigned line, unsigned column) {
      return uint32_t(reinterpret_cast<const BFloat16*>(words_of(matrix * 8 + line)[0])[column].bits);
    };
    for (int matrix = 0; matrix < 4; ++matrix) {
      out.at[matrix] = kTransposed ? at(matrix, 2 * c, g) | at(matrix, 2 * c + 1, g) << 16
                                   : at(matrix, g, 2 * c) | at(matrix, g, 2 * c + 1) << 16;
    }
  });
  return out;
}
inline Left<BFloat16> load_left(const BFloat16* row) { return load_matrices<false>(row); }
inline Left<BFloat16> load_rights(const BFloat16* row) { return load_matrices<true>(row); }

inline uint32_t transposed(uint32_t pair) {
  const unsigned lane = emulator::thread_number() % 32, g = lane / 4, c = lane % 4;
  uint32_t out = 0;
  emulator::current()->meet({pair}, [&](auto words_of) {
    for (unsigned n = 0; n < 2; ++n) {
      const uint64_t word = words_of((2 * c + n) * 4 + g / 2)[0];
      out |= uint32_t(word >> (g % 2 * 16) & 0xFFFF) << (16 * n);
    }
  });
  return out;
}
