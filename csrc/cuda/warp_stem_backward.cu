// The stem's backward on tensor cores, down to matrix products over all tokens: one pass over x from the
// features' cotangent to those of r and hidden, the projection's gradient, and the operand of the products that are left.
//
// Those are products of whole columns of the operand [patch | features | 1 0 … | SiLU(hidden)] with the tokens' cotangent,
// which gives the gradients of the two weights that make tokens and of their bias, and with [∂r | ∂hidden], which gives
// those of the encoder's weights and biases.

#include "api.h"
#include "warp_stem.cuh"

namespace aape {
namespace cuda {

// A block's right factors, and what each warp has behind them: places follow from one address.
template <class S>
struct BackwardShared {
  using X = typename S::X;
  unsigned char *common, *own;
  int own_bytes, lines_at;

  static constexpr int kW2 = S::kHiddenTiles * S::kLogitSteps;
  static constexpr size_t kSumsAt = Kept<S>::kBytes;
  static AAPE_FN size_t common_bytes(int blocks) { return (kW2 + blocks * S::kStateTiles) * kLanes * sizeof(Weights<X>); }
  static AAPE_FN size_t lines_after(int blocks) { return kSumsAt + blocks * WeightSums<S>::kCount * sizeof(float); }

  AAPE_DEVICE BackwardShared(const WarpStemParams<S>& p, unsigned char* memory) : common(memory) {
    lines_at = int(lines_after(p.blocks()));
    own_bytes = lines_at + kTokensOfWarp * p.pitch() * int(sizeof(X));
    own = memory + common_bytes(p.blocks()) + threadIdx.x / kLanes * own_bytes;
  }

  AAPE_DEVICE Weights<X>* w2() const { return reinterpret_cast<Weights<X>*>(common); }  // as (logits × units)
  AAPE_DEVICE Weights<X>* projection() const { return w2() + kW2 * kLanes; }
  AAPE_DEVICE X* lines() const { return reinterpret_cast<X*>(own + lines_at); }
  AAPE_DEVICE Kept<S> kept() const { return {reinterpret_cast<Pack<float, 4>*>(own)}; }
  AAPE_DEVICE WeightSums<S> sums() const { return {reinterpret_cast<float*>(own + kSumsAt), own_bytes}; }
};

template <class S>
AAPE_DEVICE void fill(const WarpStemParams<S>& p, const BackwardShared<S>& m) {
  const int units = p.hidden_units, states = p.grid.states;
  fill_projection(p, p.weight, m.projection());
  fill_rights(m.w2(), m.kW2, [&](int tile, int row, int column) {
    const int h = tile / S::kLogitSteps * 8 + column, logit = tile % S::kLogitSteps * 16 + row;
    const int s = logit % S::kStates, part = logit / S::kStates;
    return s < states && h < units ? load<float>(p.w2, (part * states + s) * units + h) : 0.0f;
  });
}

// What the first tile reads beside x, while the block fills its shared memory: a quarter of every row a lane.
template <class S>
AAPE_DEVICE void prefetch_rows(const WarpStemParams<S>& p) {
  const TwoTokens tokens = tokens_at(p, first_tile());
  const int quarter = int(threadIdx.x % 4);
  for (int h = 0; h < 2; ++h) {
    if (!tokens.there(h)) continue;
    const int row = 4 * tokens.row(h) + quarter;
    prefetch(p.r + row * (2 * p.grid.states) / 4);
    prefetch(p.hidden + row * p.hidden_units / 4);
    prefetch(p.grad + row * (p.planes * p.grid.states) / 4);
  }
}

// What the logits that the forward kept say of states 8n ….
template <class S>
AAPE_DEVICE void load_states(const WarpStemParams<S>& p, const TwoTokens& at, int n, State<float> (&states)[4]) {
  Sums logits[2];
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    each_pair<S>(at, n, p.grid.states, [&](int h, int k, int s, bool two) {
      const Row<const float> row = {p.r, (at.row(h) * 2 + part) * p.grid.states, 1};
      row.load<S::kFours>(s, two, logits[part].at[k], logits[part].at[k + 1]);
    });
  }
  states_of(p.squash, logits[0], logits[1], states);
}

// The cotangent of y from that of the features.
template <class S>
AAPE_DEVICE void grad_of_y(const WarpStemParams<S>& p, const TwoTokens& at, const Complex<float> (&y)[S::kStateTiles][4],
                           const Levels<S>& levels, Complex<float> (&grad)[S::kStateTiles][4]) {
  const int states = p.grid.states;
  float grad_n[S::kStateTiles][4] = {};
  const auto plane = [&](int k) {
    return [&p, &at, k](int h) { return Row<const typename S::O>{p.grad, (at.row(h) * p.planes + k) * p.grid.states, 1}; };
  };
#pragma unroll
  for (int n = 0; n < S::kStateTiles; n += 2) {
#pragma unroll
    for (int k = 0; k < 8; ++k) grad[n + k / 4][k % 4] = {0, 0};
    if (p.planes != 1) {
      load_tiles<S>(at, n, states, plane(0), [&](int tile, int k) -> float& { return grad[n + tile][k].re; });
      load_tiles<S>(at, n, states, plane(1), [&](int tile, int k) -> float& { return grad[n + tile][k].im; });
    }
    if (p.planes != 2) {
      load_tiles<S>(at, n, states, plane(p.planes - 1), [&](int tile, int k) -> float& { return grad_n[n + tile][k]; });
    }
  }
  if (p.planes == 2) return;
  // ∂L/∂e = (ḡ − mean ḡ − n · mean(ḡ n))/σ
  float mean[2] = {0, 0}, along[2] = {0, 0};
  levels.for_each(states, [&](int n, int k) {
    mean[k / 2] += grad_n[n][k];
    along[k / 2] = fma(grad_n[n][k], levels.level[n][k], along[k / 2]);
  });
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    mean[h] = token_sum(mean[h]) * (1.0f / float(states));
    along[h] = token_sum(along[h]) * (1.0f / float(states));
  }
  levels.for_each(states, [&](int n, int k) {
    const float level = levels.level[n][k];
    const float grad_e = fma(-level, along[k / 2], grad_n[n][k] - mean[k / 2]) * levels.inverse[k / 2];
    const Complex<float> slope = log_magnitude_slope<float>(y[n][k]);
    if (at.there(k / 2)) grad[n][k] = {fma(grad_e, slope.re, grad[n][k].re), fma(grad_e, slope.im, grad[n][k].im)};
  });
}

