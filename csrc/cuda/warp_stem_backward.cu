// The stem's backward in bfloat16 on tensor cores, down to matrix products over all tokens: one pass over x from the
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
  unsigned char *common, *own;
  int own_bytes;

  static constexpr int kProjection = S::kStateTiles, kW2 = S::kHiddenTiles * S::kLogitSteps;
  static constexpr int kKept = S::kStateTiles * 4 * kLanes, kSums = S::kStates * kRows;
  static constexpr size_t kCommonBytes = (kProjection + kW2) * 32 * sizeof(Weights);
  static constexpr size_t kSumsAt = kKept * sizeof(Pack<float, 4>), kLinesAt = kSumsAt + kSums * sizeof(float);

  AAPE_DEVICE BackwardShared(const WarpStemParams<S>& p, unsigned char* memory) : common(memory) {
    own_bytes = int(kLinesAt) + kTokensOfWarp * p.line.pitch() * int(sizeof(BFloat16));
    own = memory + kCommonBytes + threadIdx.x / kLanes * own_bytes;
  }

  AAPE_DEVICE Weights* projection() const { return reinterpret_cast<Weights*>(common); }
  AAPE_DEVICE Weights* w2() const { return projection() + kProjection * 32; }  // as (logits × units)
  AAPE_DEVICE BFloat16* lines() const { return reinterpret_cast<BFloat16*>(own + kLinesAt); }
  // a lane's z and γ of state k of a tile
  AAPE_DEVICE Pack<float, 4>& kept(int tile, int k) const {
    return reinterpret_cast<Pack<float, 4>*>(own)[(tile * 4 + k) * kLanes + threadIdx.x % kLanes];
  }
  // the projection's gradient, of a warp that lies `warps` further: element `at` of what the lanes have
  AAPE_DEVICE float& sum(int at, int warps = 0) const {
    return reinterpret_cast<float*>(own + warps * own_bytes + kSumsAt)[at];
  }
};

template <class S>
AAPE_DEVICE void fill(const WarpStemParams<S>& p, const BackwardShared<S>& m) {
  const int units = p.hidden_units, states = p.grid.states;
  fill_projection(p, m.projection());
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

// What y's cotangent is multiplied by to give those of a state's logits: ∂r = re · ḡ.re + im · ḡ.im.
struct Slopes {
  Complex<float> decay, frequency;
};

// y of states 8n …, with its slopes; z and γ are kept.
template <class S>
AAPE_DEVICE void respond(const WarpStemParams<S>& p, const TwoTokens& at, const BackwardShared<S>& m, int n,
                         Complex<float> (&y)[4], Slopes (&slopes)[4]) {
  Sums logits[2];
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    each_pair(at, n, p.grid.states, [&](int h, int k, int s, bool two) {
      const float* r = p.r + (at.row(h) * 2 + part) * p.grid.states + s;
      load_two(r, two, logits[part].at[k], logits[part].at[k + 1]);
    });
  }
  // what Horner's rule does not need waits where z and γ will be
  Complex<float> z[4], gamma[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const State<float> state = state_of(p.squash, logits[0].at[k], logits[1].at[k]);
    const Gain<float> g = gain<float, true, true>(state.decay, state.frequency, true);
    z[k] = g.z;
    gamma[k] = g.gamma;
    m.kept(n, k) = {{g.derivative.re, g.derivative.im, state.decay_slope, state.frequency_slope}};
  }
  Jet<float> plus[4], minus[4];
#pragma unroll 1
  for (int f = 0; f < p.line.window() / 2; ++f) {
    Sums left, right;
    project(p, m.lines(), m.projection() + n * 32, f, left, right);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      plus[k].add(z[k], right.at[k] + left.at[k]);
      minus[k].add(z[k], right.at[k] - left.at[k]);
    }
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const auto [derivative_re, derivative_im, decay_slope, frequency_slope] = m.kept(n, k).at;
    const Gain<float> g = {z[k], gamma[k], {derivative_re, derivative_im}};
    y[k] = response(g.gamma, plus[k].value, minus[k].value, true);
    const Complex<float> one = {1, 0}, even = adjoint<float>(one, g, plus[k].value, plus[k].slope),
                         odd = adjoint<float>(one, g, minus[k].value, minus[k].slope);
    slopes[k] = {{even.re * decay_slope, odd.im * decay_slope}, {-even.im * frequency_slope, odd.re * frequency_slope}};
    m.kept(n, k) = {{z[k].re, z[k].im, gamma[k].re, gamma[k].im}};
  }
}

