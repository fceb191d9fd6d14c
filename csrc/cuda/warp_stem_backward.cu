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

// A block's right factors, and what each warp has behind them.
template <class S>
struct BackwardShared {
  Weights *projection, *w2;  // w2 as (logits × units)
  Pack<float, 4>* kept;      // a lane's z and γ
  BFloat16* lines;
  float* sums;               // of the projection's gradient

  static constexpr int kProjection = S::kStateTiles, kW2 = S::kHiddenTiles * S::kLogitSteps;
  static constexpr int kKept = S::kStateTiles * 4 * kLanes;
  static constexpr int kSums = S::kStates * kRows;
  static_assert(kSums * sizeof(float) <= kKept * sizeof(Pack<float, 4>), "the sums fit into what the warps had");

  static constexpr size_t kCommonBytes = (kProjection + kW2) * 32 * sizeof(Weights);
  static size_t own_bytes(const Line<S::kUsual>& line) { return kKept * sizeof(Pack<float, 4>) + lines_bytes(line); }

  AAPE_DEVICE BackwardShared(const WarpStemParams<S>& p, unsigned char* memory)
      : projection(reinterpret_cast<Weights*>(memory)), w2(projection + kProjection * 32) {
    unsigned char* own = memory + kCommonBytes;
    sums = reinterpret_cast<float*>(own);
    kept = reinterpret_cast<Pack<float, 4>*>(own) + threadIdx.x / kLanes * kKept;
    lines = reinterpret_cast<BFloat16*>(reinterpret_cast<Pack<float, 4>*>(own) + blockDim.x / kLanes * kKept) +
            threadIdx.x / kLanes * kTokensOfWarp * p.line.pitch();
  }
};

template <class S>
AAPE_DEVICE void fill(const WarpStemParams<S>& p, const BackwardShared<S>& m) {
  const int units = p.hidden_units, states = p.grid.states;
  fill_projection(p, m.projection);
  fill_rights(m.w2, m.kW2, [&](int tile, int row, int column) {
    const int h = tile / S::kLogitSteps * 8 + column, logit = tile % S::kLogitSteps * 16 + row;
    const int s = logit % S::kStates, part = logit / S::kStates;
    return s < states && h < units ? load<float>(p.w2, (part * states + s) * units + h) : 0.0f;
  });
}

// What y's cotangent is multiplied by to give those of a state's logits: ∂r = re · ḡ.re + im · ḡ.im.
struct Slopes {
  Complex<float> decay, frequency;
};

// y of states 8n …, with its slopes; z and γ are kept.
template <class S>
AAPE_DEVICE void respond(const WarpStemParams<S>& p, const TwoTokens& at, const BackwardShared<S>& m, int n,
                         Complex<float> (&y)[4], Slopes (&slopes)[4]) {
  const Split<Right> weight = load_right(m.projection + n * 32);
  Sums logits[2];
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    each_pair(at, n, p.grid.states, [&](int h, int k, int s, bool two) {
      const float* r = p.r + (int64_t(at.row(h)) * 2 + part) * p.grid.states + s;
      load_two(r, two, logits[part].at[k], logits[part].at[k + 1]);
    });
  }
  // what Horner's rule does not need waits where z and γ will be
  Pack<float, 4>* kept = m.kept + n * 4 * kLanes + threadIdx.x % kLanes;
  Complex<float> z[4], gamma[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const State<float> state = state_of(p.squash, logits[0].at[k], logits[1].at[k]);
    const Gain<float> g = gain<float, true>(state.decay, state.frequency, true);
    z[k] = g.z;
    gamma[k] = g.gamma;
    kept[k * kLanes] = {{g.derivative.re, g.derivative.im, state.decay_slope, state.frequency_slope}};
  }
  Jet<float> plus[4], minus[4];
  for (int f = 0; f < p.line.window() / 2; ++f) {
    Sums left, right;
    project(p, m.lines, weight, f, left, right);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      plus[k].add(z[k], right.at[k] + left.at[k]);
      minus[k].add(z[k], right.at[k] - left.at[k]);
    }
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const auto [derivative_re, derivative_im, decay_slope, frequency_slope] = kept[k * kLanes].at;
    const Gain<float> g = {z[k], gamma[k], {derivative_re, derivative_im}};
    y[k] = response(g.gamma, plus[k].value, minus[k].value, true);
    const Complex<float> one = {1, 0}, even = adjoint<float>(one, g, plus[k].value, plus[k].slope),
                         odd = adjoint<float>(one, g, minus[k].value, minus[k].slope);
    slopes[k] = {{even.re * decay_slope, odd.im * decay_slope}, {-even.im * frequency_slope, odd.re * frequency_slope}};
    kept[k * kLanes] = {{z[k].re, z[k].im, gamma[k].re, gamma[k].im}};
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
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (e && !two) break;
        const int64_t from = int64_t(at.row(h)) * p.planes * states + s + e;
        if (p.planes != 1) grad[n][k + e] = {load<float>(p.grad, from), load<float>(p.grad, from + states)};
        if (p.planes != 2) grad_n[n][k + e] = load<float>(p.grad, from + (p.planes - 1) * states);
      }
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
        BFloat16* to = p.grad_encoder + int64_t(at.row(h)) * width + part * states + s;
        store_two(to, sum.at[k], sum.at[k + 1], two);
      });
      set_half(grad_r[(part * S::kStateTiles + n) / 2], n, sum);
    }
