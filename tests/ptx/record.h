// csrc/cuda's host side, for tests: what it would launch is written down instead. Behind tests/emulator's stand-in for the
// language, which the kernels' text needs to compile.

#pragma once

#include <string>

// of the chip that the launches are for, below
#define multiprocessors emulated_multiprocessors
#include "../emulator/emulator.h"
#undef multiprocessors
#undef AAPE_LAUNCH

namespace aape {
namespace recorder {

struct Launch {
  std::string kernel, launcher;  // as the source names it, and the function that does, with its template arguments
  dim3 grid, block;
  size_t shared;
  std::string parameters;  // as the kernel gets them: one struct's bytes
};
inline std::vector<Launch>& launches() {
  static std::vector<Launch> all;
  return all;
}

template <class Parameters>
void launch(const char* kernel, const char* launcher, dim3 grid, dim3 block, size_t shared, const Parameters& parameters) {
  const std::string bytes(reinterpret_cast<const char*>(&parameters), sizeof(Parameters));
  launches().push_back({kernel, launcher, grid, block, shared, bytes});
}

// Fewer than most tests have tiles of tokens.
inline int& chip() {
  static int count = 2;
  return count;
}

}  // namespace recorder

inline int multiprocessors() { return recorder::chip(); }

}  // namespace aape

// Kernels are not instantiated: that is nvcc's work.
#define AAPE_LAUNCH(operation, kernel, grid, block, shared, stream, ...) \
  (static_cast<void>(stream), aape::recorder::launch(#kernel, __PRETTY_FUNCTION__, grid, block, shared, __VA_ARGS__))
