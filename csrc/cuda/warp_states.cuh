// What a warp does with the states of its 16 tokens: project their windows frame by frame, Horner's rule on the way, and the
// projection's gradient. Sums stay in registers: of tokens g and g + 8 a lane has the states 8n + 2c and 8n + 2c + 1.

#pragma once

#include "pixels.cuh"
#include "respond.cuh"

namespace aape {
namespace cuda {

// A multiprocessor holds 128 kB of instructions, 8,192 of them: what runs through more of them in a tile waits for memory each
// time (benchmarks/NOTES.md). So loops over states go round, although registers have no index that a loop runs over: an array
// that is filled or read by one moves on by a place in every round.
template <class T, int kCount, int kOfOne>
AAPE_DEVICE void push(T (&array)[kCount][kOfOne], const T (&last)[kOfOne]) {
#pragma unroll
  for (int n = 0; n < kCount; ++n)
#pragma unroll
    for (int k = 0; k < kOfOne; ++k) array[n][k] = n + 1 < kCount ? array[n + 1 < kCount ? n + 1 : n][k] : last[k];
}
// The first `kBy` to the end.
template <int kBy, class T, int kCount, int kOfOne>
AAPE_DEVICE void rotate(T (&array)[kCount][kOfOne]) {
  for (int turn = 0; turn < kBy; ++turn) {
    T first[kOfOne];
#pragma unroll
    for (int k = 0; k < kOfOne; ++k) first[k] = array[0][k];
    push(array, first);
  }
}

// Column k of row `row`, and the next where there are two, in one access where the address allows it, which is known if kPairs.
template <bool kPairs, class O>
AAPE_DEVICE void store_two(O* to, float first, float second, bool two) {
  using Both = Pack<O, 2>;
  if (kPairs || (two && aligned<Both>(to))) {
    store_pack(to, Both{{narrow<O>(first), narrow<O>(second)}});
  } else {
    to[0] = narrow<O>(first);
    if (two) to[1] = narrow<O>(second);
  }
}

template <bool kPairs, class O>
AAPE_DEVICE void load_two(const O* from, bool two, float& first, float& second) {
  using Both = Pack<O, 2>;
  if (kPairs || (two && aligned<Both>(from))) {
    const Both pair = load_pack<Both>(from);
    first = widen<float>(pair.at[0]);
    second = widen<float>(pair.at[1]);
  } else {
    first = widen<float>(from[0]);
    if (two) second = widen<float>(from[1]);
  }
}

// visit(h, k, column, two) for what a lane has of sums of `count` columns, tile n: token h, sums k and, of two, k + 1.
template <class S, class Visit>
AAPE_DEVICE void each_pair(const TwoTokens& at, int n, int count, Visit visit) {
  const int column = n * 8 + int(threadIdx.x % 4) * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (at.there(h) && column < count) visit(h, 2 * h, column, S::kPairs || column + 1 < count);
  }
}

// The projection's weights (rows × states) from state `first` on, as right factors: one for every eight states, for every
// sixteen rows.
template <class S>
AAPE_DEVICE void fill_projection(const LineParams<S>& p, const Values& weight, Weights<typename S::X>* to, int first = 0,
                                 const Share& share = of_block()) {
  const int rows = p.rows();
  fill_rights(to, p.blocks() * S::kStateTiles, [&](int tile, int of_block, int column) {
    const int row = tile / S::kStateTiles * kRows + of_block, s = first + tile % S::kStateTiles * 8 + column;
    return row < rows && s < p.grid.states ? load<float>(weight, s * rows + row) : 0.0f;
  }, share);
}

// u of the frames m and K − 1 − m of the windows, for eight states, whose weights of a block of rows weight(block) gives.
template <class S, class Weight>
AAPE_DEVICE void project(const LineParams<S>& p, const typename S::X* lines, Weight weight, int m, Sums& left, Sums& right) {
  const int first = p.line.window_first(), last = first + p.line.window() - 1;
  {
    const auto own = weight(0);
    multiply(left, group_left(p, lines, p.group(first + m, 0)), own);
    multiply(right, group_left(p, lines, p.group(last - m, 0)), own);
  }
  for (int block = 1; block < p.blocks(); ++block) {
    const auto own = weight(block);
    add_product(left, group_left(p, lines, p.group(first + m, block)), own);
    add_product(right, group_left(p, lines, p.group(last - m, block)), own);
  }
}

// y of eight states from what they are: Horner's rule on the windows, projected on the way.
template <class S>
AAPE_DEVICE void respond(const LineParams<S>& p, const typename S::X* lines, const Weights<typename S::X>* projection,
                         const State<float> (&states)[4], Complex<float> (&y)[4]) {
  Gain<float> gains[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) gains[k] = gain<float, false, true>(states[k].decay, states[k].frequency, true);
  Complex<float> plus[4] = {}, minus[4] = {};
  const auto first = load_right(projection);
  const auto weight = [&](int block) { return block ? load_right(projection + block * S::kStateTiles * kLanes) : first; };
#pragma unroll 2
  for (int f = 0; f < p.line.window() / 2; ++f) {
    Sums left, right;
    project(p, lines, weight, f, left, right);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      plus[k] = step<float>(plus[k], gains[k].z, right.at[k] + left.at[k]);
      minus[k] = step<float>(minus[k], gains[k].z, right.at[k] - left.at[k]);
    }
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) y[k] = response(gains[k].gamma, plus[k], minus[k], p.quadrature());
}