#pragma unroll
  for (int n = 0; n < S::kHiddenTiles; ++n) {
    Sums sum;
#pragma unroll
    for (int k = 0; k < S::kLogitSteps; ++k) {
      multiply(sum, grad_r[k], load_right(m.w2 + (n * S::kLogitSteps + k) * 32));
    }
    each_pair(at, n, units, [&](int h, int k, int unit, bool two) {
      float hidden[2] = {0, 0};
      load_two(p.hidden + int64_t(at.row(h)) * units + unit, two, hidden[0], hidden[1]);
      float active[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float share = sigmoid<float>(hidden[e]);
        active[e] = hidden[e] * share;
        sum.at[k + e] *= share * fma(hidden[e], 1.0f - share, 1.0f);
      }
      store_two(p.grad_encoder + int64_t(at.row(h)) * width + 2 * states + unit, sum.at[k], sum.at[k + 1], two);
      store_two(p.operand + int64_t(at.row(h)) * p.row_step + p.active + unit, active[0], active[1], two);
    });
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (!at.there(h)) continue;
    BFloat16* row = p.operand + int64_t(at.row(h)) * p.row_step;
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

// sums (states × rows) += Σ over tokens and frames of ∂u · x, for states 16 · pair …; from the windows' centres outwards.
template <class S>
AAPE_DEVICE void weigh(const WarpStemParams<S>& p, const BackwardShared<S>& m, int pair,
                       const Complex<float> (&grad)[S::kStateTiles][4], Sums (&sums)[2]) {
  Complex<float> z[2][4], q[2][4];
#pragma unroll
  for (int tile = 0; tile < 2; ++tile)
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const Pack<float, 4> kept = m.kept[((2 * pair + tile) * 4 + k) * kLanes + threadIdx.x % kLanes];
      z[tile][k] = {kept.at[0], kept.at[1]};
      q[tile][k] = {kept.at[2], kept.at[3]};
    }
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
      const Left factor = frame.turned(), rows = load_rights(frame_of(p, m.lines, first + at));
      multiply(sums[0], factor, Right{{rows.at[0], rows.at[1]}});
      multiply(sums[1], factor, Right{{rows.at[2], rows.at[3]}});
    };
    add(right, half + f);
    add(left, half - 1 - f);
  }
}

// partial[block] = the sums of all warps.
template <class S>
AAPE_DEVICE void add_up(const WarpStemParams<S>& p, const BackwardShared<S>& m, const Sums (&sums)[S::kStateTiles / 2][2]) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes, rows = p.rows();
  __syncthreads();  // before what the warps had is written over
#pragma unroll
  for (int pair = 0; pair < S::kStateTiles / 2; ++pair)
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int state = pair * 16 + lane / 4 + k / 2 * 8, row = n * 8 + lane % 4 * 2 + k % 2;
        m.sums[warp * m.kSums + state * kRows + row] = sums[pair][n].at[k];
      }
  __syncthreads();
  for (int at = threadIdx.x; at < m.kSums; at += blockDim.x) {
    float total = 0;
    for (int n = 0; n < warps; ++n) total += m.sums[n * m.kSums + at];
    const int state = at / kRows, row = at % kRows;
    if (state < p.grid.states && row < rows) {
      p.partial[(int64_t(blockIdx.x) * p.grid.states + state) * rows + row] = total;
    }
  }
}

template <class S>
__global__ void __launch_bounds__(S::kMostWarps* kLanes, 1) warp_stem_backward_kernel(const WarpStemParams<S> p) {
  AAPE_DYN_SHARED(memory);
  const BackwardShared<S> m(p, memory);
  fill(p, m);
  __syncthreads();
  Sums sums[S::kStateTiles / 2][2];
  each_tile(p, [&](int tile) {
    const TwoTokens at = tokens_at(p, tile);
    load_lines(p, at, m.lines);
    __syncwarp();
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
          float* to = p.grad_y + int64_t(at.row(h)) * 2 * p.grid.states + s;
          store_two(to, grad[n][k].re, grad[n][k + 1].re, two);
          store_two(to + p.grid.states, grad[n][k].im, grad[n][k + 1].im, two);
        });
      }
    }
#pragma unroll
    for (int pair = 0; pair < S::kStateTiles / 2; ++pair) weigh(p, m, pair, grad, sums[pair]);
    __syncwarp();  // before the lines are written again
  });
  add_up(p, m, sums);
}

template <class S>
Launch backward_launch(const WarpStemParams<S>& p) {
  return launch_of(p.tokens, S::kMostWarps, BackwardShared<S>::kCommonBytes, BackwardShared<S>::own_bytes(p.line));
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
    p.grad = {call.grad.data, call.grad.type};
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
