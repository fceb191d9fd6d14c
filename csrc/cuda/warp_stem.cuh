// The stem on tensor cores, 16 tokens a warp: what its forward and its backward share.

#pragma once

#include "warp_states.cuh"

namespace aape {
namespace cuda {

// Of the compiled kernels: types of x and of the operand, states and hidden units, at the most, and the warps of a block, for
// which registers suffice.
template <class X_, class O_, int kStates_, int kHidden_, int kWarps_, bool kUsual_>
struct Sizes {
  using X = X_;
  using O = O_;
  static constexpr int kStateTiles = kStates_ / 8, kHiddenTiles = kHidden_ / 8;
  static constexpr int kMostWarps = kWarps_, kBackwardWarps = backward_warps<X>(kWarps_);
  static constexpr int kStates = kStates_, kHidden = kHidden_;
  static constexpr int kLogitSteps = 2 * kStates_ / 16, kHiddenSteps = kHidden_ / 16;  // of products over them
  // with numbers of states and units that are multiples of four
  static constexpr bool kUsual = kUsual_, kFours = kUsual_;
};

template <class S>
struct WarpStemParams : LineParams<S> {
  using O = typename S::O;
  int hidden_units, planes, row_step;
  Squash<float> squash;
  Values w1, b1, w2, b2, weight;
  O* operand;
  float *hidden, *r;  // written by the forward, read by the backward
  // of the backward
  const O* grad;     // the features' cotangent, (tokens, planes · S)
  int one, active;   // the operand's columns of ones and of SiLU(hidden)
  O* grad_encoder;   // (tokens, 2S + H): cotangents of r and of hidden
  float* grad_y;     // (tokens, 2S), or null
  float* partial;    // (blocks, S, C · P_f)
};

// Pixels, a pack or one, -> the operand.
template <class O>
struct KeepPatch {
  static constexpr bool kNarrow = sizeof(O) == 2;
  O* operand;
  int row_step;

  AAPE_DEVICE O* at(int token, int element) const { return operand + token * row_step + element; }
  template <class X, int kCount>
  AAPE_DEVICE void operator()(O* to, int element, const Pack<X, kCount>& pixels) const {
    if constexpr (std::is_same_v<X, uint32_t>) {  // pairs of the operand's own type
      store_global(to + element, pixels);
    } else {
      Pack<O, kCount> out;
#pragma unroll
      for (int k = 0; k < kCount; ++k) out.at[k] = narrow<O>(pixels.at[k]);
      store_global(to + element, out);
    }
  }
  template <class X>
  AAPE_DEVICE void operator()(O* to, int element, X pixel) const {
    to[element] = narrow<O>(widen<float>(pixel));
  }
  // A row of sixteen frames, as `store_sixteen` has it.
  AAPE_DEVICE void sixteen(int token, bool there, int row, int half, const Quad<float> (&own)[2]) const {
    store_sixteen(at(token, row * 16), there, half, own);
  }
};

template <class S, class Visit>
AAPE_DEVICE void each_tile(const WarpStemParams<S>& p, typename S::X* lines, Visit visit) {
  each_tile(p, lines, KeepPatch<typename S::O>{p.operand, p.row_step}, visit);
}

// What a lane's logits, sums k of one tile, say of its states.
AAPE_DEVICE void states_of(const Squash<float>& squash, const Sums& decay, const Sums& frequency, State<float> (&out)[4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) out[k] = state_of(squash, decay.at[k], frequency.at[k]);
}

// Of the four lanes that share tokens g and g + 8.
AAPE_DEVICE float token_sum(float value) {
  value += __shfl_xor_sync(0xFFFFFFFFu, value, 1);
  return value + __shfl_xor_sync(0xFFFFFFFFu, value, 2);
}

// The standardised log-magnitudes of two tokens. Sums over the states of a token: sum k belongs to token k / 2.
template <class S>
struct Levels {
  float level[S::kStateTiles][4];  // e, then n
  float inverse[2];                // 1/σ

  // e of the next eight states.
  AAPE_DEVICE void push_magnitudes(const Complex<float> (&y)[4]) {
    float own[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) own[k] = log_magnitude<float>(y[k]);
    push(level, own);
  }

  AAPE_DEVICE void standardise(int states) {
    float mean[2] = {0, 0}, variance[2] = {0, 0};
    for_each(states, [&](int n, int k) { mean[k / 2] += level[n][k]; });
    for (float& value : mean) value = token_sum(value) * (1.0f / float(states));
    for_each(states, [&](int n, int k) {
      level[n][k] -= mean[k / 2];
      variance[k / 2] = fma(level[n][k], level[n][k], variance[k / 2]);
    });
    for (int h = 0; h < 2; ++h) {
      inverse[h] = 1.0f / sqrtf(token_sum(variance[h]) * (1.0f / float(states)) + float(kVarianceFloor));
    }
    for_each(states, [&](int n, int k) { level[n][k] *= inverse[k / 2]; });
  }

