// What a kernel needs of the device: launching, shared memory, 16-byte accesses. The kernels are CUDA C++ for nvcc; the
// tests compile the same sources with a host compiler, behind tests/emulator/emulator.h, which stands in for all this.

#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../calls.h"

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define AAPE_DEVICE __device__ __forceinline__

// Shared memory of the size given at launch; one declaration a kernel.
#define AAPE_DYN_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace aape {
using BFloat16 = __nv_bfloat16;
using Float16 = __half;

inline void check(cudaError_t status, const char* operation) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(operation) + ": " + cudaGetErrorString(status));
}

inline int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&value, which, device), "device");
  return value;
}
// The bytes of shared memory that a block can have.
inline size_t shared_limit() { return size_t(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)); }
inline int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }

// More than 48 KB of shared memory is only had by asking: for all that there is, as this belongs to the kernel, which others may
// launch meanwhile with more or less.
template <class Kernel>
void allow_shared(Kernel kernel, size_t bytes, const char* operation) {
  if (bytes <= 48 * 1024) return;
  const size_t most = shared_limit();
  if (bytes > most) {
    throw std::runtime_error(std::string(operation) + ": window: expected one whose frames fit into " +
                             std::to_string(most) + " bytes of shared memory, got " + std::to_string(bytes));
  }
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(most)), operation);
}
}  // namespace aape

#define AAPE_LAUNCH(operation, kernel, grid, block, shared, stream, ...)                \
  do {                                                                                  \
    aape::allow_shared(kernel, shared, operation);                                      \
    kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__);    \
    aape::check(cudaGetLastError(), operation);                                         \
  } while (0)

namespace aape {
// Into the cache, for who reads it soon.
AAPE_DEVICE void prefetch(const void* address) { asm volatile("prefetch.global.L2 [%0];" : : "l"(address)); }
// From global to shared memory, both aligned, while the thread goes on; it is there when `wait_for_copies` has returned.
AAPE_DEVICE void copy_16_bytes(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(unsigned(__cvta_generic_to_shared(to))),
               "l"(__cvta_generic_to_global(from))
               : "memory");
}
AAPE_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
}  // namespace aape

#else
#include "emulator.h"
#endif

#include "../sblu.h"

namespace aape {

// One state a thread.
template <class T>
struct ScalarMath {
  using Scalar = T;
  using Mask = bool;
  static constexpr bool kDouble = sizeof(T) == 8;
  static constexpr int kMantissa = kDouble ? 52 : 23;  // bits
  using Bits = std::conditional_t<kDouble, int64_t, int32_t>;
  static AAPE_FN T splat(T value) { return value; }
  static AAPE_FN T select(bool mask, T a, T b) { return mask ? a : b; }
  static AAPE_FN T round(T x) { return kDouble ? T(rint(double(x))) : T(rintf(float(x))); }
  static AAPE_FN T floor(T x) { return kDouble ? T(::floor(double(x))) : T(floorf(float(x))); }
  // of a whole number, for results that are normal numbers
  static AAPE_FN T exp2(T n) {
    // unsigned: of NaN, which has no exponent, the sum is negative
    const auto bits = std::make_unsigned_t<Bits>(Bits(n) + (kDouble ? 1023 : 127)) << kMantissa;
    T power;
    memcpy(&power, &bits, sizeof(T));
    return power;
  }
  static AAPE_FN T sqrt(T x) { return kDouble ? T(::sqrt(double(x))) : T(sqrtf(float(x))); }
  // x = 2^exponent · result, the result from √½ to √2; for positive normal x
  static AAPE_FN T split(T x, T& exponent) {
    const T least = T(0.70710678118654752440);
    Bits bits, from;
    memcpy(&bits, &x, sizeof(T));
    memcpy(&from, &least, sizeof(T));
    const Bits n = (bits - from) >> kMantissa;
    exponent = T(n);
    bits -= n * (Bits(1) << kMantissa);
    memcpy(&x, &bits, sizeof(T));
    return x;
  }
  static AAPE_FN bool any(bool mask) { return mask; }
};
template <>
struct Math<float> : ScalarMath<float> {};
template <>
struct Math<double> : ScalarMath<double> {};

template <class T, class IO>
AAPE_FN T widen(IO value) {
  return T(float(value));
}
template <>
AAPE_FN double widen<double, double>(double value) {
  return value;
}

template <class IO, class T>
AAPE_FN IO narrow(T value) {
  return IO(float(value));
}
template <>
AAPE_FN double narrow<double, double>(double value) {
  return value;
}

// N neighbours, moved in accesses of 16 bytes, or of their size where that is less.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T at[N];
};
template <class T>
using Quad = Pack<T, 4>;