// The cotangent of y from that of the features.
template <class S>
AAPE_DEVICE void grad_of_y(const WarpStemParams<S>& p, const TwoTokens& at, const Complex<float> (&y)[S::kStateTiles][4],
                           const Levels<S>& levels, Complex<float> (&grad)[S::kStateTiles][4]) {
  const int states = p.grid.states;
  float grad_n[S::kStateTiles][4] = {};
#pragma unroll
  for (int n = 0; n < S::kStateTiles; ++n) {
#pragma unroll
    for (int k = 0; k < 4; ++k) grad[n][k] = {0, 0};
    each_pair(at, n, states, [&](int h, int k, int s, bool two) {
      const BFloat16* from = p.grad + at.row(h) * p.planes * states + s;
      if (p.planes != 1) {
        load_two(from, two, grad[n][k].re, grad[n][k + 1].re);
        load_two(from + states, two, grad[n][k].im, grad[n][k + 1].im);
      }
      if (p.planes != 2) load_two(from + (p.planes - 1) * states, two, grad_n[n][k], grad_n[n][k + 1]);
    });
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
  const int states = p.grid.states, units = p.hidden_units, width = 2 * states + units;
  Split<Left> grad_r[S::kLogitSteps];
#pragma unroll
  for (int part = 0; part < 2; ++part)
#pragma unroll
    for (int n = 0; n < S::kStateTiles; ++n) {
      Sums sum;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const Complex<float>& slope = part ? slopes[n][k].frequency : slopes[n][k].decay;
        sum.at[k] = fma(slope.re, grad[n][k].re, slope.im * grad[n][k].im);
      }
      each_pair(at, n, states, [&](int h, int k, int s, bool two) {
        BFloat16* to = p.grad_encoder + at.row(h) * width + part * states + s;
        store_two(to, sum.at[k], sum.at[k + 1], two);
      });
      set_half(grad_r[(part * S::kStateTiles + n) / 2], n, sum);
    }
#pragma unroll
  for (int n = 0; n < S::kHiddenTiles; ++n) {
    Sums sum;
#pragma unroll
    for (int k = 0; k < S::kLogitSteps; ++k) {
      multiply(sum, grad_r[k], load_right(m.w2() + (n * S::kLogitSteps + k) * 32));
    }
    each_pair(at, n, units, [&](int h, int k, int unit, bool two) {
      float hidden[2] = {0, 0};
      load_two(p.hidden + at.row(h) * units + unit, two, hidden[0], hidden[1]);
      float active[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float share = sigmoid<float>(hidden[e]);
        active[e] = hidden[e] * share;
        sum.at[k + e] *= share * fma(hidden[e], 1.0f - share, 1.0f);
      }
      store_two(p.grad_encoder + at.row(h) * width + 2 * states + unit, sum.at[k], sum.at[k + 1], two);
      store_two(p.operand + at.row(h) * p.row_step + p.active + unit, active[0], active[1], two);
    });
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (!at.there(h)) continue;
    BFloat16* row = p.operand + at.row(h) * p.row_step;
    for (int k = p.one + int(threadIdx.x % 4); k < p.active; k += 4) row[k] = BFloat16(k == p.one ? 1.0f : 0.0f);
  }
}

// The cotangents of a frame's u for 16 states, turned: a left factor (states × tokens).
struct FrameGrad {
  uint32_t at[2][2];  // tile of states, token
  AAPE_DEVICE void set(int tile, const float (&value)[4]) {
    at[tile][0] = pack(value[0], value[1]);
    at[tile][1] = pack(value[2], value[3]);
  }
  AAPE_DEVICE Left turned() const {
    return {{transposed(at[0][0]), transposed(at[1][0]), transposed(at[0][1]), transposed(at[1][1])}};
  }
};