// The cotangents of r and hidden, and SiLU(hidden).
template <class S>
AAPE_DEVICE void through_encoder(const WarpStemParams<S>& p, const TwoTokens& at, const BackwardShared<S>& m,
                                 const Complex<float> (&grad)[S::kStateTiles][4],
                                 const Slopes (&slopes)[S::kStateTiles][4]) {
  const int states = p.grid.states, units = p.hidden_units;
  const auto encoder = [&](int first) {
    return [&p, &at, first](int h) {
      const int width = 2 * p.grid.states + p.hidden_units;
      return Row<typename S::O>{p.grad_encoder, at.row(h) * width + first, 1};
    };
  };
  Split<Left<typename S::X>> grad_r[S::kLogitSteps];
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    Sums sums[S::kStateTiles];
#pragma unroll
    for (int n = 0; n < S::kStateTiles; ++n) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const Complex<float>& slope = part ? slopes[n][k].frequency : slopes[n][k].decay;
        sums[n].at[k] = Slopes::along(slope, grad[n][k]);
      }
      store_tile<S>(at, n, states, encoder(part * states), sums[n ? n - 1 : 0], sums[n]);
      set_half(grad_r[(part * S::kStateTiles + n) / 2], n, sums[n]);
    }
  }
  const auto active = [&](int h) { return operand_row(p, at, h, p.active); };
  Sums before[2];  // of the tile before, from where two are stored
#pragma unroll 1
  for (int n = 0; n < S::kHiddenTiles; ++n) {
    Sums own[2];  // the cotangent of hidden; SiLU(hidden)
#pragma unroll
    for (int k = 0; k < S::kLogitSteps; ++k) {
      add_product(own[0], grad_r[k], load_right(m.w2() + (n * S::kLogitSteps + k) * 32));
    }
    each_pair<S>(at, n, units, [&](int h, int k, int unit, bool two) {
      const Row<const float> row = {p.hidden, at.row(h) * units, 1};
      row.load<S::kFours>(unit, two, own[1].at[k], own[1].at[k + 1]);
#pragma unroll
      for (int e = k; e < k + 2; ++e) {
        const float hidden = own[1].at[e], share = sigmoid<float>(hidden);
        own[1].at[e] = hidden * share;
        own[0].at[e] *= share * fma(hidden, 1.0f - share, 1.0f);
      }
      if constexpr (!in_sectors<typename S::O>()) {
        encoder(2 * states)(h).template store<S::kFours>(unit, two, own[0].at[k], own[0].at[k + 1]);
        active(h).template store<S::kFours>(unit, two, own[1].at[k], own[1].at[k + 1]);
      }
    });
    if constexpr (in_sectors<typename S::O>()) {
      store_tile<S>(at, n, units, encoder(2 * states), before[0], own[0]);
      store_tile<S>(at, n, units, active, before[1], own[1]);
    }
    before[0] = own[0];
    before[1] = own[1];
  }
  // the column of ones, and zeros behind it
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (!at.there(h)) continue;
    if constexpr (S::kFours) {
#pragma unroll 1
      for (int k = int(threadIdx.x % 4) * 4; k < p.active - p.one; k += 16) {
        Pack<typename S::O, 4> four = {};
        if (k == 0) four.at[0] = narrow<typename S::O>(1.0f);
        operand_row(p, at, h, p.one).template store<true>(k, p.active - p.one, four);
      }
    } else {
      auto* row = p.operand + at.row(h) * p.row_step;
      for (int k = p.one + int(threadIdx.x % 4); k < p.active; k += 4) {
        row[k] = narrow<typename S::O>(k == p.one ? 1.0f : 0.0f);
      }
    }
  }
}

