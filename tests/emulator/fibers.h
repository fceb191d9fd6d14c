// A block's threads as fibers: each runs until a barrier, a shuffle or its end, in forward, reverse or shuffled order. A
// kernel that needs a barrier it does not have gives other results in at least one of them.

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
  std::vector<std::vector<Copy>> copies;  // of every thread
  unsigned running = 0;  // the thread that has the processor

  Block(dim3 grid_, dim3 block_, size_t bytes)
      : grid(grid_), block(block_), shared_bytes(bytes), shared(new unsigned char[bytes]), random_(turns().seed) {
    const size_t threads = size_t(block.x) * block.y * block.z;
    copies.resize(threads);
    for (size_t k = 0; k < threads; ++k) fibers_.push_back(std::make_unique<Fiber>());
  }

  // Run `body` once in every thread. Errors: std::runtime_error if threads wait at a barrier, or lanes at a shuffle, that
  // others never reach.
  void run(const std::function<void()>& body) {
    body_ = &body;
    current_block() = this;
    for (auto& fiber : fibers_) start(*fiber);
    const Order order = turns().order;
    std::vector<unsigned> turn(fibers_.size());
    for (unsigned k = 0; k < turn.size(); ++k) turn[k] = order == Order::kReverse ? unsigned(turn.size()) - 1 - k : k;
    do {
      if (order == Order::kShuffled) std::shuffle(turn.begin(), turn.end(), random_);
      for (unsigned k : turn) {
        Fiber& fiber = *fibers_[k];
        if (fiber.state != State::kReady) continue;
        running = k;
        swapcontext(&scheduler_, &fiber.context);
      }
    } while (release());
    current_block() = nullptr;
    if (failure_) std::rethrow_exception(failure_);
  }

  // __syncthreads: back to the scheduler, until every thread has been here.
  void barrier() { wait(State::kAtBarrier); }

  // What a warp does together: every lane leaves its words, and read(words_of) sees those of any lane when all have been
  // here. Two places a lane in turn: whoever writes to one again has met all lanes since, so that everyone has read it.
  template <class Read>
  void meet(const Words& words, Read read) {
    const unsigned lane = running % kWarp, warp = running - lane, place = fibers_[running]->shuffles++ % 2;
    fibers_[running]->given[place] = words;
    wait(State::kAtShuffle);
    read([&](unsigned from) { return fibers_[warp + from]->given[place]; });
  }

 private:
  enum class State { kReady, kAtBarrier, kAtShuffle, kDone };
  struct Fiber {
    ucontext_t context;
    std::vector<unsigned char> stack = std::vector<unsigned char>(256 * 1024);
    State state = State::kReady;
    unsigned shuffles = 0;
    Words given[2] = {};
  };

  void wait(State state) {
    fibers_[running]->state = state;
    swapcontext(&fibers_[running]->context, &scheduler_);
  }

  // Let go on whom nobody is to be waited for: whole warps at a shuffle, else the whole block at a barrier. False at the end.
  bool release() {
    const auto all = [&](size_t first, size_t count, State state) {
      return std::all_of(fibers_.begin() + first, fibers_.begin() + first + count,
                         [&](const auto& fiber) { return fiber->state == state; });
    };
    const auto go_on = [&](size_t first, size_t count) {
      for (size_t k = first; k < first + count; ++k) fibers_[k]->state = State::kReady;
      return true;
    };
    bool any = false;
    for (size_t warp = 0; warp + kWarp <= fibers_.size(); warp += kWarp) {
      if (all(warp, kWarp, State::kAtShuffle)) any = go_on(warp, kWarp);
    }
    if (any) return true;
    if (all(0, fibers_.size(), State::kAtBarrier)) return go_on(0, fibers_.size());
    if (all(0, fibers_.size(), State::kDone)) return false;
    throw std::runtime_error("a barrier that not every thread reaches, or a shuffle that not every lane does");
  }

  void start(Fiber& fiber) {
    fiber.state = State::kReady;
    fiber.shuffles = 0;
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
    block->fibers_[block->running]->state = State::kDone;
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
