// SBLU backward: one kernel for the states (and y, which comes with them), one for the weight, one for the windows of x.
//
// Every output element is written by one thread, or is a sum in an order that follows from the shapes alone.

#include "api.h"
#include "respond.cuh"

namespace aape {
namespace cuda {

// The cotangent of one token and state, (re, im).
template <class T, class IO, class I>
AAPE_DEVICE Complex<T> load_grad(const SbluParams<T, IO, I>& p, const Tile<I>& t, I j, I s) {
  const I at = t.b * p.grad_stride[0] + t.i * p.grad_stride[1] + j * p.grad_stride[2] + s * p.grad_stride[4];
  return {load<T>(p.grad, at), load<T>(p.grad, at + p.grad_stride[3])};
}

// D = Σ± conj(ḡ±)(γ′P± − γ z dP±/dz)
template <class T, class IO, class I>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) sblu_backward_states_kernel(const SbluParams<T, IO, I> p) {
  AAPE_DYN_SHARED(memory);
  const Tiles<T, IO, I> m(p, memory);
  const Tile<I> t = tile_at(p, int(blockIdx.x), I(blockIdx.y));
  project(p, t, m);

  const int lane = threadIdx.x % kLanes, window = int(p.grid.window);
  const bool quadrature = p.grid.quadrature, even = window % 2 == 0;
  const I s = t.state + lane;
  if (s >= p.grid.states) return;
  for (int n = threadIdx.x / kLanes; n < t.count; n += kWarps) {
    const I j = t.first + n;
    const State<T> state = load_state(p, t, j, s);
    const Gain<T> g = gain_of<T, true>(state, even);
    const T* left = m.u + n * int(p.grid.stride_t) * kPitch + lane;
    const T* right = left + (window - 1) * kPitch;
    Jet<T> plus, minus;
    for (int k = 0; k < window / 2; ++k, left += kPitch, right -= kPitch) {
      plus.add(g.z, *right + *left);
      if (quadrature) minus.add(g.z, *right - *left);
    }
    if (!even) {
      plus.add(g.z, *left);
      if (quadrature) minus.add(g.z, T(0));
    }
    const Complex<T> grad = load_grad(p, t, j, s);
    Complex<T> sum;
    if (quadrature) {
      // ḡ⁺ = Re ḡ, ḡ⁻ = j Im ḡ
      sum = adjoint<T>({grad.re, 0}, g, plus.value, plus.slope) +
            adjoint<T>({0, -grad.im}, g, minus.value, minus.slope);
    } else {
      sum = adjoint<T>({grad.re, -grad.im}, g, plus.value, plus.slope);
    }
    const I at = t.b * p.grad_state_stride[0] + t.i * p.grad_state_stride[1] + j * p.grad_state_stride[2] +
                 s * p.grad_state_stride[3];
    p.grad_decay[at] = sum.re * state.decay_slope;
    p.grad_frequency[at] = -sum.im * state.frequency_slope;
    if (p.y.data) store_response(p, t, j, s, response(g.gamma, plus.value, minus.value, quadrature));
  }
}

// Cotangents of u for the tile's frames, gu[frame][state]: ∂L/∂w±_m = Re(conj(ḡ±) γ z^m). Tokens whose windows overlap
// take turns, so that a frame's sum is in their order. Frames and lanes without a token or state are zero.
template <class T, class IO, class I>
AAPE_DEVICE void spread(const SbluParams<T, IO, I>& p, const Tile<I>& t, T* gu) {
  const int lane = threadIdx.x % kLanes, window = int(p.grid.window);
  const bool quadrature = p.grid.quadrature, even = window % 2 == 0;
  const I s = t.state + lane;
  for (int k = threadIdx.x; k < p.columns * kPitch; k += kThreads) gu[k] = 0;
  __syncthreads();
  const int step_t = int(p.grid.stride_t), rounds = p.rounds;
  for (int round = 0; round < rounds; ++round) {
    for (int n = round + int(threadIdx.x / kLanes) * rounds; n < t.count && s < p.grid.states; n += kWarps * rounds) {
      const I j = t.first + n;
      const Gain<T> g = gain_of<T, false>(load_state(p, t, j, s), even);
      const Complex<T> grad = load_grad(p, t, j, s);
      T* left = gu + (n * step_t + (window - 1) / 2) * kPitch + lane;
      T* right = left + (even ? kPitch : 0);
      Complex<T> q = g.gamma;
      if (!even) {  // the centre frame: w⁺_0 = u, w⁻_0 = 0
        *left += quadrature ? grad.re * q.re : fma(grad.re, q.re, grad.im * q.im);
        q = q * g.z;
        left -= kPitch;
        right += kPitch;
      }
      for (int m = 0; m < window / 2; ++m, left -= kPitch, right += kPitch) {
        const T odd_part = grad.im * q.im, sum = fma(grad.re, q.re, odd_part);
        *right += sum;
        *left += quadrature ? fma(grad.re, q.re, -odd_part) : sum;
        q = q * g.z;
      }
    }
    __syncthreads();
  }
}

// partial[program][s][r] = Σ_frames gu[frame][s] · x[r][frame] over the program's tiles; blockIdx.z counts kRowBlock rows.
// A thread has four states and a few rows; warps take frames in turn and are added up at the end.
template <class T, class IO, class I>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) sblu_backward_weight_kernel(const SbluParams<T, IO, I> p) {
  AAPE_DYN_SHARED(memory);
  T* gu = reinterpret_cast<T*>(memory);
  T* xs = gu + p.columns * kPitch;
  constexpr int kApart = Cell::kRows, kRows = kRowBlock / kApart;
  const Cell cell;
  const int warp = threadIdx.x / kLanes, state = cell.column * 4, line = cell.row;
  const unsigned tiles = unsigned(p.grid.batch * p.grid.n_f * p.by_tiles.divisor), run = unsigned(p.run), first = blockIdx.x * run;
  const int rows = int(p.grid.channels * p.grid.patch_f), r0 = blockIdx.z * kRowBlock;
  Quad<T> sum[kRows] = {};
  for (unsigned unit = first; unit < tiles && unit < first + run; ++unit) {
    const Tile<I> t = tile_at(p, int(unit), I(blockIdx.y));
    spread(p, t, gu);
    load_rows(p, t, r0, xs);
    __syncthreads();
    for (int f = warp * 4; f < t.frames; f += kWarps * 4) {
      Quad<T> x[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) x[r] = load_pack<Quad<T>>(xs + (line + kApart * r) * p.pitch() + f);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const auto g = load_pack<Quad<T>>(gu + (f + k) * kPitch + state);
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int s = 0; s < 4; ++s) sum[r].at[s] = fma(g.at[s], x[r].at[k], sum[r].at[s]);
      }
    }
    __syncthreads();  // before gu and xs are written again
  }
  // [warp][row][state], then one thread an element
  T* parts = gu;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    store_shared(parts + (warp * kRowBlock + line + kApart * r) * kPitch + state, sum[r]);
  }
  __syncthreads();
  for (int k = threadIdx.x; k < kRowBlock * kLanes; k += kThreads) {
    const int row = r0 + k % kRowBlock;
    const I s = I(blockIdx.y * kLanes) + k / kRowBlock;
    T total = 0;
    for (int n = 0; n < kWarps; ++n) total += parts[(n * kRowBlock + k % kRowBlock) * kPitch + k / kRowBlock];
    if (row < rows && s < p.grid.states) {
      p.partial[(int64_t(blockIdx.x) * p.grid.states + s) * rows + row] = total;
    }
  }
}

