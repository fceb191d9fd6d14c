// Every pixel's sum over the windows that hold it, in the order of subbands and tiles: x's gradient.

#include "api.h"
#include "device.h"

namespace aape {
namespace cuda {

constexpr int kPixels = 256;  // of a block, one a thread

template <class T, class O, class I>
struct OverlapAddParams {
  GridOf<I> grid;
  I tile, length, offset;
  bool add;
  const T* windows;
  I stride[3];  // of batch, subband and tile; rows and frames are contiguous
  O* out;
  I out_stride[4];
};

template <class T, class O, class I>
__global__ void __launch_bounds__(kPixels) overlap_add_kernel(const OverlapAddParams<T, O, I> p) {
  const GridOf<I>& g = p.grid;
  const I tiles = (g.n_t + p.tile - 1) / p.tile, step = p.tile * g.stride_t;
  // frames by x, mel bins by y, clips and channels by z, as many in turn as it takes; counts fit into 32 bits
  const int t = blockIdx.x * kPixels + threadIdx.x, patch_f = int(g.patch_f), stride_f = int(g.stride_f);
  if (t >= g.frames) return;
  const int at = t - int(p.offset), length = int(p.length);  // from the first window's first frame
  const int first_tile = at < length ? 0 : (at - length) / int(step) + 1;
  for (unsigned line = blockIdx.z; line < unsigned(g.batch * g.channels); line += gridDim.z) {
    const I c = line % unsigned(g.channels), b = line / unsigned(g.channels);
    for (int f = blockIdx.y; f < g.mel_bins; f += gridDim.y) {
      T sum = 0;
      for (I i = f < patch_f ? 0 : (f - patch_f) / stride_f + 1; i < g.n_f && i * g.stride_f <= f; ++i) {
        const T* row = p.windows + b * p.stride[0] + i * p.stride[1] + (c * g.patch_f + f - i * g.stride_f) * p.length;
        for (I tile = first_tile; tile < tiles && tile * step <= at; ++tile) {
          sum += row[tile * p.stride[2] + at - tile * step];
        }
      }
      O* to = p.out + b * p.out_stride[0] + c * p.out_stride[1] + f * p.out_stride[2] + t * p.out_stride[3];
      *to = narrow<O>(p.add ? widen<T>(*to) + sum : sum);
    }
  }
}

template <class T, class O, class I>
void launch_overlap_add(const OverlapAddCall& call, void* stream) {
  OverlapAddParams<T, O, I> p = {};
  const Grid& g = call.grid;
  p.grid = narrowed<I>(g);
  p.tile = I(call.tile);
  p.length = I(call.length);
  p.offset = I(call.offset);
  p.add = call.add;
  p.windows = reinterpret_cast<const T*>(call.windows.data);
  p.out = reinterpret_cast<O*>(call.out.data);
  for (int axis = 0; axis < 3; ++axis) p.stride[axis] = I(call.windows.stride[axis]);
  for (int axis = 0; axis < 4; ++axis) p.out_stride[axis] = I(call.out.stride[axis]);
  const auto most = [](int64_t count) { return unsigned(count < 65535 ? count : 65535); };
  const dim3 grid(blocks((g.frames + kPixels - 1) / kPixels, "overlap_add"), most(g.mel_bins),
                  most(blocks(g.batch * g.channels, "overlap_add")));
  AAPE_LAUNCH("overlap_add", (overlap_add_kernel<T, O, I>), grid, dim3(kPixels), size_t(0), stream, p);
}

void overlap_add(const OverlapAddCall& call, void* stream) {
  const Grid& g = call.grid;
  const int64_t tiles = (g.n_t + call.tile - 1) / call.tile, rows = g.channels * g.patch_f;
  const bool small = is_small(call.out, {g.batch, g.channels, g.mel_bins, g.frames}) &&
                     is_small(call.windows, {g.batch, g.n_f, tiles, rows, call.length});
  const auto run = [&](auto index) {
    using I = decltype(index);
    if (call.windows.type == DType::kFloat64) return launch_overlap_add<double, double, I>(call, stream);
    if (call.out.type == DType::kBFloat16) return launch_overlap_add<float, BFloat16, I>(call, stream);
    if (call.out.type == DType::kFloat16) return launch_overlap_add<float, Float16, I>(call, stream);
    launch_overlap_add<float, float, I>(call, stream);
  };
  if (small) run(int32_t());
  else run(int64_t());
}

}  // namespace cuda
}  // namespace aape
