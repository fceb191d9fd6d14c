// csrc/cuda compiled for the CPU, as a library with a C interface for the tests.

#include "emulator.h"

#include <string>

#include "../../csrc/cuda/sblu_backward.cu"
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

aape::SbluCall call_of(const int64_t* sizes, int quadrature, const int64_t* views, int count, const double* ranges) {
  aape::SbluCall call;
  std::memcpy(static_cast<void*>(&call.grid), sizes, 12 * sizeof(int64_t));
  call.grid.quadrature = quadrature;
  if (ranges) call.ranges = {true, ranges[0], ranges[1], ranges[2], ranges[3]};
  aape::View* into[] = {&call.x,      &call.decay,  &call.frequency,  &call.weight,        &call.y,
                        &call.grad_y, &call.grad_x, &call.grad_decay, &call.grad_frequency};
  for (int k = 0; k < count; ++k) *into[k] = view(views + 7 * k);
  return call;
}

std::string message;

}  // namespace

extern "C" {

// How the threads of a block take turns: 0 forward, 1 reverse, 2 shuffled by `seed`.
void set_order(int order, unsigned seed) {
  aape::emulator::order = static_cast<aape::emulator::Order>(order);
  aape::emulator::seed = seed;
}

// sizes: the twelve of a grid; views: x, decay, frequency, weight, y, and for the backward those of grad_y, grad_x,
// grad_decay, grad_frequency; ranges: four, or null where the states are given. Return null, or what went wrong.

const char* sblu(const int64_t* sizes, int quadrature, const int64_t* views, const double* ranges) try {
  aape::cuda::sblu(call_of(sizes, quadrature, views, 5, ranges), nullptr);
  return nullptr;
} catch (const std::exception& error) {
  message = error.what();
  return message.c_str();
}

const char* sblu_backward(const int64_t* sizes, int quadrature, const int64_t* views, const double* ranges,
                          void* partial, int64_t programs, void* windows) try {
  aape::cuda::sblu_backward(call_of(sizes, quadrature, views, 9, ranges), {partial, programs, windows}, nullptr);
  return nullptr;
} catch (const std::exception& error) {
  message = error.what();
  return message.c_str();
}

int64_t windows_size(const int64_t* sizes, const int64_t* views) {
  return aape::cuda::windows_size(call_of(sizes, 0, views, 1, nullptr));
}
}
