// Every pixel's sum over the windows that hold it, in the order of subbands and tiles: x's gradient.

#include "api.h"
#include "divisor.cuh"
#include "warp.cuh"

namespace aape {
namespace cuda {

constexpr int kMostThreads = 256;  // of a block, which has frames of one line

template <class T, class O, class I>
struct OverlapAddParams {
  GridOf<I> grid;
  I tile, length, offset, tiles;
  Divisor<int32_t> by_step, by_stride_f, by_channels;  // frames from one tile to the next
  bool add;
  const T* windows;
  I stride[4];  // of batch, subband, tile and row; frames are contiguous
  O* out;
  I out_stride[4];
};

// A thread has kFrames neighbours, which are in the same windows.
template <class T, class O, class I, int kFrames>
__global__ void __launch_bounds__(kMostThreads) overlap_add_kernel(const OverlapAddParams<T, O, I> p) {
  using Sum = Pack<T, kFrames>;
  using Out = Pack<O, kFrames>;
  const GridOf<I>& g = p.grid;
  const I step = p.tile * g.stride_t;
  // frames by x, mel bins by y, clips and channels by z, as many in turn as it takes; counts fit into 32 bits
  const int t = int(blockIdx.x * blockDim.x + threadIdx.x) * kFrames, patch_f = int(g.patch_f);
  if (t >= g.frames) return;
  const int at = t - int(p.offset), length = int(p.length);  // from the first window's first frame
  const int first_tile = at < length ? 0 : p.by_step(at - length).quotient + 1;
  for (unsigned line = blockIdx.z; line < unsigned(g.batch * g.channels); line += gridDim.z) {
    const auto [b, c] = p.by_channels(int(line));
    for (int f = int(blockIdx.y); f < g.mel_bins; f += int(gridDim.y)) {
      Sum sum = {};
      for (I i = f < patch_f ? 0 : p.by_stride_f(f - patch_f).quotient + 1; i < g.n_f && i * g.stride_f <= f; ++i) {
        const T* row = p.windows + b * p.stride[0] + i * p.stride[1] + (c * g.patch_f + f - i * g.stride_f) * p.stride[3];
        for (I tile = first_tile; tile < p.tiles && tile * step <= at; ++tile) {
          const Sum value = load_pack<Sum>(row + tile * p.stride[2] + at - tile * step);
#pragma unroll
          for (int k = 0; k < kFrames; ++k) sum.at[k] += value.at[k];
        }
      }
      O* to = p.out + b * p.out_stride[0] + c * p.out_stride[1] + f * p.out_stride[2] + t * p.out_stride[3];
      Out out = p.add ? load_pack<Out>(to) : Out{};
#pragma unroll
      for (int k = 0; k < kFrames; ++k) out.at[k] = narrow<O>(p.add ? widen<T>(out.at[k]) + sum.at[k] : sum.at[k]);
      store_pack(to, out);
    }
  }
}

template <class T, class O, class I, int kFrames>
void launch_overlap_add(const OverlapAddCall& call, void* stream) {
  OverlapAddParams<T, O, I> p = {};
  const Grid& g = call.grid;
  p.grid = narrowed<I>(g);
  p.tile = I(call.tile);
  p.length = I(call.length);
  p.offset = I(call.offset);
  p.tiles = I((g.n_t + call.tile - 1) / call.tile);
  p.by_step = Divisor<int32_t>(call.tile * g.stride_t);
  p.by_stride_f = Divisor<int32_t>(g.stride_f);
  p.by_channels = Divisor<int32_t>(g.channels);
  p.add = call.add;
  p.windows = reinterpret_cast<const T*>(call.windows.data);
  p.out = reinterpret_cast<O*>(call.out.data);
  for (int axis = 0; axis < 4; ++axis) {
    p.stride[axis] = I(call.windows.stride[axis]);
    p.out_stride[axis] = I(call.out.stride[axis]);
  }
  const auto most = [](int64_t count) { return unsigned(count < 65535 ? count : 65535); };
  const int64_t wanted = ((g.frames + kFrames - 1) / kFrames + kLanes - 1) / kLanes * kLanes;
  const int64_t threads = wanted < kMostThreads ? wanted : kMostThreads;
  const dim3 grid(blocks((g.frames + threads * kFrames - 1) / (threads * kFrames), "overlap_add"), most(g.mel_bins),
                  most(blocks(g.batch * g.channels, "overlap_add")));
  AAPE_LAUNCH("overlap_add", (overlap_add_kernel<T, O, I, kFrames>), grid, dim3(unsigned(threads)), size_t(0), stream, p);
}

// Whether four frames can be moved at once, in and out, and are in the same windows.
inline bool by_quads(const OverlapAddCall& call) {
  const Grid& g = call.grid;
  const int64_t size = call.out.type == DType::kFloat64 ? 8 : call.out.type == DType::kFloat32 ? 4 : 2;
  int64_t all = g.frames | call.length | call.offset | call.tile * g.stride_t;
  for (int axis = 0; axis < 3; ++axis) all |= call.windows.stride[axis] | call.out.stride[axis];
  return (all | call.windows.stride[3]) % 4 == 0 && call.out.stride[3] == 1 && aligned<Quad<float>>(call.windows.data) &&
         reinterpret_cast<uintptr_t>(call.out.data) % (size < 4 ? 4 * size : 16) == 0;
}

void overlap_add(const OverlapAddCall& call, void* stream) {
  const Grid& g = call.grid;
  const int64_t tiles = (g.n_t + call.tile - 1) / call.tile, rows = g.channels * g.patch_f;
  const bool small = is_small(call.out, {g.batch, g.channels, g.mel_bins, g.frames}) &&
                     is_small(call.windows, {g.batch, g.n_f, tiles, rows, call.length});
  const auto run = [&](auto index, auto frames) {
    using I = decltype(index);
    constexpr int kFrames = decltype(frames)::value;
    if (call.windows.type == DType::kFloat64) return launch_overlap_add<double, double, I, kFrames>(call, stream);
    if (call.out.type == DType::kBFloat16) return launch_overlap_add<float, BFloat16, I, kFrames>(call, stream);
    if (call.out.type == DType::kFloat16) return launch_overlap_add<float, Float16, I, kFrames>(call, stream);
    launch_overlap_add<float, float, I, kFrames>(call, stream);
  };
  if (!small) run(int64_t(), std::integral_constant<int, 1>());
  else if (by_quads(call)) run(int32_t(), std::integral_constant<int, 4>());
  else run(int32_t(), std::integral_constant<int, 1>());
}

}  // namespace cuda
}  // namespace aape
