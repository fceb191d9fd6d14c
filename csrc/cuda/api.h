// The CUDA kernels as the host calls them: on the current device, on the stream given, without waiting for it.
// Errors: std::runtime_error naming the operation and what CUDA says, or the size that does not fit.

#pragma once

#include "../calls.h"

namespace aape {
namespace cuda {

// Memory of the caller for sums that are finished by another kernel, in the arithmetic's type; null where not needed.
struct Scratch {
  void* partial = nullptr;  // (programs, S, C·P_f): to be added up over the programs, the weight's gradient
  int64_t programs = 0;
  void* windows = nullptr;  // `windows_size` elements, for the gradient of x
};

// Elements of Scratch::windows.
int64_t windows_size(const SbluCall& call);

void sblu(const SbluCall& call, void* stream);
// grad_x has x's type, the gradients of decay and frequency the arithmetic's; they are asked for together, and y with
// them where it is given.
void sblu_backward(const SbluCall& call, const Scratch& scratch, void* stream);

}  // namespace cuda
}  // namespace aape