template <class P, class T>
AAPE_FN bool aligned(const T* address) {
  return reinterpret_cast<uintptr_t>(address) % alignof(P) == 0;
}
template <class P, class T>
AAPE_DEVICE P load_pack(const T* from) {
  return *reinterpret_cast<const P*>(from);
}
template <class P, class T>
AAPE_DEVICE void store_pack(T* to, const P& value) {
  *reinterpret_cast<P*>(to) = value;
}
// The same where `to` is in global memory, or in shared memory, of at most four words in one access: of a pack that is used
// otherwise, too, nvcc makes a store a word, with the bank conflicts of every fourth one, or an eighth of the sectors that it
// asks for.
//
// `store_global` is for what the kernel does not read again: other accesses need not keep their order beside it.
#ifdef __CUDACC__
#define AAPE_STORE(space, address, ...)                                                                                \
  if constexpr (sizeof(P) > 16) return store_pack(to, value);                                                          \
  uint32_t word[sizeof(P) / 4];                                                                                        \
  memcpy(word, &value, sizeof(P));                                                                                     \
  if constexpr (sizeof(P) == 16) {                                                                                     \
    asm volatile("st." space ".v4.b32 [%0], {%1, %2, %3, %4};" ::address, "r"(word[0]), "r"(word[1]), "r"(word[2]),    \
                 "r"(word[3])                                                                                          \
                 : __VA_ARGS__);                                                                                       \
  } else if constexpr (sizeof(P) == 8) {                                                                               \
    asm volatile("st." space ".v2.b32 [%0], {%1, %2};" ::address, "r"(word[0]), "r"(word[1]) : __VA_ARGS__);           \
  } else if constexpr (sizeof(P) == 4) {                                                                               \
    asm volatile("st." space ".b32 [%0], %1;" ::address, "r"(word[0]) : __VA_ARGS__);                                  \
  }
#else
#define AAPE_STORE(space, address, ...) store_pack(to, value);
#endif
template <class P, class T>
AAPE_DEVICE void store_global(T* to, const P& value) {
  static_assert(sizeof(P) % 4 == 0, "whole words");
  AAPE_STORE("global", "l"(__cvta_generic_to_global(to)), )
}
template <class P, class T>
AAPE_DEVICE void store_shared(T* to, const P& value) {
  static_assert(sizeof(P) % 4 == 0, "whole words");
  AAPE_STORE("shared", "r"(unsigned(__cvta_generic_to_shared(to))), "memory")
}
#undef AAPE_STORE

// In place of x's type, in a kernel that learns at run time which of float's it is. run(IO()) with the type itself.
struct AnyFloat {};

template <class IO, class Run>
AAPE_DEVICE void with_type(DType type, Run run) {
  if constexpr (!std::is_same_v<IO, AnyFloat>) run(IO());
  else if (type == DType::kBFloat16) run(BFloat16());
  else if (type == DType::kFloat16) run(Float16());
  else run(float());
}

// Numbers whose type is only known at run time: y, its cotangent, the operand. Every thread takes the same branch.
struct Values {
  void* data;
  DType type;
};

