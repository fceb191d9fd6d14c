// CUDA on a CPU, for tests: enough of the language to run csrc/cuda under a host compiler, one fiber a CUDA thread.
//
// Fibers run until a barrier or their end, in an order that can be chosen: forward, reverse or shuffled. A kernel that
// needs a barrier it does not have gives other results in at least one of them. Blocks run one after the other. Memory
// handed out as shared is poisoned before every block.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "../../csrc/cpu/convert.h"

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define __global__ static
#define __launch_bounds__(...)
#define __restrict__
#define AAPE_DEVICE inline

namespace aape {
namespace emulator {

enum class Order { kForward, kReverse, kShuffled };

class Block;
inline Block* current = nullptr;

// One block: its threads as fibers, its shared memory.
class Block {
 public:
  dim3 grid, block, index;
  std::vector<unsigned char> shared;
  unsigned running = 0;  // the thread that has the processor

  Block(dim3 grid_, dim3 block_, size_t shared_bytes) : grid(grid_), block(block_), shared(shared_bytes) {
    size_t threads = size_t(block.x) * block.y * block.z;
    for (size_t k = 0; k < threads; ++k) fibers_.push_back(std::make_unique<Fiber>());
  }

  // Run `body` once in every thread. Errors: std::runtime_error if threads wait at a barrier that others never reach.
  void run(dim3 at, const std::function<void()>& body, Order order, std::mt19937& random) {
    index = at;
    body_ = &body;
    std::memset(shared.data(), 0xFF, shared.size());  // NaN, as float and as double
    current = this;
    for (auto& fiber : fibers_) start(*fiber);
    std::vector<unsigned> turn(fibers_.size());
    for (unsigned k = 0; k < turn.size(); ++k) turn[k] = order == Order::kReverse ? unsigned(turn.size()) - 1 - k : k;
    for (;;) {
      if (order == Order::kShuffled) std::shuffle(turn.begin(), turn.end(), random);
      size_t finished = 0, waiting = 0;
      for (unsigned k : turn) {
        Fiber& fiber = *fibers_[k];
        if (!fiber.done) {
          running = k;
          swapcontext(&scheduler_, &fiber.context);
        }
        finished += fiber.done;
        waiting += !fiber.done;
      }
      if (finished == fibers_.size()) break;
      if (finished && waiting && strict) throw std::runtime_error("a barrier that not every thread reaches");
    }
    current = nullptr;
    if (failure_) std::rethrow_exception(failure_);
  }

  // __syncthreads: back to the scheduler, which comes round when every other thread has been here or has ended.
  void barrier() { swapcontext(&fibers_[running]->context, &scheduler_); }

  static inline bool strict = true;

 private:
  struct Fiber {
    ucontext_t context;
    std::vector<unsigned char> stack = std::vector<unsigned char>(64 * 1024);
    bool done = false;
  };

  void start(Fiber& fiber) {
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler_;
    makecontext(&fiber.context, &Block::enter, 0);
  }

  static void enter() {
    Block* block = current;
    try {
      (*block->body_)();
    } catch (...) {
      block->failure_ = std::current_exception();
    }
    block->fibers_[block->running]->done = true;
  }

  std::vector<std::unique_ptr<Fiber>> fibers_;
  ucontext_t scheduler_;
  const std::function<void()>* body_ = nullptr;
  std::exception_ptr failure_;
};

inline Order order = Order::kForward;
inline unsigned seed = 0;

template <class Kernel, class... Arguments>
void launch(Kernel kernel, dim3 grid, dim3 block, size_t shared, Arguments... arguments) {
  std::mt19937 random(seed);
  Block one(grid, block, shared);
  std::function<void()> body = [&] { kernel(arguments...); };
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) one.run(dim3(x, y, z), body, order, random);
}

struct ThreadIndex {
  struct Axis {
    int axis;
    operator unsigned() const {
      const dim3& b = current->block;
      unsigned k = current->running;
      return axis == 0 ? k % b.x : axis == 1 ? k / b.x % b.y : k / b.x / b.y;
    }
  };
  Axis x{0}, y{1}, z{2};
};

}  // namespace emulator
}  // namespace aape

inline aape::emulator::ThreadIndex threadIdx;
#define blockIdx (aape::emulator::current->index)
#define blockDim (aape::emulator::current->block)
#define gridDim (aape::emulator::current->grid)
#define __syncthreads() aape::emulator::current->barrier()

#define AAPE_DYN_SHARED(name) unsigned char* name = aape::emulator::current->shared.data()
#define AAPE_LAUNCH(operation, kernel, grid, block, shared, stream, ...) \
  (static_cast<void>(stream), aape::emulator::launch(kernel, grid, block, shared, __VA_ARGS__))

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
