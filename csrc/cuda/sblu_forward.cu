// SBLU forward: project a tile's frames, then every thread folds the window of one token and state and runs Horner's rule.

#include "api.h"
#include "sblu.cuh"

namespace aape {
namespace cuda {

template <class T, class IO, bool kQuadrature, bool kEven>
__global__ void __launch_bounds__(kThreads, kBlocks) sblu_forward_kernel(SbluParams<T, IO> p) {
  AAPE_DYN_SHARED(memory);
  T* u = reinterpret_cast<T*>(memory);
  T* xs = u + p.columns * kLanes;
  T* ws = xs + kRowBlock * p.columns;
  const Tile t = tile_at(p.grid, p.tile, blockIdx.x, blockIdx.y);
  project(p, t, xs, ws, u);

  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t s = t.state + lane, window = p.grid.window;
  if (s >= p.grid.states) return;
  for (int64_t n = warp; n < t.count; n += kWarps) {
    const int64_t j = t.first + n;
    const State<T> state = load_state(p, t, j, s);
    const Gain<T> g = gain<T, false>(state.decay, state.frequency, kEven);
    const T* left = u + n * p.grid.stride_t * kLanes + lane;
    const T* right = left + (window - 1) * kLanes;
    Complex<T> plus = {0, 0}, minus = {0, 0};
    for (int64_t m = 0; m < window / 2; ++m, left += kLanes, right -= kLanes) {
      plus = step<T>(plus, g.z, *right + *left);
      if (kQuadrature) minus = step<T>(minus, g.z, *right - *left);
    }
    if (!kEven) {
      plus = step<T>(plus, g.z, *left);
      if (kQuadrature) minus = minus * g.z;
    }
    Complex<T> y = g.gamma * plus;
    if (kQuadrature) y.im = (g.gamma * minus).im;
    IO* to = p.y + t.b * p.y_stride[0] + t.i * p.y_stride[1] + j * p.y_stride[2] + s * p.y_stride[4];
    to[0] = narrow<IO>(y.re);
    to[p.y_stride[3]] = narrow<IO>(y.im);
  }
}

template <class T, class IO>
void launch_forward(const SbluCall& call, void* stream) {
  const SbluParams<T, IO> p = params<T, IO>(call);
  const dim3 blocks(unsigned(units(p)), unsigned((p.grid.states + kLanes - 1) / kLanes));
  const size_t shared = shared_bytes(p);
  const bool even = p.grid.window % 2 == 0;
  if (p.grid.quadrature && even) {
    AAPE_LAUNCH("sblu", (sblu_forward_kernel<T, IO, true, true>), blocks, dim3(kThreads), shared, stream, p);
  } else if (p.grid.quadrature) {
    AAPE_LAUNCH("sblu", (sblu_forward_kernel<T, IO, true, false>), blocks, dim3(kThreads), shared, stream, p);
  } else if (even) {
    AAPE_LAUNCH("sblu", (sblu_forward_kernel<T, IO, false, true>), blocks, dim3(kThreads), shared, stream, p);
  } else {
    AAPE_LAUNCH("sblu", (sblu_forward_kernel<T, IO, false, false>), blocks, dim3(kThreads), shared, stream, p);
  }
}

void sblu(const SbluCall& call, void* stream) {
  switch (call.x.type) {
    case DType::kFloat32: return launch_forward<float, float>(call, stream);
    case DType::kFloat64: return launch_forward<double, double>(call, stream);
    case DType::kBFloat16: return launch_forward<float, BFloat16>(call, stream);
    case DType::kFloat16: return launch_forward<float, Float16>(call, stream);
  }
}

}  // namespace cuda
}  // namespace aape
