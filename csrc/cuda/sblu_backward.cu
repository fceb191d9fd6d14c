// SBLU backward: one kernel for the states (and y, which comes with them), one for the weight, two for x.
//
// Every output element is written by one thread, or is a sum in an order that follows from the shapes alone.

#include "api.h"
#include "sblu.cuh"

namespace aape {
namespace cuda {

// The cotangent of one token and state, (re, im).
template <class T, class IO>
AAPE_DEVICE Complex<T> load_grad(const SbluParams<T, IO>& p, const Tile& t, int64_t j, int64_t s) {
  const IO* from = p.grad + t.b * p.grad_stride[0] + t.i * p.grad_stride[1] + j * p.grad_stride[2] + s * p.grad_stride[4];
  return {widen<T>(from[0]), widen<T>(from[p.grad_stride[3]])};
}

// D = Σ± conj(ḡ±)(γ′P± − γ z dP±/dz): P and dP/dz from one Horner run that carries both.
template <class T, class IO, bool kQuadrature, bool kEven>
__global__ void __launch_bounds__(kThreads, kBlocks) sblu_backward_states_kernel(SbluParams<T, IO> p) {
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
    const Gain<T> g = gain<T, true>(state.decay, state.frequency, kEven);
    const T* left = u + n * p.grid.stride_t * kLanes + lane;
    const T* right = left + (window - 1) * kLanes;
    Complex<T> plus = {0, 0}, minus = {0, 0}, plus_slope = {0, 0}, minus_slope = {0, 0};
    for (int64_t m = 0; m < window / 2; ++m, left += kLanes, right -= kLanes) {
      plus_slope = plus_slope * g.z + plus;
      plus = step<T>(plus, g.z, *right + *left);
      if (kQuadrature) {
        minus_slope = minus_slope * g.z + minus;
        minus = step<T>(minus, g.z, *right - *left);
      }
    }
    if (!kEven) {
      plus_slope = plus_slope * g.z + plus;
      plus = step<T>(plus, g.z, *left);
      if (kQuadrature) {
        minus_slope = minus_slope * g.z + minus;
        minus = minus * g.z;
      }
    }
    const Complex<T> grad = load_grad(p, t, j, s);
    Complex<T> sum;
    if (kQuadrature) {
      // ḡ⁺ = Re ḡ, ḡ⁻ = j Im ḡ
      sum = adjoint<T>({grad.re, 0}, g, plus, plus_slope) + adjoint<T>({0, -grad.im}, g, minus, minus_slope);
    } else {
      sum = adjoint<T>({grad.re, -grad.im}, g, plus, plus_slope);
    }
    const int64_t at = t.b * p.grad_state_stride[0] + t.i * p.grad_state_stride[1] + j * p.grad_state_stride[2] +
                       s * p.grad_state_stride[3];
    p.grad_decay[at] = sum.re * state.decay_slope;
    p.grad_frequency[at] = -sum.im * state.frequency_slope;
    if (p.y) {
      Complex<T> y = g.gamma * plus;
      if (kQuadrature) y.im = (g.gamma * minus).im;
      IO* to = p.y + t.b * p.y_stride[0] + t.i * p.y_stride[1] + j * p.y_stride[2] + s * p.y_stride[4];
      to[0] = narrow<IO>(y.re);
      to[p.y_stride[3]] = narrow<IO>(y.im);
    }
  }
}

// Cotangents of u for the tile's frames, gu[frame · pitch + lane]: ∂L/∂w±_m = Re(conj(ḡ±) γ z^m). Tokens whose windows
// overlap take turns, so that a frame's sum is in their order.
template <class T, class IO, bool kQuadrature, bool kEven>
AAPE_DEVICE void spread(const SbluParams<T, IO>& p, const Tile& t, T* gu, int pitch) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t s = t.state + lane, window = p.grid.window;
  for (int64_t k = threadIdx.x; k < p.columns * pitch; k += kThreads) gu[k] = 0;
  __syncthreads();
  const int64_t rounds = (window + p.grid.stride_t - 1) / p.grid.stride_t;
  for (int64_t round = 0; round < rounds; ++round) {
    for (int64_t n = round + warp * rounds; n < t.count && s < p.grid.states; n += kWarps * rounds) {
      const int64_t j = t.first + n;
      const State<T> state = load_state(p, t, j, s);
      const Gain<T> g = gain<T, false>(state.decay, state.frequency, kEven);
      const Complex<T> grad = load_grad(p, t, j, s);
      T* left = gu + (n * p.grid.stride_t + (window - 1) / 2) * pitch + lane;
      T* right = left + (kEven ? pitch : 0);
      Complex<T> q = g.gamma;
      if (!kEven) {  // the centre frame: w⁺_0 = u, w⁻_0 = 0
        *left += kQuadrature ? grad.re * q.re : grad.re * q.re + grad.im * q.im;
        q = q * g.z;
        left -= pitch;
        right += pitch;
      }
      for (int64_t m = 0; m < window / 2; ++m, left -= pitch, right += pitch) {
        const T even = grad.re * q.re, odd = grad.im * q.im;
        *right += even + odd;
        *left += kQuadrature ? even - odd : even + odd;
        q = q * g.z;
      }
    }
    __syncthreads();
  }
}