// windows[tile][r][frame] = Σ_s gu[frame][s] · weight[s][r]; blockIdx.y counts kRowBlock rows. A thread has two frames and
// four rows, of all states.
template <class T, class IO, class I>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) sblu_backward_windows_kernel(const SbluParams<T, IO, I> p) {
  AAPE_DYN_SHARED(memory);
  T* gu = reinterpret_cast<T*>(memory);
  T* ws = gu + p.columns * kPitch;  // [row][state]
  T* out = ws + kRowBlock * kPitch;  // [row][frame], for more states than one block of them
  constexpr int kFrames = kWarps * 16, kRows = kRowBlock / 4;
  const Cell cell;
  const int warp = threadIdx.x / kLanes, frame = cell.column, line = cell.row;
  const int rows = int(p.grid.channels * p.grid.patch_f), first = blockIdx.y * kRowBlock;
  const I count = (p.grid.states + kLanes - 1) / kLanes;
  T* to = p.windows + int64_t(blockIdx.x) * rows * p.columns;
  for (I block = 0; block < count; ++block) {
    const Tile<I> t = tile_at(p, int(blockIdx.x), block);
    spread(p, t, gu);
    load_weights(p, t, first, ws);
    __syncthreads();
    for (int f = warp * 16 + frame; f < p.columns; f += kFrames) {
      T sum[2][kRows];
#pragma unroll
      for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const bool before = block && f + 8 * k < p.columns;
          sum[k][r] = before ? out[(line + 4 * r) * p.pitch() + f + 8 * k] : T(0);
        }
#pragma unroll
      for (int s = 0; s < kLanes; s += 4) {
        Quad<T> w[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) w[r] = load_pack<Quad<T>>(ws + (line + 4 * r) * kPitch + s);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          if (f + 8 * k >= p.columns) continue;
          const auto g = load_pack<Quad<T>>(gu + (f + 8 * k) * kPitch + s);
#pragma unroll
          for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int n = 0; n < 4; ++n) sum[k][r] = fma(g.at[n], w[r].at[n], sum[k][r]);
        }
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int at = f + 8 * k;
        if (at >= p.columns) continue;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int row = line + 4 * r;
          if (block + 1 < count) out[row * p.pitch() + at] = sum[k][r];
          else if (first + row < rows) to[int64_t(first + row) * p.columns + at] = sum[k][r];
        }
      }
    }
    __syncthreads();  // before gu is written again
  }
}

