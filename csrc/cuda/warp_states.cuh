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

// A token's numbers from element `first` on, `step` apart. Two neighbours, or four, are one access where their address allows it,
// which is known of those that come in fours.
template <class O, class I = int>
struct Row {
  O* data;
  I first, step;
  AAPE_DEVICE O* at(int column) const { return data + (first + column * step); }  // one addition to what every thread has

  template <bool kFours>
  AAPE_DEVICE void load(int column, bool two, float& left, float& right) const {
    using Both = Pack<std::remove_const_t<O>, 2>;
    if (kFours || (two && step == 1 && aligned<Both>(at(column)))) {
      const Both pair = load_pack<Both>(at(column));
      left = widen<float>(pair.at[0]);
      right = widen<float>(pair.at[1]);
    } else {
      left = widen<float>(*at(column));
      if (two) right = widen<float>(*at(column + 1));
    }
  }
  template <bool kFours>
  AAPE_DEVICE void store(int column, bool two, float left, float right) const {
    using Both = Pack<O, 2>;
    if (kFours || (two && step == 1 && aligned<Both>(at(column)))) {
      store_global(at(column), Both{{narrow<O>(left), narrow<O>(right)}});
    } else {
      *at(column) = narrow<O>(left);
      if (two) *at(column + 1) = narrow<O>(right);
    }
  }
  // Those that are less than `count`.
  template <bool kFours>
  AAPE_DEVICE void load(int column, int count, Pack<std::remove_const_t<O>, 4>& four) const {
    if (kFours || is_whole(column, count)) {
      four = load_pack<Pack<std::remove_const_t<O>, 4>>(at(column));
    } else {
      for (int k = 0; k < 4 && column + k < count; ++k) four.at[k] = *at(column + k);
    }
  }
  template <bool kFours>
  AAPE_DEVICE void store(int column, int count, const Pack<O, 4>& four) const {
    if (kFours || is_whole(column, count)) {
      store_global(at(column), four);
    } else {
      for (int k = 0; k < 4 && column + k < count; ++k) *at(column + k) = four.at[k];
    }
  }

 private:
  AAPE_DEVICE bool is_whole(int column, int count) const {
    return step == 1 && column + 3 < count && aligned<Pack<std::remove_const_t<O>, 4>>(at(column));
  }
};

// visit(h, k, column, two) for what a lane has of sums of `count` columns, tile n: token h, sums k and, of two, k + 1.
template <class S, class Visit>
AAPE_DEVICE void each_pair(const TwoTokens& at, int n, int count, Visit visit) {
  const int column = n * 8 + int(threadIdx.x % 4) * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (at.there(h) && column < count) visit(h, 2 * h, column, S::kFours || column + 1 < count);
  }
}

// Of 16 bits, what the four lanes of a token have of one tile is half a sector of memory. So they move two tiles, n and n + 1,
// at once, four columns a lane: even lanes those of tile n, odd lanes those of tile n + 1.
template <class O>
constexpr bool in_sectors() {
  return sizeof(O) == 2;
}
AAPE_DEVICE int first_of_four(int n) { return (n + int(threadIdx.x % 2)) * 8 + int(threadIdx.x % 4) / 2 * 4; }

// From a lane's two columns of either tile to its four of one, and back.
template <class O>
AAPE_DEVICE void exchange(Pack<O, 4>& four) {
  const bool odd = threadIdx.x % 2;
  uint32_t word[2];
  memcpy(word, &four, sizeof(word));
  const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, odd ? word[0] : word[1], 1);
  if (odd) word[0] = other;
  else word[1] = other;
  memcpy(&four, word, sizeof(word));
}

// value(tile, k), sum k of tile 0 or 1 -> the columns of row(h) that are tiles n and n + 1, n even, as far as there are `count`.
// Every lane of the warp comes here.
template <class S, class Rows, class Value>
AAPE_DEVICE void store_tiles(const TwoTokens& at, int n, int count, Rows row, Value value) {
  using O = std::remove_pointer_t<decltype(row(0).data)>;
  if constexpr (in_sectors<O>()) {
    Pack<O, 4> four[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int k = 0; k < 4; ++k) four[h].at[k] = narrow<O>(value(k / 2, 2 * h + k % 2));
      exchange(four[h]);
    }
    const int column = first_of_four(n);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (at.there(h) && column < count) row(h).template store<S::kFours>(column, count, four[h]);
    }
  } else {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      each_pair<S>(at, n + tile, count, [&](int h, int k, int column, bool two) {
        row(h).template store<S::kFours>(column, two, value(tile, k), value(tile, k + 1));
      });
    }
  }
}

// The same for a loop over tiles: of 16 bits, both with the odd one.
template <class S, class Rows>
AAPE_DEVICE void store_tile(const TwoTokens& at, int n, int count, Rows row, const Sums& before, const Sums& own) {
  if constexpr (in_sectors<std::remove_pointer_t<decltype(row(0).data)>>()) {
    if (n % 2) store_tiles<S>(at, n - 1, count, row, [&](int tile, int k) { return tile ? own.at[k] : before.at[k]; });
  } else {
    each_pair<S>(at, n, count, [&](int h, int k, int column, bool two) {
      row(h).template store<S::kFours>(column, two, own.at[k], own.at[k + 1]);
    });
  }
}

// The way back: value(tile, k) is a place, and stays as it is where there is nothing.
template <class S, class Rows, class Value>
AAPE_DEVICE void load_tiles(const TwoTokens& at, int n, int count, Rows row, Value value) {
  using O = std::remove_const_t<std::remove_pointer_t<decltype(row(0).data)>>;
  if constexpr (in_sectors<O>()) {
    Pack<O, 4> four[2] = {};
    const int column = first_of_four(n);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (at.there(h) && column < count) row(h).template load<S::kFours>(column, count, four[h]);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      exchange(four[h]);
#pragma unroll
      for (int k = 0; k < 4; ++k) value(k / 2, 2 * h + k % 2) = widen<float>(four[h].at[k]);
    }
  } else {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      each_pair<S>(at, n + tile, count, [&](int h, int k, int column, bool two) {
        row(h).template load<S::kFours>(column, two, value(tile, k), value(tile, k + 1));
      });
    }
  }
}

// The projection's weights (rows × states) from state `first` on, as right factors: one for every eight states, for every
// sixteen rows.
template <class S>
AAPE_DEVICE void fill_projection(const LineParams<S>& p, const Values& weight, Weights<typename S::X>* to, int first = 0,
                                 const Share& share = of_block()) {
  const int rows = p.rows();
  fill_rights_of_rows(to, p.blocks() * S::kStateTiles, [&](int tile, int of_block, int column) {
    const int row = tile / S::kStateTiles * kRows + of_block, s = first + tile % S::kStateTiles * 8 + column;
    if (row >= rows || s >= p.grid.states) return Pack<float, 2>{};
    return load_two(weight, s * rows + row, row + 1 < rows);
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
