// SBLU forward on tensor cores: a block for 16 or 32 states, whose warps take 16 tokens in turn.

#include "api.h"
#include "warp_sblu.cuh"

namespace aape {
namespace cuda {

template <class S>
__global__ void __launch_bounds__(S::kMostWarps* kLanes, 1) warp_sblu_kernel(const WarpSbluParams<S> p) {
  using X = typename S::X;
  AAPE_DYN_SHARED(memory);
  const auto projection = reinterpret_cast<Weights<X>*>(memory);
  X* const lines = reinterpret_cast<X*>(projection + p.blocks() * S::kStateTiles * kLanes) +
                   threadIdx.x / kLanes * kTokensOfWarp * p.pitch();
  const int first = int(blockIdx.y) * S::kStates;
  fill_projection(p, p.weight, projection, first);
  __syncthreads();
  each_tile(p, lines, KeepNothing(), [&](const TwoTokens& at) {
    const Positions<S> positions(p, at);
    Sums before[2];
#pragma unroll 1
    for (int n = 0; n < S::kStateTiles; ++n) {
      State<float> states[4];
      load_states(p, at, positions, first, n, states);
      Complex<float> y[4];
      respond(p, lines, projection + n * kLanes, states, y);
      Sums own[2];  // Re y, Im y
      for (int k = 0; k < 4; ++k) own[0].at[k] = y[k].re, own[1].at[k] = y[k].im;
      for (int plane = 0; plane < 2; ++plane) {
        const auto row = [&](int h) { return p.y.row(positions.of[h], first, plane); };
        store_tile<S>(at, n, p.grid.states - first, row, before[plane], own[plane]);
        before[plane] = own[plane];
      }
    }
  });
}

template <class S>
bool launch_warp_sblu(const SbluCall& call, void* stream) {
  const WarpSbluParams<S> p = warp_sblu_params<S>(call);
  const size_t tiles = size_t(p.row_blocks) * S::kStateTiles * kLanes * sizeof(Weights<typename S::X>);
  const Launch launch = launch_of(p.tokens, S::kMostWarps, tiles, lines_bytes(p));
  if (launch.warps < kLeastWarps) return false;
  const dim3 grid(unsigned(launch.blocks), unsigned((call.grid.states + S::kStates - 1) / S::kStates));
  AAPE_LAUNCH("sblu", (warp_sblu_kernel<S>), grid, dim3(unsigned(launch.warps * kLanes)), launch.shared, stream, p);
  return true;
}

bool warp_sblu(const SbluCall& call, void* stream) {
  return with_unit_sizes(call, [&](auto sizes) { return launch_warp_sblu<decltype(sizes)>(call, stream); });
}

}  // namespace cuda
}  // namespace aape