template <class T, class IO, class I>
void launch_states(const SbluCall& call, const SbluParams<T, IO, I>& p, void* stream) {
  const dim3 grid(blocks(units(call.grid, p.tile), "sblu_backward"), state_blocks(call.grid));
  AAPE_LAUNCH("sblu_backward", (sblu_backward_states_kernel<T, IO, I>), grid, dim3(kThreads),
              shared_bytes(p.columns, sizeof(T)), stream, p);
}

template <class T, class IO, class I>
void launch_weight(const SbluCall& call, SbluParams<T, IO, I> p, void* partial, int64_t programs, void* stream) {
  p.partial = static_cast<T*>(partial);
  p.run = int((units(call.grid, p.tile) + programs - 1) / programs);
  const size_t tiles = size_t(p.columns) * kPitch + size_t(kRowBlock) * size_t(p.columns + 4);
  const size_t parts = size_t(kWarps) * kRowBlock * kPitch;
  const dim3 grid(unsigned(programs), state_blocks(call.grid), row_blocks(call.grid));
  AAPE_LAUNCH("sblu_backward", (sblu_backward_weight_kernel<T, IO, I>), grid, dim3(kThreads),
              (tiles > parts ? tiles : parts) * sizeof(T), stream, p);
}

template <class T, class IO, class I>
void launch_windows(const SbluCall& call, SbluParams<T, IO, I> p, void* windows, void* stream) {
  p.windows = static_cast<T*>(windows);
  const size_t kept = state_blocks(call.grid) > 1 ? size_t(kRowBlock) * size_t(p.columns + 4) : 0;
  const size_t shared = (size_t(p.columns + kRowBlock) * kPitch + kept) * sizeof(T);
  const dim3 grid(blocks(units(call.grid, p.tile), "sblu_backward"), row_blocks(call.grid));
  AAPE_LAUNCH("sblu_backward", (sblu_backward_windows_kernel<T, IO, I>), grid, dim3(kThreads), shared, stream, p);
}

void sblu_backward_states(const SbluCall& call, void* stream) {
  dispatch(call, is_small(call), [&](const auto& p) { launch_states(call, p, stream); });
}

void sblu_backward_weight(const SbluCall& call, void* partial, int64_t programs, void* stream) {
  dispatch(call, is_small(call), [&](const auto& p) { launch_weight(call, p, partial, programs, stream); });
}

void sblu_backward_windows(const SbluCall& call, void* windows, void* stream) {
  dispatch(call, is_small(call), [&](const auto& p) { launch_windows(call, p, windows, stream); });
}

}  // namespace cuda
}  // namespace aape
