// SBLU backward on tensor cores, one pass over x: the gradients of the states, of the projection, and of every window.

#include "api.h"
#include "warp_sblu.cuh"

namespace aape {
namespace cuda {

// Whether windows' gradients need memory beside the pixels'.
template <class X>
constexpr bool windows_apart() {
  return !std::is_same_v<X, float>;
}

// A block's right factors, and what each warp has behind them.
template <class S>
struct UnitBackwardShared {
  using X = typename S::X;
  static constexpr size_t kSumsAt = Kept<S>::kBytes;
  static AAPE_FN size_t common_bytes(int blocks) { return 2 * blocks * S::kStateTiles * kLanes * sizeof(Weights<float>); }
  static AAPE_FN size_t lines_after(int blocks) { return kSumsAt + blocks * WeightSums<S>::kCount * sizeof(float); }
  Weights<X>* projection;  // (rows × states)
  Weights<float>* turned;  // (states × rows)
  Kept<S> kept;
  WeightSums<S> sums;
  X* lines;
  float* windows;  // their gradients, as lines of float32: of float32 in place of the pixels

  AAPE_DEVICE UnitBackwardShared(const WarpSbluParams<S>& p, unsigned char* memory) {
    const int lines_at = int(lines_after(p.blocks())), apart = windows_apart<X>() && p.windows.data;
    const int windows_at = lines_at + kTokensOfWarp * p.pitch() * int(sizeof(X));
    const int own_bytes = windows_at + apart * kTokensOfWarp * p.template pitch<float>() * int(sizeof(float));
    unsigned char* const own = memory + common_bytes(p.blocks()) + threadIdx.x / kLanes * own_bytes;
    projection = reinterpret_cast<Weights<X>*>(memory);
    turned = reinterpret_cast<Weights<float>*>(projection + p.blocks() * S::kStateTiles * kLanes);
    kept = {reinterpret_cast<Pack<float, 4>*>(own)};
    sums = {reinterpret_cast<float*>(own + kSumsAt), own_bytes};
    lines = reinterpret_cast<X*>(own + lines_at);
    windows = reinterpret_cast<float*>(own + (windows_apart<X>() ? windows_at : lines_at));
  }
};

// The projection's weights (states × rows): for every sixteen rows, two factors for every sixteen states.
template <class S>
AAPE_DEVICE void fill_turned(const WarpSbluParams<S>& p, Weights<float>* to, int first) {
  const int rows = p.rows();
  fill_rights(to, p.blocks() * S::kStateTiles, [&](int tile, int state, int column) {
    const int s = first + tile % S::kStateTiles / 2 * 16 + state;
    const int row = tile / S::kStateTiles * kRows + tile % 2 * 8 + column;
    return row < rows && s < p.grid.states ? load<float>(p.weight, s * rows + row) : 0.0f;
  });
}

// Of y, for the block's states.
template <class S>
AAPE_DEVICE void load_grad(const WarpSbluParams<S>& p, const TwoTokens& at, const Positions<S>& positions, int first,
                           Complex<float> (&grad)[S::kStateTiles][4]) {
  const auto plane = [&](int k) { return [&, k](int h) { return p.grad.row(positions.of[h], first, k); }; };
  const int count = p.grid.states - first;
#pragma unroll
  for (int n = 0; n < S::kStateTiles; n += 2) {
#pragma unroll
    for (int k = 0; k < 8; ++k) grad[n + k / 4][k % 4] = {0, 0};
    load_tiles<S>(at, n, count, plane(0), [&](int tile, int k) -> float& { return grad[n + tile][k].re; });
    load_tiles<S>(at, n, count, plane(1), [&](int tile, int k) -> float& { return grad[n + tile][k].im; });
  }
}

// Σ_s ∂u · weight, the windows' gradients, in lines of float32. A lane has four rows of two tokens in a frame.
template <class S>
AAPE_DEVICE void spread(const WarpSbluParams<S>& p, const UnitBackwardShared<S>& m, int pair, int block,
                        const Complex<float> (&grad)[S::kStateTiles][4]) {
  using Four = Pack<float, 4>;
  const int lane = threadIdx.x % kLanes, token = lane / 4, row = lane % 4 * 2;
  const int centre = p.line.window_first() + p.line.window() / 2;
  const auto weight = [&](int tile) { return load_right(m.turned + (block * S::kStateTiles + 2 * pair + tile) * kLanes); };
  const Split<Right<float>> weights[2] = {weight(0), weight(1)};
  const auto put = [&](const float (&frame)[2][4], int at) {
    Split<Left<float>> factor;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      factor.set(2 * tile, frame[tile][0], frame[tile][1]);
      factor.set(2 * tile + 1, frame[tile][2], frame[tile][3]);
    }
    Sums sums[2];
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) multiply(sums[tile], factor, weights[tile]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float* to = m.windows + (token + 8 * h) * p.template pitch<float>() + Layout<float>::in_line(token, p.group(at, block), row);
      Four value = {{sums[0].at[2 * h], sums[0].at[2 * h + 1], sums[1].at[2 * h], sums[1].at[2 * h + 1]}};
      if (pair) {
        const Four before = load_pack<Four>(to);
#pragma unroll
        for (int k = 0; k < 4; ++k) value.at[k] += before.at[k];
      }
      store_shared(to, value);
    }
  };
  each_grad_of_u(p, m.kept, pair, grad, [&](int f, const float (&right)[2][4], const float (&left)[2][4]) {
    put(right, centre + f);
    put(left, centre - 1 - f);
  });
}

