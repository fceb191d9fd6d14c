// A block's threads as threads of the CPU, for ThreadSanitizer: two accesses to one address of shared or global memory
// that no barrier orders are a race, whichever comes first. C++20, for std::barrier.

#pragma once

#include <barrier>
#include <thread>

namespace aape {
namespace emulator {

class Block;
inline Block* running_block = nullptr;
inline thread_local unsigned running_thread = 0;
inline Block* current() { return running_block; }
inline unsigned thread_number() { return running_thread; }

class Block {
 public:
  dim3 grid, block, index;
  size_t shared_bytes;
  std::unique_ptr<unsigned char[]> shared;
  std::vector<std::vector<Copy>> copies;  // of every thread

  Block(dim3 grid_, dim3 block_, size_t bytes)
      : grid(grid_), block(block_), shared_bytes(bytes), shared(new unsigned char[bytes]) {
    copies.resize(size_t(block.x) * block.y * block.z);
  }

  void run(const std::function<void()>& body) {
    const unsigned count = block.x * block.y * block.z;
    std::barrier<> barrier(count);
    barrier_ = &barrier;
    std::vector<std::unique_ptr<std::barrier<>>> warps;
    for (unsigned k = 0; k < count; k += kWarp) warps.push_back(std::make_unique<std::barrier<>>(kWarp));
    warps_ = warps.data();
    given_.assign(2 * count, {});
    running_block = this;
    std::vector<std::thread> threads;
    for (unsigned k = 0; k < count; ++k) {
      threads.emplace_back([&, k] {
        running_thread = k;
        shuffles = 0;
        body();
        barrier.arrive_and_drop();  // a thread that has ended is not waited for
      });
    }
    for (auto& thread : threads) thread.join();
    running_block = nullptr;
  }

  void barrier() { barrier_->arrive_and_wait(); }

  // As in fibers.h. It orders what the warp's lanes do with memory, as a shuffle on a GPU need not.
  template <class Read>
  void meet(const Words& words, Read read) {
    const unsigned lane = running_thread % kWarp, warp = running_thread - lane, place = shuffles++ % 2;
    given_[2 * running_thread + place] = words;
    warps_[warp / kWarp]->arrive_and_wait();
    read([&](unsigned from) { return given_[2 * (warp + from) + place]; });
  }

 private:
  static inline thread_local unsigned shuffles = 0;
  std::barrier<>* barrier_ = nullptr;
  std::unique_ptr<std::barrier<>>* warps_ = nullptr;
  std::vector<Words> given_;
};

}  // namespace emulator
}  // namespace aape
