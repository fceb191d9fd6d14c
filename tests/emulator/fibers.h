// A block's threads as fibers: each runs until a barrier or its end, in forward, reverse or shuffled order. A kernel that
// needs a barrier it does not have gives other results in at least one of them.

#pragma once

#include <ucontext.h>

#include <random>
#include <stdexcept>

namespace aape {
namespace emulator {

enum class Order { kForward, kReverse, kShuffled };

// How the threads of every block take turns, and the seed of shuffling them.
struct Turns {
  Order order = Order::kForward;
  unsigned seed = 0;
};
inline Turns& turns() {
  static Turns now;
  return now;
}

class Block;
inline Block*& current_block() {
  static Block* now = nullptr;
  return now;
}
inline Block* current() { return current_block(); }

class Block {
 public:
  dim3 grid, block, index;
  size_t shared_bytes;
  std::unique_ptr<unsigned char[]> shared;
  unsigned running = 0;  // the thread that has the processor

  Block(dim3 grid_, dim3 block_, size_t bytes)
      : grid(grid_), block(block_), shared_bytes(bytes), shared(new unsigned char[bytes]), random_(turns().seed) {
    const size_t threads = size_t(block.x) * block.y * block.z;
    for (size_t k = 0; k < threads; ++k) fibers_.push_back(std::make_unique<Fiber>());
  }

  // Run `body` once in every thread. Errors: std::runtime_error if threads wait at a barrier that others never reach.
  void run(const std::function<void()>& body) {
    body_ = &body;
    current_block() = this;
    for (auto& fiber : fibers_) start(*fiber);
    const Order order = turns().order;
    std::vector<unsigned> turn(fibers_.size());
    for (unsigned k = 0; k < turn.size(); ++k) turn[k] = order == Order::kReverse ? unsigned(turn.size()) - 1 - k : k;
    for (;;) {
      if (order == Order::kShuffled) std::shuffle(turn.begin(), turn.end(), random_);
      size_t finished = 0;
      for (unsigned k : turn) {
        Fiber& fiber = *fibers_[k];
        if (!fiber.done) {
          running = k;
          swapcontext(&scheduler_, &fiber.context);
        }
        finished += fiber.done;
      }
      if (finished == fibers_.size()) break;
      if (finished) throw std::runtime_error("a barrier that not every thread reaches");
    }
    current_block() = nullptr;
    if (failure_) std::rethrow_exception(failure_);
  }

  // __syncthreads: back to the scheduler, which comes round when every other thread has been here or has ended.
  void barrier() { swapcontext(&fibers_[running]->context, &scheduler_); }

 private:
  struct Fiber {
    ucontext_t context;
    std::vector<unsigned char> stack = std::vector<unsigned char>(256 * 1024);
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
    Block* block = current();
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
  std::mt19937 random_;
};

inline unsigned thread_number() { return current()->running; }

}  // namespace emulator
}  // namespace aape