// Four in X or, where the address has it, in float32.
template <class X, class I>
AAPE_DEVICE void store_four(const Values& to, I at, const Quad<float>& value) {
  if (std::is_same_v<X, float> || to.type == DType::kFloat32) {
    store_global(static_cast<float*>(to.data) + at, value);
  } else {
    Pack<X, 4> narrowed;
    for (int k = 0; k < 4; ++k) narrowed.at[k] = narrow<X>(value.at[k]);
    store_global(static_cast<X*>(to.data) + at, narrowed);
  }
}

// Lines -> the windows' gradients, in the order of `load_packs` of float32, or one by one.
template <class S>
AAPE_DEVICE void store_windows(const WarpSbluParams<S>& p, const float* lines, int first_token) {
  const int lane = threadIdx.x % kLanes;
  const auto window_of = [&](int m) {
    const Position at = position_of(p, first_token + m);
    return at.b * p.window_stride[0] + at.i * p.window_stride[1] + at.j * p.window_stride[2];
  };
  const auto place = [&](int m, int frame, int row) {
    return lines + m * p.template pitch<float>() + Layout<float>::in_line(m, p.group(frame, row / kRows), row % kRows);
  };
  const auto whole = [&](int count) {  // of packs of so many, which are 16 bytes at the most
    bool whole = p.packed() && p.window_stride[4] == 1 && aligned<Pack<float, 4>>(static_cast<char*>(p.windows.data));
    for (int axis = 0; axis < 4; ++axis) whole = whole && p.window_stride[axis] % count == 0;
    return whole;
  };
  using X = typename S::X;
  if constexpr (S::kUsual && !std::is_same_v<X, float>) {
    if (p.windows.type != DType::kFloat32 && whole(8)) {
      const Quarters own;
#pragma unroll 1
      for (int step = 0; step < 8; ++step) {
        const int m = own.token(step);
        const bool there = first_token + m < p.tokens;
        X* const to = static_cast<X*>(p.windows.data) + window_of(there ? m : 0);
        Quad<float> rows[2][2];  // [row][pair]
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          const auto two = load_pack<Two<float>>(place(m, own.frame(k / 4 * 2) + k % 4, own.row));
          for (int n = 0; n < 2; ++n) rows[n][k / 4].at[k % 4] = two.at[n];
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) store_sixteen(to + (own.row + n) * p.window_stride[3], there, own.half, rows[n]);
      }
      return;
    }
  }
  const bool packed = whole(4);
  if (packed) {
    const Quarters own;
    each_block(p, p.line.frames() / 4, [&](int block, int pair) {
      const int row = block * kRows + own.row, f = own.frame(pair);
      if (f >= p.line.frames()) return;
#pragma unroll 4
      for (int step = 0; step < 8; ++step) {
        const int m = own.token(step);
        if (first_token + m >= p.tokens) continue;
        Quad<float> rows[2];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const auto two = load_pack<Two<float>>(place(m, f + k, row));
          for (int n = 0; n < 2; ++n) rows[n].at[k] = two.at[n];
        }
        const auto to = window_of(m) + row * p.window_stride[3] + f;
        for (int n = 0; n < 2; ++n) {
          if (row + n < p.rows()) store_four<typename S::X>(p.windows, to + n * p.window_stride[3], rows[n]);
        }
      }
    });
  } else {
    for (int m = 0; m < kTokensOfWarp && first_token + m < p.tokens; ++m) {
      const auto to = window_of(m);
      for (int k = lane; k < p.rows() * p.line.window(); k += kLanes) {
        const auto [row, f] = p.by_window(k);
        store(p.windows, to + row * p.window_stride[3] + f * p.window_stride[4], *place(m, p.line.window_first() + f, row));
      }
    }
  }
}

