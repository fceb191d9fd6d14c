// The CUDA kernels as the host calls them: on the current device, on the stream given, without waiting for it.
// Errors: std::runtime_error naming the operation and what CUDA says, or the size that does not fit.

#pragma once

#include "../calls.h"

namespace aape {
namespace cuda {

void sblu(const SbluCall& call, void* stream);

}  // namespace cuda
}  // namespace aape
