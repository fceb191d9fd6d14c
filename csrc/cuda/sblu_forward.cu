// SBLU forward: project a tile's frames, then Horner's rule on every token's window.

#include "api.h"
#include "respond.cuh"

namespace aape {
namespace cuda {

template <class T, class IO, class I>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) sblu_forward_kernel(const SbluParams<T, IO, I> p) {
  AAPE_DYN_SHARED(memory);
  const Tiles<T, IO, I> m(p, memory);
  const Tile<I> t = tile_at(p, int(blockIdx.x), I(blockIdx.y));
  project(p, t, m);
  respond(p, t, m.u);
}

template <class T, class IO, class I>
void launch_forward(const SbluCall& call, const SbluParams<T, IO, I>& p, void* stream) {
  const dim3 grid(blocks(units(call.grid, p.tile), "sblu"), state_blocks(call.grid));
  AAPE_LAUNCH("sblu", (sblu_forward_kernel<T, IO, I>), grid, dim3(kThreads), shared_bytes(p.columns, sizeof(T)), stream, p);
}

void sblu(const SbluCall& call, void* stream) {
  if (warp_sblu(call, stream)) return;
  dispatch(call, is_small(call), [&](const auto& p) { launch_forward(call, p, stream); });
}

int64_t tile_tokens(const Grid& grid, DType x) { return tile_of(grid, x == DType::kFloat64 ? 8 : 4); }

}  // namespace cuda
}  // namespace aape