template <class S>
__global__ void __launch_bounds__(S::kBackwardWarps* kLanes, 1) warp_sblu_backward_kernel(const WarpSbluParams<S> p) {
  AAPE_DYN_SHARED(memory);
  const UnitBackwardShared<S> m(p, memory);
  const int first = int(blockIdx.y) * S::kStates;
  m.sums.clear(p.blocks());
  fill_projection(p, p.weight, m.projection, first);
  if (p.windows.data) fill_turned(p, m.turned, first);
  __syncthreads();
  each_tile(p, m.lines, KeepNothing(), [&](const TwoTokens& at) {
    const Positions<S> positions(p, at);
    Complex<float> grad[S::kStateTiles][4];
    load_grad(p, at, positions, first, grad);
#pragma unroll 1
    for (int n = 0; n < S::kStateTiles; ++n) {
      State<float> states[4];
      load_states(p, at, positions, first, n, states);
      Complex<float> y[4], own[4];
      Slopes slopes[4];
      respond(p, m.lines, m.projection + n * kLanes, m.kept, n, states, y, slopes);
      for (int k = 0; k < 4; ++k) own[k] = grad[0][k];
      push(grad, own);  // all round once
      if (!p.grad_decay.data) continue;
      each_pair<S>(at, n, p.grid.states - first, [&](int h, int k, int s, bool two) {
        const auto along = [&](const Complex<float>& a, const Complex<float>& b, auto& to) {
          const auto row = to.row(positions.of[h], first);
          row.template store<false>(s, two, Slopes::along(a, own[k]), Slopes::along(b, own[k + 1]));
        };
        along(slopes[k].decay, slopes[k + 1].decay, p.grad_decay);
        along(slopes[k].frequency, slopes[k + 1].frequency, p.grad_frequency);
      });
    }
    if (p.partial) {
      each_pair_of_tiles(p, grad, [&](int pair, int block) { weigh(p, m.lines, m.kept, m.sums, pair, block, grad); });
    }
    if (p.windows.data) {
      __syncwarp();  // before pixels are written over
      each_pair_of_tiles(p, grad, [&](int pair, int block) { spread(p, m, pair, block, grad); });
      __syncwarp();
      store_windows(p, m.windows, at.first - int(threadIdx.x % kLanes / 4));
    }
  });
  if (p.partial) add_up(p, m.sums, p.partial, first);
}

template <class S>
Launch unit_backward_launch(const WarpSbluParams<S>& p) {
  const size_t windows = windows_apart<typename S::X>() && p.windows.data ? lines_bytes<S, float>(p) : 0;
  return launch_of(p.tokens, S::kBackwardWarps, UnitBackwardShared<S>::common_bytes(p.row_blocks),
                   UnitBackwardShared<S>::lines_after(p.row_blocks) + lines_bytes(p) + windows);
}

int64_t warp_sblu_programs(const SbluCall& call) {
  int64_t programs = 0;
  if (call.grad_x.data && call.grid.states > 32) return programs;  // which is of all states at once
  with_unit_sizes(call, [&](auto sizes) {
    const Launch launch = unit_backward_launch(warp_sblu_params<decltype(sizes)>(call));
    programs = launch.warps < kLeastWarps ? 0 : launch.blocks;
    return true;
  });
  return programs;
}

void warp_sblu_backward(const SbluCall& call, void* partial, void* stream) {
  with_unit_sizes(call, [&](auto sizes) {
    using S = decltype(sizes);
    WarpSbluParams<S> p = warp_sblu_params<S>(call);
    p.partial = static_cast<float*>(partial);
    const Launch launch = unit_backward_launch(p);
    const dim3 grid(unsigned(launch.blocks), unsigned((call.grid.states + S::kStates - 1) / S::kStates));
    AAPE_LAUNCH("sblu_backward", (warp_sblu_backward_kernel<S>), grid, dim3(unsigned(launch.warps * kLanes)), launch.shared,
                stream, p);
    return true;
  });
}

}  // namespace cuda
}  // namespace aape