// What y's cotangent is multiplied by to give those of a state's decay and frequency, or of their logits:
// re · ḡ.re + im · ḡ.im.
struct Slopes {
  Complex<float> decay, frequency;
  AAPE_DEVICE static float along(const Complex<float>& slope, const Complex<float>& grad) {
    return fma(slope.re, grad.re, slope.im * grad.im);
  }
};

// A lane's z and γ of its states, for whom they do not fit into registers: shared memory of one warp.
template <class S>
struct Kept {
  Pack<float, 4>* at;
  static constexpr size_t kBytes = S::kStateTiles * 4 * kLanes * sizeof(Pack<float, 4>);
  // of state k of a tile
  AAPE_DEVICE Pack<float, 4>& operator()(int tile, int k) const { return at[(tile * 4 + k) * kLanes + threadIdx.x % kLanes]; }
};

// The same with slopes; z and γ are kept.
template <class S>
AAPE_DEVICE void respond(const LineParams<S>& p, const typename S::X* lines, const Weights<typename S::X>* projection,
                         const Kept<S>& kept, int n, const State<float> (&states)[4], Complex<float> (&y)[4],
                         Slopes (&slopes)[4]) {
  // what Horner's rule does not need waits where z and γ will be
  Complex<float> z[4], gamma[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const Gain<float> g = gain<float, true, true>(states[k].decay, states[k].frequency, true);
    z[k] = g.z;
    gamma[k] = g.gamma;
    kept(n, k) = {{g.derivative.re, g.derivative.im, states[k].decay_slope, states[k].frequency_slope}};
  }
  Jet<float> plus[4], minus[4];
  const auto weight = [&](int block) { return load_right(projection + block * S::kStateTiles * kLanes); };
#pragma unroll 1
  for (int f = 0; f < p.line.window() / 2; ++f) {
    Sums left, right;
    project(p, lines, weight, f, left, right);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      plus[k].add(z[k], right.at[k] + left.at[k]);
      minus[k].add(z[k], right.at[k] - left.at[k]);
    }
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const auto [derivative_re, derivative_im, decay_slope, frequency_slope] = kept(n, k).at;
    const Gain<float> g = {z[k], gamma[k], {derivative_re, derivative_im}};
    if (!p.quadrature()) minus[k] = plus[k];  // Im y is of P⁺ as well
    y[k] = response(g.gamma, plus[k].value, minus[k].value, true);
    const Complex<float> one = {1, 0}, even = adjoint<float>(one, g, plus[k].value, plus[k].slope);
    const Complex<float> odd = adjoint<float>(one, g, minus[k].value, minus[k].slope);
    slopes[k] = {{even.re * decay_slope, odd.im * decay_slope}, {-even.im * frequency_slope, odd.re * frequency_slope}};
    kept(n, k) = {{z[k].re, z[k].im, gamma[k].re, gamma[k].im}};
  }
}

// The cotangents of a frame's u for 16 states, [tile][sum k], turned: a left factor (states × tokens).
template <class X>
AAPE_DEVICE Whole<X, Left<X>> turned(const float (&frame)[2][4]) {
  Whole<X, Left<X>> out;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float first = frame[k % 2][k / 2 * 2], second = frame[k % 2][k / 2 * 2 + 1];
    if constexpr (std::is_same_v<X, BFloat16>) {
      out.at[k] = transposed(pack(first, second));
    } else {
      const Two<X> two = transposed(Two<X>{{first, second}});
      out.set(k, two.at[0], two.at[1]);
    }
  }
  return out;
}