template <class T, class I>
AAPE_DEVICE T load(const Values& from, I at) {
  if (sizeof(T) == 8) return T(static_cast<const double*>(from.data)[at]);
  if (from.type == DType::kBFloat16) return T(float(static_cast<const BFloat16*>(from.data)[at]));
  if (from.type == DType::kFloat16) return T(float(static_cast<const Float16*>(from.data)[at]));
  return T(static_cast<const float*>(from.data)[at]);
}

// Two neighbours, or one and a zero: one access where their address allows it.
template <class IO>
AAPE_DEVICE Pack<float, 2> load_two_as(const IO* from, bool two) {
  if (two && aligned<Pack<IO, 2>>(from)) {
    const auto pair = load_pack<Pack<IO, 2>>(from);
    return {{widen<float>(pair.at[0]), widen<float>(pair.at[1])}};
  }
  return {{widen<float>(from[0]), two ? widen<float>(from[1]) : 0.0f}};
}
template <class I>
AAPE_DEVICE Pack<float, 2> load_two(const Values& from, I at, bool two) {
  if (from.type == DType::kBFloat16) return load_two_as(static_cast<const BFloat16*>(from.data) + at, two);
  if (from.type == DType::kFloat16) return load_two_as(static_cast<const Float16*>(from.data) + at, two);
  return load_two_as(static_cast<const float*>(from.data) + at, two);
}

template <class T, class I>
AAPE_DEVICE void store(const Values& to, I at, T value) {
  if (sizeof(T) == 8) static_cast<double*>(to.data)[at] = double(value);
  else if (to.type == DType::kBFloat16) static_cast<BFloat16*>(to.data)[at] = BFloat16(float(value));
  else if (to.type == DType::kFloat16) static_cast<Float16*>(to.data)[at] = Float16(float(value));
  else static_cast<float*>(to.data)[at] = float(value);
}

// The first `count` of a quad, in one access where the address allows it.
template <class O, class T>
AAPE_DEVICE void store_quad_as(O* to, const Quad<T>& value, int count) {
  if (count == 4 && aligned<Quad<O>>(to)) {
    Quad<O> out;
    for (int k = 0; k < 4; ++k) out.at[k] = narrow<O, T>(value.at[k]);
    store_pack(to, out);
  } else {
    for (int k = 0; k < 4; ++k)
      if (k < count) to[k] = narrow<O, T>(value.at[k]);
  }
}

template <class I>
AAPE_DEVICE void store_quad(const Values& to, I at, const Quad<double>& value, int count) {
  store_quad_as(static_cast<double*>(to.data) + at, value, count);
}
template <class I>
AAPE_DEVICE void store_quad(const Values& to, I at, const Quad<float>& value, int count) {
  if (to.type == DType::kBFloat16) store_quad_as(static_cast<BFloat16*>(to.data) + at, value, count);
  else if (to.type == DType::kFloat16) store_quad_as(static_cast<Float16*>(to.data) + at, value, count);
  else store_quad_as(static_cast<float*>(to.data) + at, value, count);
}

template <class I>
GridOf<I> narrowed(const Grid& g) {
  return {I(g.batch), I(g.channels), I(g.mel_bins), I(g.frames), I(g.patch_f), I(g.patch_t), I(g.stride_f),
          I(g.stride_t), I(g.window), I(g.n_f), I(g.n_t), I(g.states), g.quadrature};
}

// Whether offsets within a tensor of these extents fit into 32 bits.
inline bool is_small(const View& view, std::initializer_list<int64_t> extents) {
  int64_t last = 0;
  const int64_t* stride = view.stride;
  for (int64_t extent : extents) last += (extent > 0 ? extent - 1 : 0) * *stride++;
  return last < INT32_MAX;
}

// The first axis of a launch; the others are blocks of states and rows, always few.
inline unsigned blocks(int64_t count, const char* operation) {
  if (count > INT32_MAX) {
    throw std::runtime_error(std::string(operation) + ": x: expected at most 2147483647 blocks of tokens, got " +
                             std::to_string(count));
  }
  return unsigned(count);
}

}  // namespace aape
