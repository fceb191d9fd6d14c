// What a kernel needs of the device: launching, shared memory and 16-byte loads. The kernels are CUDA C++ for nvcc; the
// tests compile the same sources with a host compiler, behind tests/emulator/emulator.h, which stands in for all this.

#pragma once

#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define AAPE_DEVICE __device__ __forceinline__

// Shared memory of the size given at launch; one declaration a kernel.
#define AAPE_DYN_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

#include <stdexcept>
#include <string>

namespace aape {
using BFloat16 = __nv_bfloat16;
using Float16 = __half;

inline void check(cudaError_t status, const char* operation) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(operation) + ": " + cudaGetErrorString(status));
}

// More than 48 KB of shared memory is only had by asking.
template <class Kernel>
void allow_shared(Kernel kernel, size_t bytes, const char* operation) {
  if (bytes <= 48 * 1024) return;
  int device = 0, most = 0;
  check(cudaGetDevice(&device), operation);
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), operation);
  if (bytes > size_t(most)) {
    throw std::runtime_error(std::string(operation) + ": window: expected one whose frames fit into " +
                             std::to_string(most) + " bytes of shared memory, got " + std::to_string(bytes));
  }
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)), operation);
}
}  // namespace aape

#define AAPE_LAUNCH(operation, kernel, grid, block, shared, stream, ...)                \
  do {                                                                                  \
    aape::allow_shared(kernel, shared, operation);                                      \
    kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__);    \
    aape::check(cudaGetLastError(), operation);                                         \
  } while (0)

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
  static AAPE_FN T splat(T value) { return value; }
  static AAPE_FN T select(bool mask, T a, T b) { return mask ? a : b; }
  static AAPE_FN T round(T x) { return kDouble ? T(rint(double(x))) : T(rintf(float(x))); }
  static AAPE_FN T floor(T x) { return kDouble ? T(::floor(double(x))) : T(floorf(float(x))); }
  static AAPE_FN T exp2(T n) { return kDouble ? T(ldexp(1.0, int(n))) : T(ldexpf(1.0f, int(n))); }
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

}  // namespace aape
