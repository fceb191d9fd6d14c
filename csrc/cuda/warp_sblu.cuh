// SBLU on tensor cores, 16 tokens a warp and 16 or 32 states a block: what its forward and its backward share.

#pragma once

#include "warp_states.cuh"

namespace aape {
namespace cuda {

// Of the compiled kernels: the type of x, y and their cotangents, and a block's states.
template <class X_, int kStates_, bool kUsual_>
struct UnitSizes {
  using X = X_;
  static constexpr int kStateTiles = kStates_ / 8, kStates = kStates_;
  static constexpr int kMostWarps = 12, kBackwardWarps = kStates > 16 ? 8 : backward_warps<X>(kMostWarps);
  static constexpr bool kUsual = kUsual_, kFours = false;
};

// One number for every token, state and, of y, plane: where it is, and strides in elements.
template <class T, class Offset>
struct Strided {
  T* data;
  Offset batch, subband, token, plane, state;

  // The states from `first` on; of y, in plane `k`.
  AAPE_DEVICE Row<T, Offset> row(const Position& where, int first, int k = 0) const {
    return {data, where.b * batch + where.i * subband + where.j * token + k * plane + first * state, state};
  }
};

template <class S>
struct WarpSbluParams : LineParams<S> {
  using X = typename S::X;
  using Offset = typename LineParams<S>::Offset;
  Squash<float> squash;
  Values weight;
  Strided<const float, Offset> decay, frequency;
  Strided<X, Offset> y;
  // of the backward; data is null where a gradient is not needed
  Strided<const X, Offset> grad;
  Strided<float, Offset> grad_decay, grad_frequency;
  float* partial;  // (blocks, S, C · P_f)
  Values windows;  // ∂x of every window, in X or in float32
  Offset window_stride[5];  // (B, N_f, N_t, C · P_f, K)
  Divisor<int32_t> by_window;
};

// Where a lane's two tokens are; what is not there is the last one.
template <class S>
struct Positions {
  Position of[2];
  AAPE_DEVICE Positions(const LineParams<S>& p, const TwoTokens& at)
      : of{position_of(p, at.there(0) ? at.row(0) : p.tokens - 1), position_of(p, at.there(1) ? at.row(1) : p.tokens - 1)} {}
};

// The states of tile n, a block's from `first` on; zero where there is none.
template <class S>
AAPE_DEVICE void load_states(const WarpSbluParams<S>& p, const TwoTokens& at, const Positions<S>& positions, int first, int n,
                             State<float> (&states)[4]) {
  Sums decay, frequency;
  each_pair<S>(at, n, p.grid.states - first, [&](int h, int k, int s, bool two) {
    p.decay.row(positions.of[h], first).template load<false>(s, two, decay.at[k], decay.at[k + 1]);
    p.frequency.row(positions.of[h], first).template load<false>(s, two, frequency.at[k], frequency.at[k + 1]);
  });
#pragma unroll
  for (int k = 0; k < 4; ++k) states[k] = state_of(p.squash, decay.at[k], frequency.at[k]);
}

template <class S>
WarpSbluParams<S> warp_sblu_params(const SbluCall& call) {
  WarpSbluParams<S> p = {};
  using Offset = typename WarpSbluParams<S>::Offset;
  set_lines<S>(p, call.grid, call.x, is_packed<typename S::X>(call.grid, call.x), false);
  p.squash = squash_of<float>(call.ranges);
  p.weight = {call.weight.data, call.weight.type};
  const auto strided = [](auto& to, const View& view, bool planes) {
    using T = std::remove_reference_t<decltype(*to.data)>;
    to = {reinterpret_cast<T*>(view.data), Offset(view.stride[0]), Offset(view.stride[1]), Offset(view.stride[2]),
          Offset(planes ? view.stride[3] : 0), Offset(view.stride[planes ? 4 : 3])};
  };
  strided(p.decay, call.decay, false);
  strided(p.frequency, call.frequency, false);
  strided(p.y, call.y, true);
  strided(p.grad, call.grad_y, true);
  strided(p.grad_decay, call.grad_decay, false);
  strided(p.grad_frequency, call.grad_frequency, false);
  p.windows = {call.grad_x.data, call.grad_x.type};
  copy_strides(p.window_stride, call.grad_x, 5);
  p.by_window = Divisor<int32_t>(call.grid.window);
  return p;
}

// run(UnitSizes()) with those of the call; false if there are none, or run says so.
template <class X, class Run>
bool with_unit_sizes_of(const SbluCall& call, Run run) {
  const Grid& g = call.grid;
  const std::initializer_list<int64_t> windows = {g.batch, g.n_f, g.n_t, g.channels * g.patch_f, g.window};
  const bool usual = is_packed<X>(g, call.x) && is_usual(g, call.x) && is_small(call) && is_small(call.grad_x, windows);
  if (g.states <= 16) return usual ? run(UnitSizes<X, 16, true>()) : run(UnitSizes<X, 16, false>());
  return usual ? run(UnitSizes<X, 32, true>()) : run(UnitSizes<X, 32, false>());
}

template <class Run>
bool with_unit_sizes(const SbluCall& call, Run run) {
  const auto is_alike = [&](const View& view) { return !view.data || view.type == call.x.type; };
  if (!has_lines(call.grid) || call.planes != 2 || call.grad_features.data || !is_alike(call.y) || !is_alike(call.grad_y)) {
    return false;
  }
  if (call.x.type == DType::kBFloat16) return with_unit_sizes_of<BFloat16>(call, run);
  return call.x.type == DType::kFloat32 && with_unit_sizes_of<float>(call, run);
}

}  // namespace cuda
}  // namespace aape
