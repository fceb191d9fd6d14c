// Rows between a tensor's dtype and the arithmetic's. 16-bit values are widened exactly and rounded to nearest even.

#pragma once

#include <cstdint>
#include <cstring>

#include "../sblu.h"
#include "api.h"

// Compiled once and called: in every caller's code they would double the module and what the compiler takes for it.
#define AAPE_APART __attribute__((noinline))

namespace aape {
inline namespace AAPE_NAMESPACE {

inline int64_t size_of(DType type) {
  return type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : 2;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float from_bfloat16(uint16_t half) { return float_of(uint32_t(half) << 16); }
inline uint16_t to_bfloat16(float value) {
  uint32_t bits = bits_of(value);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

inline float from_float16(uint16_t half) {
  uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | ((rest & 0x3ff) << 13));
  // 2^112 scales the shifted bits. Those of a subnormal would be a subnormal of float too, which the processor may have
  // been told to flush: it is a whole number of 2^-24.
  float size = rest < 0x400 ? float(int32_t(rest)) * 0x1p-24f : float_of(rest << 13) * 0x1p112f;
  return float_of(sign | bits_of(size));
}
inline uint16_t to_float16(float value) {
  uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (rest >= 0x47800000) return uint16_t(sign | 0x7c00);  // 65536 and above
  if (rest < 0x38800000) {                                 // subnormal: let an addition round at 2^-24
    return uint16_t(sign | (bits_of(float_of(rest) + 0.5f) - bits_of(0.5f)));
  }
  uint32_t rounded = rest + 0xfff + ((rest >> 13) & 1);
  return uint16_t(sign | ((rounded - 0x38000000) >> 13));
}

template <class T>
constexpr DType kTypeOf = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

// In pieces of lengths that the compiler knows: others are calls.
template <class T>
AAPE_FN void copy_row(T* to, const T* from, int64_t count) {
  constexpr int64_t line = 64 / sizeof(T), few = 16 / sizeof(T);
  for (; count >= line; count -= line, to += line, from += line) std::memcpy(to, from, 64);
  for (; count >= few; count -= few, to += few, from += few) std::memcpy(to, from, 16);
  for (; count; --count) *to++ = *from++;
}

// to[k · to_step] = convert(from[k · from_step]); neighbours have a loop of their own, which is compiled to vectors.
template <class To, class From, class Convert>
AAPE_FN void convert_each(To* to, int64_t to_step, const From* from, int64_t from_step, int64_t count, Convert convert) {
  if (to_step == 1 && from_step == 1) {
    for (int64_t k = 0; k < count; ++k) to[k] = To(convert(from[k]));
  } else {
    for (int64_t k = 0; k < count; ++k) to[k * to_step] = To(convert(from[k * from_step]));
  }
}

template <class T>
AAPE_APART void convert_from(T* to, const char* from, DType type, int64_t stride, int64_t count) {
  const auto same = [](auto value) { return value; };
  switch (type) {
    case DType::kFloat32: return convert_each(to, 1, reinterpret_cast<const float*>(from), stride, count, same);
    case DType::kFloat64: return convert_each(to, 1, reinterpret_cast<const double*>(from), stride, count, same);
    case DType::kBFloat16:
      return convert_each(to, 1, reinterpret_cast<const uint16_t*>(from), stride, count, from_bfloat16);
    case DType::kFloat16:
      return convert_each(to, 1, reinterpret_cast<const uint16_t*>(from), stride, count, from_float16);
  }
}

template <class T>
AAPE_APART void convert_to(char* to, const T* from, DType type, int64_t stride, int64_t count) {
  const auto same = [](auto value) { return value; };
  const auto bfloat16 = [](T value) { return to_bfloat16(float(value)); };
  const auto float16 = [](T value) { return to_float16(float(value)); };
  switch (type) {
    case DType::kFloat32: return convert_each(reinterpret_cast<float*>(to), stride, from, 1, count, same);
    case DType::kFloat64: return convert_each(reinterpret_cast<double*>(to), stride, from, 1, count, same);
    case DType::kBFloat16:
      return convert_each(reinterpret_cast<uint16_t*>(to), stride, from, 1, count, bfloat16);
    case DType::kFloat16:
      return convert_each(reinterpret_cast<uint16_t*>(to), stride, from, 1, count, float16);
  }
}

// to[k] = from[k · stride], k < count; in elements
template <class T>
AAPE_FN void load_row(T* to, const char* from, DType type, int64_t stride, int64_t count) {
  if (type == kTypeOf<T> && stride == 1) copy_row(to, reinterpret_cast<const T*>(from), count);
  else convert_from(to, from, type, stride, count);
}
// to[k · stride] = from[k], k < count
template <class T>
AAPE_FN void store_row(char* to, const T* from, DType type, int64_t stride, int64_t count) {
  if (type == kTypeOf<T> && stride == 1) copy_row(reinterpret_cast<T*>(to), from, count);
  else convert_to(to, from, type, stride, count);
}

}  // namespace AAPE_NAMESPACE
}  // namespace aape
