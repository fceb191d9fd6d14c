// What the forward kernels of the stem share: the Lambda Encoder of a warp's 16 tokens, and their responses.

#pragma once

#include "warp_stem.cuh"

namespace aape {
namespace cuda {

// A block's right factors, `more` bytes of a kernel's own, and a warp's lines behind them.
template <class S>
struct ForwardShared {
  using Tile = Weights<typename S::X>;
  Tile *w2, *projection, *w1;  // w1 last: it is as long as the patch
  float *b1, *b2;              // padded with zeros
  unsigned char* more;
  typename S::X* lines;

  static constexpr int kW2 = 2 * S::kStateTiles * S::kHiddenSteps;
  static constexpr int kBiases = S::kHidden + 2 * S::kStates;

  static AAPE_FN size_t common_bytes(int blocks, int patch) {
    const size_t tiles = kW2 + size_t(blocks) * (S::kStateTiles + size_t(patch) * S::kHiddenTiles);
    return tiles * kLanes * sizeof(Tile) + kBiases * sizeof(float);
  }

  AAPE_DEVICE ForwardShared(const WarpStemParams<S>& p, unsigned char* memory, int more_bytes = 0)
      : w2(reinterpret_cast<Tile*>(memory)),
        projection(w2 + kW2 * kLanes),
        w1(projection + p.blocks() * S::kStateTiles * kLanes),
        b1(reinterpret_cast<float*>(w1 + p.group(p.line.patch(), 0) * S::kHiddenTiles * kLanes)),
        b2(b1 + S::kHidden),
        more(reinterpret_cast<unsigned char*>(b2 + 2 * S::kStates)),
        lines(reinterpret_cast<typename S::X*>(more + more_bytes) + threadIdx.x / kLanes * kTokensOfWarp * p.pitch()) {}
};

template <class S>
AAPE_DEVICE void fill(const WarpStemParams<S>& p, const ForwardShared<S>& m, const Share& share = of_block()) {
  const int rows = p.rows(), patch = p.line.patch(), units = p.hidden_units, states = p.grid.states;
  fill_projection(p, p.weight, m.projection, 0, share);
  fill_rights_of_frames(m.w1, patch, p.blocks() * S::kHiddenTiles, [&](int frame, int tile, int of_block, int column) {
    const int row = tile / S::kHiddenTiles * kRows + of_block, h = tile % S::kHiddenTiles * 8 + column;
    if (row >= rows || h >= units) return Pack<float, 2>{};
    return load_two(p.w1, (h * rows + row) * patch + frame, frame + 1 < patch);
  }, share);
  // logits of decays, then of frequencies
  fill_rights_of_rows(m.w2, m.kW2, [&](int tile, int row, int column) {
    const int h = tile % S::kHiddenSteps * 16 + row, of = tile / S::kHiddenSteps;
    const int s = of % S::kStateTiles * 8 + column, part = of / S::kStateTiles;
    if (s >= states || h >= units) return Pack<float, 2>{};
    return load_two(p.w2, (part * states + s) * units + h, S::kFours || h + 1 < units);
  }, share);
  for (int k = share.first; k < S::kHidden; k += share.apart) m.b1[k] = k < units ? load<float>(p.b1, k) : 0.0f;
  for (int k = share.first; k < 2 * S::kStates; k += share.apart) {
    const int s = k % S::kStates;
    m.b2[k] = s < states ? load<float>(p.b2, k / S::kStates * states + s) : 0.0f;
  }
}

AAPE_DEVICE void set_bias(Sums& sum, const float* bias) {
  const auto two = load_pack<Pack<float, 2>>(bias + threadIdx.x % 4 * 2);
  sum.at[0] = sum.at[2] = two.at[0];
  sum.at[1] = sum.at[3] = two.at[1];
}

// hidden = W1 · vec(patch) + b1, kept in memory; SiLU of it for the second layer.
template <class S>
AAPE_DEVICE void first_layer(const WarpStemParams<S>& p, const TwoTokens& at, const ForwardShared<S>& m,
                             Split<Left<typename S::X>> (&active)[S::kHiddenSteps]) {
  Sums hidden[S::kHiddenTiles];
#pragma unroll
  for (int n = 0; n < S::kHiddenTiles; ++n) set_bias(hidden[n], m.b1 + n * 8);
#pragma unroll 4
  for (int group = 0; group < p.group(p.line.patch(), 0); ++group) {
    const auto pixels = group_left(p, m.lines, p.group(p.line.patch_first(), 0) + group);
#pragma unroll
    for (int n = 0; n < S::kHiddenTiles; ++n) {
      add_product(hidden[n], pixels, load_right(m.w1 + (group * S::kHiddenTiles + n) * kLanes));
    }
  }
#pragma unroll
  for (int n = 0; n < S::kHiddenTiles; ++n) {
    each_pair<S>(at, n, p.hidden_units, [&](int h, int k, int unit, bool two) {
      const Row<float> row = {p.hidden, at.row(h) * p.hidden_units, 1};
      row.store<S::kFours>(unit, two, hidden[n].at[k], hidden[n].at[k + 1]);
    });
#pragma unroll
    for (float& value : hidden[n].at) value *= sigmoid<float>(value);
    set_half(active[n / 2], n, hidden[n]);
  }
}

// The logits of decays or frequencies of states 8n …, r = W2 · SiLU(hidden) + b2.
template <class S>
AAPE_DEVICE Sums second_layer(const WarpStemParams<S>& p, const TwoTokens& at, const ForwardShared<S>& m,
                              const Split<Left<typename S::X>> (&active)[S::kHiddenSteps], int part, int n) {
  Sums sum;
  set_bias(sum, m.b2 + part * S::kStates + n * 8);
#pragma unroll
  for (int k = 0; k < S::kHiddenSteps; ++k) {
    add_product(sum, active[k], load_right(m.w2 + ((part * S::kStateTiles + n) * S::kHiddenSteps + k) * kLanes));
  }
  each_pair<S>(at, n, p.grid.states, [&](int h, int k, int s, bool two) {
    const Row<float> row = {p.r, (at.row(h) * 2 + part) * p.grid.states, 1};
    row.store<S::kFours>(s, two, sum.at[k], sum.at[k + 1]);
  });
  return sum;
}

// visit(n, y of states 8n …) for all of two tokens' states, whose pixels are in the warp's lines.
template <class S, class Visit>
AAPE_DEVICE void each_response(const WarpStemParams<S>& p, const TwoTokens& at, const ForwardShared<S>& m, Visit visit) {
  Split<Left<typename S::X>> active[S::kHiddenSteps];
  first_layer(p, at, m, active);
#pragma unroll 1
  for (int n = 0; n < S::kStateTiles; ++n) {
    const Sums decay = second_layer(p, at, m, active, 0, n), frequency = second_layer(p, at, m, active, 1, n);
    State<float> states[4];
    states_of(p.squash, decay, frequency, states);
    Complex<float> y[4];
    respond(p, m.lines, m.projection + n * kLanes, states, y);
    visit(n, y);
  }
}

}  // namespace cuda
}  // namespace aape
