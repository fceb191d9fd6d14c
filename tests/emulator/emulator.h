// CUDA on a CPU, for tests: enough of the language to run csrc/cuda under a host compiler.
//
// Two ways to run a block's threads, each in a header of its own: fibers.h, one after the other until a barrier, in an
// order that can be chosen, for the numbers; threads.h, at the same time, for ThreadSanitizer (AAPE_EMULATOR_THREADS).
// Blocks run one after the other. Memory handed out as shared is poisoned before every block.

#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <vector>

#include "../../csrc/cpu/convert.h"

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace aape {
namespace emulator {
constexpr unsigned kWarp = 32;  // lanes
using Words = std::array<uint64_t, 3>;  // what a lane shows to the others
struct Copy {                           // 16 bytes on their way to shared memory
  void* to;
  const void* from;
};
}
}  // namespace aape

inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }

#define __global__ static
#define __launch_bounds__(...)
#define AAPE_DEVICE inline

#ifdef AAPE_EMULATOR_THREADS
#include "threads.h"
#else
#include "fibers.h"
#endif

namespace aape {
namespace emulator {

// Run `body` in every thread of every block.
inline void run_blocks(Block& one, const std::function<void()>& body) {
  for (unsigned z = 0; z < one.grid.z; ++z)
    for (unsigned y = 0; y < one.grid.y; ++y)
      for (unsigned x = 0; x < one.grid.x; ++x) {
        one.index = dim3(x, y, z);
        std::memset(one.shared.get(), 0xFF, one.shared_bytes);  // NaN, as float and as double
        one.run(body);
        for (const auto& left : one.copies)
          if (!left.empty()) throw std::runtime_error("a copy that its thread does not wait for");
      }
}

template <class Kernel, class... Arguments>
void launch(Kernel kernel, dim3 grid, dim3 block, size_t shared, Arguments... arguments) {
  Block one(grid, block, shared);
  run_blocks(one, [&] { kernel(arguments...); });
}

template <int kAxis>
struct ThreadIndex {
  operator unsigned() const {
    const dim3& b = current()->block;
    const unsigned k = thread_number();
    return kAxis == 0 ? k % b.x : kAxis == 1 ? k / b.x % b.y : k / b.x / b.y;
  }
};
struct ThreadIndices {
  ThreadIndex<0> x;
  ThreadIndex<1> y;
  ThreadIndex<2> z;
};

}  // namespace emulator
}  // namespace aape

static const aape::emulator::ThreadIndices threadIdx;

// Of the whole warp only: every lane takes part.
template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  using namespace aape::emulator;
  if (mask != 0xFFFFFFFFu) throw std::invalid_argument("a shuffle of a part of a warp");
  Words mine = {};
  std::memcpy(mine.data(), &value, sizeof(T));
  current()->meet(mine, [&](auto words_of) {
    const Words other = words_of(unsigned(from) % kWarp);
    std::memcpy(&value, other.data(), sizeof(T));
  });
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return __shfl_sync(mask, value, int(aape::emulator::thread_number() % aape::emulator::kWarp) ^ distance);
}

inline void __syncwarp() {
  aape::emulator::current()->meet({}, [](auto) {});
}
#define blockIdx (aape::emulator::current()->index)
#define blockDim (aape::emulator::current()->block)
#define gridDim (aape::emulator::current()->grid)
#define __syncthreads() aape::emulator::current()->barrier()

#define AAPE_DYN_SHARED(name) unsigned char* name = aape::emulator::current()->shared.get()
#define AAPE_LAUNCH(operation, kernel, grid, block, shared, stream, ...) \
  (static_cast<void>(stream), aape::emulator::launch(kernel, grid, block, shared, __VA_ARGS__))

// Those of an H100, and fewer multiprocessors than most tests have tiles.
namespace aape {
namespace emulator {
inline int& chip() {
  static int multiprocessors = 2;
  return multiprocessors;
}
}  // namespace emulator
inline size_t shared_limit() { return 227 * 1024; }
inline int multiprocessors() { return emulator::chip(); }
inline void prefetch(const void*) {}

// Nothing is there until the thread waits.
inline void copy_16_bytes(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
    throw std::invalid_argument("a copy that is not aligned");
  }
  std::memset(to, 0xFF, 16);
  emulator::current()->copies[emulator::thread_number()].push_back({to, from});
}
inline void wait_for_copies() {
  auto& copies = emulator::current()->copies[emulator::thread_number()];
  for (const auto& copy : copies) std::memcpy(copy.to, copy.from, 16);
  copies.clear();
}
}  // namespace aape

// The 16-bit types, as cuda_bf16.h and cuda_fp16.h have them.
namespace aape {

struct BFloat16 {
  uint16_t bits;
  BFloat16() = default;
  explicit BFloat16(float value) : bits(to_bfloat16(value)) {}
  explicit operator float() const { return from_bfloat16(bits); }
};

struct Float16 {
  uint16_t bits;
  Float16() = default;
  explicit Float16(float value) : bits(to_float16(value)) {}
  explicit operator float() const { return from_float16(bits); }
};

}  // namespace aape