// partial[program][s][r] = Σ_frames gu[frame][s] · x[r][frame] over the program's tiles; blockIdx.z counts kRowBlock rows.
template <class T, class IO, bool kQuadrature, bool kEven>
__global__ void __launch_bounds__(kThreads, kBlocks) sblu_backward_weight_kernel(SbluParams<T, IO> p) {
  AAPE_DYN_SHARED(memory);
  T* gu = reinterpret_cast<T*>(memory);
  T* xs = gu + p.columns * kLanes;
  T* ws = xs + kRowBlock * p.columns;
  constexpr int kRows = kRowBlock / kWarps;  // of a warp
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t tiles = p.grid.batch * p.grid.n_f * ((p.grid.n_t + p.tile - 1) / p.tile);
  const int64_t run = (tiles + p.programs - 1) / p.programs, rows = p.grid.channels * p.grid.patch_f;
  const int64_t first = blockIdx.x * run, last = first + run < tiles ? first + run : tiles;
  T sum[kRows] = {};
  for (int64_t unit = first; unit < last; ++unit) {
    const Tile t = tile_at(p.grid, p.tile, unit, blockIdx.y);
    spread<T, IO, kQuadrature, kEven>(p, t, gu, kLanes);
    load_rows(p, t, int64_t(blockIdx.z) * kRowBlock, xs, ws);
    __syncthreads();
    for (int64_t f = 0; f < t.frames; ++f) {
      const T value = gu[f * kLanes + lane];
#pragma unroll
      for (int k = 0; k < kRows; ++k) sum[k] += value * xs[(warp * kRows + k) * p.columns + f];
    }
    __syncthreads();  // before gu and xs are written again
  }
  const int64_t s = int64_t(blockIdx.y) * kLanes + lane;
  if (s >= p.grid.states) return;
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    const int64_t row = int64_t(blockIdx.z) * kRowBlock + warp * kRows + k;
    if (row < rows) p.partial[(int64_t(blockIdx.x) * p.grid.states + s) * rows + row] = sum[k];
  }
}

// windows[tile][r][frame] = Σ_s gu[frame][s] · weight[s][r]; blockIdx.y counts kRowBlock rows.
template <class T, class IO, bool kQuadrature, bool kEven>
__global__ void __launch_bounds__(kThreads, kBlocks) sblu_backward_windows_kernel(SbluParams<T, IO> p) {
  AAPE_DYN_SHARED(memory);
  constexpr int kPitch = kLanes + 1;  // lanes are frames when gu is read: no two in one bank
  T* gu = reinterpret_cast<T*>(memory);
  T* out = gu + p.columns * kPitch;  // [kRowBlock][columns]
  const int64_t rows = p.grid.channels * p.grid.patch_f, first = int64_t(blockIdx.y) * kRowBlock;
  const int64_t frames = (p.tile - 1) * p.grid.stride_t + p.grid.window;
  for (int64_t k = threadIdx.x; k < kRowBlock * p.columns; k += kThreads) out[k] = 0;
  for (int64_t block = 0; block * kLanes < p.grid.states; ++block) {
    const Tile t = tile_at(p.grid, p.tile, blockIdx.x, int(block));
    spread<T, IO, kQuadrature, kEven>(p, t, gu, kPitch);
    const int64_t count = p.grid.states - t.state < kLanes ? p.grid.states - t.state : kLanes;
    for (int64_t k = threadIdx.x; k < kRowBlock * p.columns; k += kThreads) {
      const int64_t row = first + k / p.columns, f = k % p.columns;
      if (row >= rows) continue;
      T sum = out[k];
      for (int64_t s = 0; s < count; ++s) sum += gu[f * kPitch + s] * p.weight[(t.state + s) * rows + row];
      out[k] = sum;
    }
    __syncthreads();  // before gu is written again
  }
  for (int64_t k = threadIdx.x; k < kRowBlock * frames; k += kThreads) {
    const int64_t row = first + k / frames, f = k % frames;
    if (row < rows) p.windows[(int64_t(blockIdx.x) * rows + row) * frames + f] = out[(k / frames) * p.columns + f];
  }
}

