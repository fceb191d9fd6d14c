// The CUDA kernels as the host calls them: on the device last set, on the stream given, without waiting for it.
// Errors: std::runtime_error naming the operation and what CUDA says, or the size that does not fit.

#pragma once

#include <string>
#include <vector>

#include "../calls.h"

namespace aape {
namespace cuda {

void set_device(int index);

// y, its cotangent and the features' may have another type than x. Planes other than 2: up to 32 states.
void sblu(const SbluCall& call, void* stream);

// The same where tensor cores can do it: false, and nothing done, where not. `sblu` asks by itself.
bool warp_sblu(const SbluCall& call, void* stream);

// The gradients of decay and frequency, partial (programs, S, C·P_f) for that of the weight, and grad_x (B, N_f, N_t, C·P_f, K),
// those of all windows, of any strides that do not overlap: each unless it is null. And the programs; none where tensor cores
// cannot do it.
void warp_sblu_backward(const SbluCall& call, void* partial, void* stream);
int64_t warp_sblu_programs(const SbluCall& call);
void standardise(const StandardiseCall& call, void* stream);

// The gradients of decay and frequency, of one set of strides, in the arithmetic's type; and y with them, if given.
void sblu_backward_states(const SbluCall& call, void* stream);

// partial (programs, S, C·P_f), contiguous, in the arithmetic's type: the sum over the programs is the weight's gradient.
void sblu_backward_weight(const SbluCall& call, void* partial, int64_t programs, void* stream);

// windows (B, N_f, tiles, C·P_f, (tile − 1) · S_t + K, rounded up to a multiple of 8), contiguous, in the arithmetic's type,
// with `tile` tokens in each of the ⌈N_t / tile⌉ tiles: what `overlap_add` sums into x's gradient.
void sblu_backward_windows(const SbluCall& call, void* windows, void* stream);
int64_t tile_tokens(const Grid& grid, DType x);

void overlap_add(const OverlapAddCall& call, void* stream);
void stem(const StemCall& call, void* stream);

// The same where tensor cores can do it, weights and biases in a type of their own: false, and nothing done, where not.
bool warp_stem(const StemCall& call, void* stream);

// Both, and the product behind them, in one kernel, where tensor cores can do it and tokens are of the usual geometry, by the
// way of `packed`, memory of as many bytes: none where not.
void warp_tokens(const TokensCall& call, void* stream);
int64_t warp_tokens_bytes(const TokensCall& call);

// Its backward, and the programs whose partial sums there will be; none where it cannot be used.
void warp_stem_backward(const StemGradientCall& call, void* stream);
int64_t warp_stem_programs(const StemCall& call);

// Up to kMostGradients in one launch.
constexpr size_t kMostGradients = 8;
void gradients(const std::vector<GradientCall>& calls, void* stream);

void gather(const GatherCall& call, void* stream);

// What stands between this process and a GPU; without a driver `error` says so and the rest is empty.
struct Devices {
  std::string error;
  int driver = 0, runtime = 0;           // CUDA versions, 1000 · major + 10 · minor
  std::vector<int> capabilities;         // 10 · major + minor, for every device
};
Devices devices();

}  // namespace cuda
}  // namespace aape