// The sums (states × rows) += Σ over tokens and frames of ∂u · x, for states 16 · pair …; from the windows' centres outwards.
template <class S>
AAPE_DEVICE void weigh(const WarpStemParams<S>& p, const BackwardShared<S>& m, int pair,
                       const Complex<float> (&grad)[S::kStateTiles][4]) {
  Complex<float> z[2][4], q[2][4];
#pragma unroll
  for (int tile = 0; tile < 2; ++tile)
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const Pack<float, 4> kept = m.kept(2 * pair + tile, k);
      z[tile][k] = {kept.at[0], kept.at[1]};
      q[tile][k] = {kept.at[2], kept.at[3]};
    }
  Sums sums[2];
  const int half = p.line.window() / 2, first = p.line.window_first();
  for (int f = 0; f < half; ++f) {
    FrameGrad left, right;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      float sum[4], difference[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const Complex<float>& cotangent = grad[2 * pair + tile][k];
        const float odd = cotangent.im * q[tile][k].im;
        sum[k] = fma(cotangent.re, q[tile][k].re, odd);
        difference[k] = fma(cotangent.re, q[tile][k].re, -odd);
        q[tile][k] = q[tile][k] * z[tile][k];
      }
      right.set(tile, sum);
      left.set(tile, difference);
    }
    const auto add = [&](const FrameGrad& frame, int at) {
      const Left factor = frame.turned(), rows = load_rights(frame_of(p, m.lines(), first + at));
      multiply(sums[0], factor, Right{{rows.at[0], rows.at[1]}});
      multiply(sums[1], factor, Right{{rows.at[2], rows.at[3]}});
    };
    add(right, half + f);
    add(left, half - 1 - f);
  }
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int k = 0; k < 4; ++k) m.sum(((pair * 2 + n) * 4 + k) * kLanes + int(threadIdx.x % kLanes)) += sums[n].at[k];
}

// partial[block] = the sums of all warps.
template <class S>
AAPE_DEVICE void add_up(const WarpStemParams<S>& p, const BackwardShared<S>& m) {
  const int warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes, rows = p.rows();
  __syncthreads();
  for (int at = threadIdx.x; at < m.kSums; at += blockDim.x) {
    float total = 0;
    for (int n = 0; n < warps; ++n) total += m.sum(at, n - warp);
    const int lane = at % kLanes, k = at / kLanes % 4, tile = at / kLanes / 4;
    const int state = tile / 2 * 16 + lane / 4 + k / 2 * 8, row = tile % 2 * 8 + lane % 4 * 2 + k % 2;
    if (state < p.grid.states && row < rows) {
      p.partial[(int64_t(blockIdx.x) * p.grid.states + state) * rows + row] = total;
    }
  }
}

template <class S>
__global__ void __launch_bounds__(S::kMostWarps* kLanes, 1) warp_stem_backward_kernel(const WarpStemParams<S> p) {
  AAPE_DYN_SHARED(memory);
  const BackwardShared<S> m(p, memory);
  for (int k = threadIdx.x % kLanes; k < m.kSums; k += kLanes) m.sum(k) = 0;
  prefetch_rows(p);
  fill(p, m);
  __syncthreads();
  each_tile(p, m.lines(), [&](const TwoTokens& at) {
    Complex<float> grad[S::kStateTiles][4];
    {
      Slopes slopes[S::kStateTiles][4];
      Complex<float> y[S::kStateTiles][4];
#pragma unroll
      for (int n = 0; n < S::kStateTiles; ++n) respond(p, at, m, n, y[n], slopes[n]);
      Levels<S> levels;
      if (p.planes != 2) levels.set(y, p.grid.states);
      store_planes(p, at, y, levels);
      grad_of_y(p, at, y, levels, grad);
      through_encoder(p, at, m, grad, slopes);
    }
    if (p.grad_y) {
#pragma unroll
      for (int n = 0; n < S::kStateTiles; ++n) {
        each_pair(at, n, p.grid.states, [&](int h, int k, int s, bool two) {
          float* to = p.grad_y + at.row(h) * 2 * p.grid.states + s;
          store_two(to, grad[n][k].re, grad[n][k + 1].re, two);
          store_two(to + p.grid.states, grad[n][k].im, grad[n][k + 1].im, two);
        });
      }
    }
#pragma unroll
    for (int pair = 0; pair < S::kStateTiles / 2; ++pair) weigh(p, m, pair, grad);
  });
  add_up(p, m);
}

template <class S>
Launch backward_launch(const WarpStemParams<S>& p) {
  return launch_of(p.tokens, S::kMostWarps, BackwardShared<S>::kCommonBytes,
                   BackwardShared<S>::kLinesAt + lines_bytes(p.line));
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
    p.grad = reinterpret_cast<const BFloat16*>(call.grad.data);
    p.one = int(call.one);
    p.active = int(call.active);
    p.grad_encoder = reinterpret_cast<BFloat16*>(call.grad_encoder.data);
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