// Every pixel's sum over the tiles that hold it, in the order of subbands and tiles: x's gradient (B, C, F, T) by strides.
template <class T, class IO>
__global__ void __launch_bounds__(kThreads, kBlocks)
    overlap_add_kernel(SbluParams<T, IO> p, IO* out, int64_t stride_b, int64_t stride_c, int64_t stride_f,
                       int64_t stride_t) {
  const Grid& g = p.grid;
  const int64_t pixels = g.batch * g.channels * g.mel_bins * g.frames;
  const int64_t frames = (p.tile - 1) * g.stride_t + g.window, step = p.tile * g.stride_t;
  const int64_t tiles = (g.n_t + p.tile - 1) / p.tile, rows = g.channels * g.patch_f;
  for (int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x; k < pixels; k += int64_t(gridDim.x) * kThreads) {
    const int64_t t = k % g.frames, f = k / g.frames % g.mel_bins, c = k / g.frames / g.mel_bins % g.channels;
    const int64_t b = k / g.frames / g.mel_bins / g.channels;
    const int64_t at = t - (g.patch_t - g.window) / 2;  // from the first window's first frame
    T sum = 0;
    int64_t i = f < g.patch_f ? 0 : (f - g.patch_f) / g.stride_f + 1;
    for (; i < g.n_f && i * g.stride_f <= f; ++i) {
      int64_t tile = at < frames ? 0 : (at - frames) / step + 1;
      for (; tile < tiles && tile * step <= at; ++tile) {
        const int64_t row = c * g.patch_f + f - i * g.stride_f;
        sum += p.windows[(((b * g.n_f + i) * tiles + tile) * rows + row) * frames + at - tile * step];
      }
    }
    out[b * stride_b + c * stride_c + f * stride_f + t * stride_t] = narrow<IO>(sum);
  }
}

template <class T, class IO, bool kQuadrature, bool kEven>
void launch_backward(const SbluCall& call, const Scratch& scratch, void* stream) {
  SbluParams<T, IO> p = params<T, IO>(call);
  const unsigned tiles = unsigned(units(p)), states = unsigned((p.grid.states + kLanes - 1) / kLanes);
  const unsigned rows = unsigned((p.grid.channels * p.grid.patch_f + kRowBlock - 1) / kRowBlock);
  if (p.grad_decay) {
    AAPE_LAUNCH("sblu_backward", (sblu_backward_states_kernel<T, IO, kQuadrature, kEven>), dim3(tiles, states),
                dim3(kThreads), shared_bytes(p), stream, p);
  }
  if (scratch.partial) {
    p.partial = static_cast<T*>(scratch.partial);
    p.programs = scratch.programs;
    AAPE_LAUNCH("sblu_backward", (sblu_backward_weight_kernel<T, IO, kQuadrature, kEven>),
                dim3(unsigned(p.programs), states, rows), dim3(kThreads), shared_bytes(p), stream, p);
  }
  if (scratch.windows) {
    p.windows = static_cast<T*>(scratch.windows);
    const size_t shared = size_t(p.columns) * (kLanes + 1 + kRowBlock) * sizeof(T);
    AAPE_LAUNCH("sblu_backward", (sblu_backward_windows_kernel<T, IO, kQuadrature, kEven>), dim3(tiles, rows),
                dim3(kThreads), shared, stream, p);
    const int64_t pixels = p.grid.batch * p.grid.channels * p.grid.mel_bins * p.grid.frames;
    const int64_t blocks = (pixels + kThreads - 1) / kThreads;
    const View& x = call.grad_x;
    const dim3 grid(unsigned(blocks < 65535 ? blocks : 65535));
    AAPE_LAUNCH("sblu_backward", (overlap_add_kernel<T, IO>), grid, dim3(kThreads), size_t(0), stream, p,
                reinterpret_cast<IO*>(x.data), x.stride[0], x.stride[1], x.stride[2], x.stride[3]);
  }
}

template <class T, class IO>
void dispatch_backward(const SbluCall& call, const Scratch& scratch, void* stream) {
  const bool even = call.grid.window % 2 == 0;
  if (call.grid.quadrature && even) launch_backward<T, IO, true, true>(call, scratch, stream);
  else if (call.grid.quadrature) launch_backward<T, IO, true, false>(call, scratch, stream);
  else if (even) launch_backward<T, IO, false, true>(call, scratch, stream);
  else launch_backward<T, IO, false, false>(call, scratch, stream);
}

int64_t windows_size(const SbluCall& call) {
  const bool wide = call.x.type == DType::kFloat64;
  const Grid& g = call.grid;
  const int64_t tile = tile_tokens(g, wide ? 8 : 4);
  const int64_t tiles = g.batch * g.n_f * ((g.n_t + tile - 1) / tile);
  return tiles * g.channels * g.patch_f * ((tile - 1) * g.stride_t + g.window);
}

void sblu_backward(const SbluCall& call, const Scratch& scratch, void* stream) {
  switch (call.x.type) {
    case DType::kFloat32: return dispatch_backward<float, float>(call, scratch, stream);
    case DType::kFloat64: return dispatch_backward<double, double>(call, scratch, stream);
    case DType::kBFloat16: return dispatch_backward<float, BFloat16>(call, scratch, stream);
    case DType::kFloat16: return dispatch_backward<float, Float16>(call, scratch, stream);
  }
}

}  // namespace cuda
}  // namespace aape
