// The stem's prologue on tensor cores: Lambda Encoder, SBLU and the operand [patch | features].

#include "api.h"
#include "warp_encoder.cuh"

namespace aape {
namespace cuda {

template <class S>
__global__ void __launch_bounds__(S::kMostWarps* kLanes, 1) warp_stem_kernel(const WarpStemParams<S> p) {
  AAPE_DYN_SHARED(memory);
  const ForwardShared<S> m(p, memory);
  fill(p, m);
  __syncthreads();
  each_tile(p, m.lines, [&](const TwoTokens& at) {
    Levels<S> levels;
    Complex<float> before[4] = {};
    each_response(p, at, m, [&](int n, const Complex<float> (&y)[4]) {
      store_responses(p, at, n, before, y);
      for (int k = 0; k < 4; ++k) before[k] = y[k];
      levels.push_magnitudes(y);
    });
    if (p.planes == 2) return;
    levels.standardise(p.grid.states);
    store_levels(p, at, levels);
  });
}

template <class S>
bool launch_warp_stem(const StemCall& call, void* stream) {
  const WarpStemParams<S> p = warp_stem_params<S>(call);
  const Launch launch = launch_of(p.tokens, S::kMostWarps, ForwardShared<S>::common_bytes(p.row_blocks, p.line.patch_),
                                  lines_bytes(p));
  if (launch.warps < kLeastWarps) return false;
  AAPE_LAUNCH("embed", (warp_stem_kernel<S>), dim3(unsigned(launch.blocks)), dim3(unsigned(launch.warps * kLanes)),
              launch.shared, stream, p);
  return true;
}

bool warp_stem(const StemCall& call, void* stream) {
  return with_sizes(call, [&](auto sizes) { return launch_warp_stem<decltype(sizes)>(call, stream); });
}

}  // namespace cuda
}  // namespace aape
