// Patches cut into rows, for the products of the stem's backward.

#include "api.h"
#include "patches.cuh"

namespace aape {
namespace cuda {

constexpr int kQuads = 256;  // of a block, one a thread

template <class T, class IO, class I>
struct GatherParams {
  PatchParams<IO, I> from;
  Values patches;
  I stride[3];
  Divisor<I> by_quads, by_n_t, by_n_f;
};

template <class T, class IO, class I>
__global__ void __launch_bounds__(kQuads) gather_kernel(const GatherParams<T, IO, I> p) {
  const GridOf<I>& g = p.from.grid;
  const int length = p.from.length();
  const auto [token, quad] = p.by_quads(I(blockIdx.x) * kQuads + threadIdx.x);
  if (token >= g.batch * g.n_f * g.n_t) return;
  const int e = int(quad) * 4;
  const auto [subband, j] = p.by_n_t(token);
  const auto [b, i] = p.by_n_f(subband);
  const Quad<T> value = load_patch<T>(p.from, corner(p.from, b, i, j), e);
  store_quad(p.patches, b * p.stride[0] + i * p.stride[1] + j * p.stride[2] + e, value,
             length - e < 4 ? length - e : 4);
}

template <class T, class IO, class I>
void launch_gather(const GatherCall& call, void* stream) {
  GatherParams<T, IO, I> p = {};
  const Grid& g = call.grid;
  p.from = patch_params<IO, I>(g, call.x, false);
  p.patches = {call.patches.data, call.patches.type};
  for (int axis = 0; axis < 3; ++axis) p.stride[axis] = I(call.patches.stride[axis]);
  const int64_t quads = (g.channels * g.patch_f * g.patch_t + 3) / 4, all = quads * g.batch * g.n_f * g.n_t;
  p.by_quads = Divisor<I>(quads);
  p.by_n_t = Divisor<I>(g.n_t);
  p.by_n_f = Divisor<I>(g.n_f);
  AAPE_LAUNCH("gather", (gather_kernel<T, IO, I>), dim3(blocks((all + kQuads - 1) / kQuads, "gather")), dim3(kQuads),
              size_t(0), stream, p);
}

void gather(const GatherCall& call, void* stream) {
  const Grid& g = call.grid;
  const bool small = is_small(call.x, {g.batch, g.channels, g.mel_bins, g.frames}) &&
                     is_small(call.patches, {g.batch, g.n_f, g.n_t, g.channels * g.patch_f * g.patch_t}) &&
                     g.batch * g.n_f * g.n_t * (g.channels * g.patch_f * g.patch_t + 3) < INT32_MAX;
  const auto run = [&](auto index) {
    using I = decltype(index);
    if (call.x.type == DType::kFloat64) launch_gather<double, double, I>(call, stream);
    else launch_gather<float, AnyFloat, I>(call, stream);
  };
  if (small) run(int32_t());
  else run(int64_t());
}

}  // namespace cuda
}  // namespace aape