// The projection's gradient, summed up by every warp in its shared memory: in the order in which lanes have it, for every
// sixteen rows.
template <class S>
struct WeightSums {
  static constexpr int kCount = S::kStates * kRows;  // of a block of rows
  float* at;
  int apart;  // bytes, between two warps'
  AAPE_DEVICE float& operator()(int k, int warps = 0) const {
    return reinterpret_cast<float*>(reinterpret_cast<unsigned char*>(at) + warps * apart)[k];
  }
  AAPE_DEVICE void clear(int blocks) const {
    for (int k = threadIdx.x % kLanes; k < blocks * kCount; k += kLanes) at[k] = 0;
  }
};

// visit(f, ∂u of frame ½K + f, that of frame ½K − 1 − f) for states 16 · pair …, from the windows' centres outwards; each is
// [tile of states][sum k]. The cotangents are those of these states first.
template <class S, class Visit>
AAPE_DEVICE void each_grad_of_u(const LineParams<S>& p, const Kept<S>& kept, int pair,
                                const Complex<float> (&grad)[S::kStateTiles][4], Visit visit) {
  Complex<float> z[2][4], q[2][4];
#pragma unroll
  for (int tile = 0; tile < 2; ++tile)
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const Pack<float, 4> own = kept(2 * pair + tile, k);
      z[tile][k] = {own.at[0], own.at[1]};
      q[tile][k] = {own.at[2], own.at[3]};
    }
  for (int f = 0; f < p.line.window() / 2; ++f) {
    float right[2][4], left[2][4];
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const Complex<float>& cotangent = grad[tile][k];
        const float odd = cotangent.im * q[tile][k].im;
        right[tile][k] = fma(cotangent.re, q[tile][k].re, odd);
        left[tile][k] = fma(cotangent.re, q[tile][k].re, p.quadrature() ? -odd : odd);
        q[tile][k] = q[tile][k] * z[tile][k];
      }
    visit(f, right, left);
  }
}

// Add Σ over tokens and frames of ∂u · x, for states 16 · pair …, whose cotangents come first, and one block of rows.
template <class S>
AAPE_DEVICE void weigh(const LineParams<S>& p, const typename S::X* lines, const Kept<S>& kept, const WeightSums<S>& to,
                       int pair, int block, const Complex<float> (&grad)[S::kStateTiles][4]) {
  Sums sums[2];
  const int centre = p.line.window_first() + p.line.window() / 2;
  const auto add = [&](const float (&frame)[2][4], int at) {
    const auto factor = turned<typename S::X>(frame);
    const auto rows = group_rights(p, lines, p.group(at, block));
#pragma unroll
    for (int n = 0; n < 2; ++n) add_product(sums[n], factor, rows.tile[n]);
  };
  each_grad_of_u(p, kept, pair, grad, [&](int f, const float (&right)[2][4], const float (&left)[2][4]) {
    add(right, centre + f);
    add(left, centre - 1 - f);
  });
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      to(block * to.kCount + ((pair * 2 + n) * 4 + k) * kLanes + int(threadIdx.x % kLanes)) += sums[n].at[k];
    }
}

// visit(pair, block) for every sixteen states, whose cotangents come first then, and every block of rows.
template <class S, class Visit>
AAPE_DEVICE void each_pair_of_tiles(const LineParams<S>& p, Complex<float> (&grad)[S::kStateTiles][4], Visit visit) {
#pragma unroll 1
  for (int pair = 0; pair < S::kStateTiles / 2; ++pair) {
    for (int block = 0; block < p.blocks(); ++block) visit(pair, block);
    if (S::kStateTiles > 2) rotate<2>(grad);
  }
}

// partial[block] = the sums of all warps, of states from `first` on.
template <class S>
AAPE_DEVICE void add_up(const LineParams<S>& p, const WeightSums<S>& sums, float* partial, int first = 0) {
  const int warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes, rows = p.rows();
  __syncthreads();
  for (int at = threadIdx.x; at < p.blocks() * sums.kCount; at += blockDim.x) {
    float total = 0;
    for (int n = 0; n < warps; ++n) total += sums(at, n - warp);
    const int block = at / sums.kCount, lane = at % kLanes, k = at / kLanes % 4, tile = at % sums.kCount / kLanes / 4;
    const int state = first + tile / 2 * 16 + lane / 4 + k / 2 * 8;
    const int row = block * kRows + Layout<typename S::X>::row_of(tile % 2, lane % 4 * 2 + k % 2);
    if (state < p.grid.states && row < rows) {
      partial[(int64_t(blockIdx.x) * p.grid.states + state) * rows + row] = total;
    }
  }
}

}  // namespace cuda
}  // namespace aape