  template <class Visit>
  static AAPE_DEVICE void for_each(int states, Visit visit) {
#pragma unroll
    for (int n = 0; n < S::kStateTiles; ++n)
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (n * 8 + int(threadIdx.x % 4) * 2 + k % 2 < states) visit(n, k);
  }
};

// A token's operand from column `first` on.
template <class S>
AAPE_DEVICE Row<typename S::O> operand_row(const WarpStemParams<S>& p, const TwoTokens& at, int h, int first) {
  return {p.operand, at.row(h) * p.row_step + first, 1};
}

// Planes of the operand: Re y and Im y, if they are features, of states 8n … after those before; and n of all.
template <class S>
AAPE_DEVICE void store_responses(const WarpStemParams<S>& p, const TwoTokens& at, int n, const Complex<float> (&before)[4],
                                 const Complex<float> (&y)[4]) {
  if (p.planes == 1) return;
  Sums two[2][2];  // [plane][tile]
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    two[0][0].at[k] = before[k].re, two[0][1].at[k] = y[k].re;
    two[1][0].at[k] = before[k].im, two[1][1].at[k] = y[k].im;
  }
#pragma unroll
  for (int plane = 0; plane < 2; ++plane) {
    const int first = p.length() + plane * p.grid.states;
    store_tile<S>(at, n, p.grid.states, [&](int h) { return operand_row(p, at, h, first); }, two[plane][0], two[plane][1]);
  }
}
template <class S>
AAPE_DEVICE void store_levels(const WarpStemParams<S>& p, const TwoTokens& at, const Levels<S>& levels) {
  const int first = p.length() + (p.planes - 1) * p.grid.states;
#pragma unroll
  for (int n = 0; n < S::kStateTiles; n += 2) {
    store_tiles<S>(at, n, p.grid.states, [&](int h) { return operand_row(p, at, h, first); },
                   [&](int tile, int k) { return levels.level[n + tile][k]; });
  }
}

// The operand's rows begin at multiples of 16 bytes, too.
template <class X, class O>
bool is_packed(const StemCall& call) {
  return is_packed<X>(call.grid, call.x) && call.operand.stride[0] % int64_t(16 / sizeof(O)) == 0 &&
         aligned<Pack<float, 4>>(call.operand.data);
}

template <class S>
WarpStemParams<S> warp_stem_params(const StemCall& call) {
  WarpStemParams<S> p = {};
  set_lines<S>(p, call.grid, call.x, is_packed<typename S::X, typename S::O>(call), call.time_major);
  p.hidden_units = int(call.hidden_units);
  p.planes = int(call.planes);
  p.row_step = int(call.operand.stride[0]);
  p.squash = squash_of<float>(call.ranges);
  const auto values = [](const View& view) { return Values{view.data, view.type}; };
  p.w1 = values(call.w1);
  p.b1 = values(call.b1);
  p.w2 = values(call.w2);
  p.b2 = values(call.b2);
  p.weight = values(call.weight);
  p.operand = reinterpret_cast<typename S::O*>(call.operand.data);
  p.hidden = reinterpret_cast<float*>(call.hidden.data);
  p.r = reinterpret_cast<float*>(call.r.data);
  return p;
}

// run(Sizes()) with the kernel's that a call of these types fits into.
template <class X, class O, class Run>
bool with_sizes_of(const StemCall& call, Run run) {
  constexpr bool kNarrow = std::is_same_v<X, BFloat16>;
  const bool usual = is_packed<X, O>(call) && is_usual(call.grid, call.x) && call.grid.states % 4 == 0 &&
                     call.hidden_units % 4 == 0;
  if (call.grid.states <= 16 && call.hidden_units <= 32) {
    return usual ? run(Sizes<X, O, 16, 32, kNarrow ? 16 : 12, true>()) : run(Sizes<X, O, 16, 32, 12, false>());
  }
  return usual ? run(Sizes<X, O, 32, 64, 8, true>()) : run(Sizes<X, O, 32, 64, 8, false>());
}

// run(Sizes()) with those that a call fits into; false if it fits into none, or run says so.
template <class Run>
bool with_sizes(const StemCall& call, Run run) {
  const Grid& g = call.grid;
  const int64_t tokens = g.batch * g.n_f * g.n_t;
  const bool fits = has_lines(g) && g.states <= 32 && call.hidden_units <= 64 && call.planes &&
                    tokens * call.operand.stride[0] < INT32_MAX && tokens * 192 < INT32_MAX;  // r, hidden and cotangents
  if (!fits) return false;
  const DType operand = call.operand.type;
  if (call.x.type == DType::kBFloat16) {
    return operand == DType::kBFloat16 && with_sizes_of<BFloat16, BFloat16>(call, run);
  }
  if (call.x.type != DType::kFloat32) return false;
  if (operand == DType::kBFloat16) return with_sizes_of<float, BFloat16>(call, run);
  if (operand == DType::kFloat16) return with_sizes_of<float, Float16>(call, run);
  return operand == DType::kFloat32 && with_sizes_of<float, float>(call, run);
}

}  // namespace cuda
}  // namespace aape
