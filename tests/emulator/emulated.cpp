// csrc/cuda compiled for the CPU, as a library with a C interface for the tests.

#include "emulator.h"

#include <string>

#include "../../csrc/cuda/sblu_forward.cu"

namespace {

// Views come as (pointer, five strides, dtype) in a row.
aape::View view(const int64_t* numbers) {
  aape::View out;
  out.data = reinterpret_cast<char*>(numbers[0]);
  for (int axis = 0; axis < 5; ++axis) out.stride[axis] = numbers[1 + axis];
  out.type = static_cast<aape::DType>(numbers[6]);
  return out;
}

std::string message;

}  // namespace

extern "C" {

// How the threads of a block take turns: 0 forward, 1 reverse, 2 shuffled by `seed`.
void set_order(int order, unsigned seed) {
  aape::emulator::order = static_cast<aape::emulator::Order>(order);
  aape::emulator::seed = seed;
}

// sizes: the twelve of a grid; views: x, decay, frequency, weight, y; ranges: four, or null where the states are given.
// Returns null, or what went wrong.
const char* sblu(const int64_t* sizes, int quadrature, const int64_t* views, const double* ranges) try {
  aape::SbluCall call;
  std::memcpy(&call.grid, sizes, 12 * sizeof(int64_t));
  call.grid.quadrature = quadrature;
  if (ranges) call.ranges = {true, ranges[0], ranges[1], ranges[2], ranges[3]};
  aape::View* into[] = {&call.x, &call.decay, &call.frequency, &call.weight, &call.y};
  for (aape::View* one : into) {
    *one = view(views);
    views += 7;
  }
  aape::cuda::sblu(call, nullptr);
  return nullptr;
} catch (const std::exception& error) {
  message = error.what();
  return message.c_str();
}
}