template <class S>
__global__ void __launch_bounds__(S::kBackwardWarps* kLanes, 1) warp_stem_backward_kernel(const WarpStemParams<S> p) {
  AAPE_DYN_SHARED(memory);
  const BackwardShared<S> m(p, memory);
  m.sums().clear(p.blocks());
  prefetch_rows(p);
  fill(p, m);
  __syncthreads();
  each_tile(p, m.lines(), [&](const TwoTokens& at) {
    Complex<float> grad[S::kStateTiles][4];
    {
      Slopes slopes[S::kStateTiles][4];
      Complex<float> y[S::kStateTiles][4] = {};
      Levels<S> levels;
#pragma unroll 1
      for (int n = 0; n < S::kStateTiles; ++n) {
        State<float> states[4];
        load_states(p, at, n, states);
        Complex<float> own_y[4];
        Slopes own_slopes[4];
        respond(p, m.lines(), m.projection() + n * kLanes, m.kept(), n, states, own_y, own_slopes);
        store_responses(p, at, n, y[S::kStateTiles - 1], own_y);
        levels.push_magnitudes(own_y);
        push(y, own_y);
        push(slopes, own_slopes);
      }
      if (p.planes != 2) {
        levels.standardise(p.grid.states);
        store_levels(p, at, levels);
      }
      grad_of_y(p, at, y, levels, grad);
      through_encoder(p, at, m, grad, slopes);
    }
    if (p.grad_y) {
#pragma unroll 1
      for (int n = 0; n < S::kStateTiles; ++n) {
        each_pair<S>(at, n, p.grid.states, [&](int h, int k, int s, bool two) {
          const Row<float> row = {p.grad_y, at.row(h) * 2 * p.grid.states, 1};
          row.store<S::kFours>(s, two, grad[0][k].re, grad[0][k + 1].re);
          row.store<S::kFours>(p.grid.states + s, two, grad[0][k].im, grad[0][k + 1].im);
        });
        rotate<1>(grad);
      }
    }
    each_pair_of_tiles(p, grad, [&](int pair, int block) { weigh(p, m.lines(), m.kept(), m.sums(), pair, block, grad); });
  });
  add_up(p, m.sums(), p.partial);
}

template <class S>
Launch backward_launch(const WarpStemParams<S>& p) {
  return launch_of(p.tokens, S::kBackwardWarps, BackwardShared<S>::common_bytes(p.row_blocks),
                   BackwardShared<S>::lines_after(p.row_blocks) + lines_bytes(p));
}

int64_t warp_stem_programs(const StemCall& call) {
  int64_t programs = 0;
  with_sizes(call, [&](auto sizes) {
    const Launch launch = backward_launch(warp_stem_params<decltype(sizes)>(call));
    programs = launch.warps < kLeastWarps ? 0 : launch.blocks;
    return true;
  });
  return programs;
}

void warp_stem_backward(const StemGradientCall& call, void* stream) {
  with_sizes(call, [&](auto sizes) {
    using S = decltype(sizes);
    WarpStemParams<S> p = warp_stem_params<S>(call);
    p.grad = reinterpret_cast<const typename S::O*>(call.grad.data);
    p.one = int(call.one);
    p.active = int(call.active);
    p.grad_encoder = reinterpret_cast<typename S::O*>(call.grad_encoder.data);
    p.grad_y = reinterpret_cast<float*>(call.grad_y.data);
    p.partial = reinterpret_cast<float*>(call.partial.data);
    const Launch launch = backward_launch(p);
    AAPE_LAUNCH("embed_backward", (warp_stem_backward_kernel<S>), dim3(unsigned(launch.blocks)),
                dim3(unsigned(launch.warps * kLanes)), launch.shared, stream, p);
    return true;
  });
}

}  // namespace cuda
}  // namespace aape
