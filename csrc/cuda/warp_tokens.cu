// The stem in one kernel, for the usual geometry: what `warp_stem` computes, and with it the product that makes the tokens. Its
// left factor, [patch | features], stays on the chip: in registers, and of float32 where its pixels are anyway, in the
// warp's lines.
//
// A kernel of its own sets out all weights as lanes want them, those of the product in chunks: all that 64 bytes of a token are
// made of. Chunks pass through shared memory, the next one on its way while a block's warps use one.

#include "api.h"
#include "warp_encoder.cuh"

namespace aape {
namespace cuda {

using Word = Pack<uint32_t, 4>;  // what a lane loads of a step at once

// A chunk of tokens of type O: float biases of its channels, then for every sixteen numbers of the operand, a step, two words a
// lane. Of its tiles of eight channels a lane has two each, and together 16 bytes of a token that are next to each other.
template <class O>
struct Chunk {
  static constexpr int kTiles = 8 / int(sizeof(O)), kChannels = 8 * kTiles, kOfLane = 2 * kTiles;
  static constexpr int kWords = 2 * kLanes;  // of a step
  static AAPE_FN int bytes(int steps) { return kChannels * int(sizeof(float)) + steps * kWords * int(sizeof(Word)); }
  // of column `column` of a tile, from a chunk's first on
  static AAPE_DEVICE int channel(int tile, int column) { return column / 2 * kOfLane + 2 * tile + column % 2; }
};

template <class S>
AAPE_FN int common_bytes() {
  return int(ForwardShared<S>::common_bytes(1, kRows));
}

template <class S>
struct WarpTokensParams : WarpStemParams<S> {
  typename S::O* to;  // (tokens, D)
  const unsigned char* packed;  // what `ForwardShared` has before its own bytes, then the chunks
  int dim, chunks, chunk_bytes, rounds;
  AAPE_DEVICE const unsigned char* chunk(int number) const { return packed + common_bytes<S>() + number * chunk_bytes; }
  // Re y, Im y and n: whether they are features
  AAPE_DEVICE bool has(int plane) const { return plane == 2 ? this->planes != 2 : this->planes != 1; }
};

template <class S>
struct TokenWeightsParams {
  WarpTokensParams<S> stem;
  unsigned char* packed;
  Values projection, bias, fusion;  // (D, 256), (D) or null, (D, planes · S)
  Divisor<int32_t> by_steps;        // of a chunk, behind those of the patch
};

// Numbers as factors of O have them.
template <class O>
AAPE_DEVICE Two<O> two_of(float first, float second) {
  if constexpr (std::is_same_v<O, BFloat16>) return pack(first, second);
  else return {{first, second}};
}

// Steps are the frames of a patch, sixteen rows each, and sixteen states each of the planes, padded with zeros. So that a warp
// reads and writes whole sectors, it has two lanes' words of each of the frames, which are neighbours in memory; of states,
// which are, the eight pairs of each of four channels.
template <class S>
__global__ void __launch_bounds__(kThreads) token_weights_kernel(const TokenWeightsParams<S> p) {
  using O = typename S::O;
  using C = Chunk<O>;
  constexpr int kPlaneSteps = S::kStates / kRows;
  constexpr int kPairs = int(sizeof(Word) / sizeof(Two<O>)), kTiles = kPairs / 2;  // of a word
  const Share share = of_launch();
  fill(p.stem, ForwardShared<S>(p.stem, p.packed), share);
  unsigned char* const chunks = p.packed + common_bytes<S>();
  const auto words = [&](int chunk, int step) {
    return reinterpret_cast<Word*>(chunks + chunk * p.stem.chunk_bytes + C::kChannels * int(sizeof(float))) + step * C::kWords;
  };
  const auto channel_of = [](int chunk, int word, int tile, int column) {
    return chunk * C::kChannels + C::channel(word * kTiles + tile, column);
  };
  for (int n = share.first; n < p.stem.chunks * kRows * C::kWords; n += share.apart) {
    const int frame = n % kLanes / 2, lane = n / kLanes % 16 * 2 + n % 2, word = n / (16 * kLanes) % 2;
    const int chunk = n / (kRows * C::kWords);
    Pack<Two<O>, kPairs> out;
    for (int k = 0; k < kPairs; ++k) {
      const int first = channel_of(chunk, word, k / 2, lane / 4) * kRows + row_of(lane, k % 2 * 2);
      const auto of = [&](int row) { return load<float>(p.projection, row * kRows + frame); };
      out.at[k] = two_of<O>(of(first), of(first + 1));
    }
    store_pack(words(chunk, frame) + word * kLanes + lane, out);
  }
  const int states = p.stem.grid.states;
  for (int n = share.first; n < p.stem.chunks * p.by_steps.divisor * 2 * C::kWords; n += share.apart) {
    const auto [chunk, step] = p.by_steps(n / (2 * C::kWords));
    const int pair = n % 8, column = n / 8 % 8, word = n / 64 % 2, half = pair / 4;
    const int plane = step / kPlaneSteps, s = step % kPlaneSteps * kRows + 2 * pair;
    const auto two = [&, chunk = chunk](int tile) {
      if (s >= states) return Pack<float, 2>{};
      return load_two(p.fusion, (channel_of(chunk, word, tile, column) * p.stem.planes + plane) * states + s, S::kFours);
    };
    auto& to = words(chunk, kRows + step)[word * kLanes + column * 4 + pair % 4].at[2 * half];
    if constexpr (kTiles == 1) {
      store_pack(&to, two(0));
    } else {
      const Pack<float, 2> first = two(0), second = two(1);
      store_pack(&to, of_lower_and_upper(half, pack(first.at[0], first.at[1]), pack(second.at[0], second.at[1])));
    }
  }
  for (int channel = share.first; channel < p.stem.dim; channel += share.apart) {
    const float bias = p.bias.data ? load<float>(p.bias, channel) : 0.0f;
    reinterpret_cast<float*>(chunks + channel / C::kChannels * p.stem.chunk_bytes)[channel % C::kChannels] = bias;
  }
}

// Bytes, a multiple of 16, by a block's threads together.
AAPE_DEVICE void copy_together(unsigned char* to, const unsigned char* from, int bytes) {
  for (int at = int(threadIdx.x) * 16; at < bytes; at += int(blockDim.x) * 16) copy_16_bytes(to + at, from + at);
}

// Chunks on their way through a block's shared memory, which has room for two: all of them for every round of tiles.
template <class S>
struct Passage {
  const WarpTokensParams<S>& p;
  unsigned char* memory;
  int left;  // how many are still to be copied

  AAPE_DEVICE Passage(const WarpTokensParams<S>& p_, unsigned char* memory_)
      : p(p_), memory(memory_), left(p_.chunks * p_.rounds) {
    copy(0);
  }
  // The next chunk, number `chunk` of its round, for a block that comes here together.
  AAPE_DEVICE const unsigned char* operator()(int chunk) {
    const unsigned char* now = place();
    wait_for_copies();
    __syncthreads();  // for everyone's part; and nobody reads the chunk before any more
    if (left) copy(chunk + 1 == p.chunks ? 0 : chunk + 1);
    return now;
  }

 private:
  // of the one that was copied last
  AAPE_DEVICE unsigned char* place() const { return memory + left % 2 * p.chunk_bytes; }
  AAPE_DEVICE void copy(int chunk) {
    --left;
    copy_together(place(), p.chunk(chunk), p.chunk_bytes);
  }
};

// A frame of the operand's patches, from pixels of X.
template <class S>
AAPE_DEVICE Left<typename S::O> frame_left(const LineParams<S>& p, const typename S::X* lines, int frame) {
  if constexpr (std::is_same_v<typename S::X, typename S::O>) {
    return whole_left(p, lines, frame);
  } else {
    const Left<float> wide = whole_left(p, lines, frame);
    Left<BFloat16> out;
    for (int k = 0; k < 4; ++k) out.at[k] = pack(wide.at[k].at[0], wide.at[k].at[1]);
    return out;
  }
}

// The operand of 16 tokens, step by step.
template <class S>
struct Operand {
  using O = typename S::O;
  static constexpr bool kKept = std::is_same_v<O, BFloat16>;
  static constexpr int kPlaneSteps = S::kStates / kRows;
  Left<O> patch[kKept ? kRows : 1];
  Left<O> features[3][kPlaneSteps];

  AAPE_DEVICE void keep(const LineParams<S>& p, const typename S::X* lines) {
    if constexpr (kKept) {
#pragma unroll
      for (int f = 0; f < kRows; ++f) patch[f] = frame_left(p, lines, f);
    }
  }
  AAPE_DEVICE Left<O> frame(const LineParams<S>& p, const typename S::X* lines, int f) const {
    if constexpr (kKept) return patch[f];
    else return frame_left(p, lines, f);
  }
  // two tiles of sums side by side are a left factor
  AAPE_DEVICE void set(int plane, const float (&sums)[S::kStateTiles][4]) {
#pragma unroll
    for (int n = 0; n < S::kStateTiles; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) features[plane][n / 2].at[n % 2 * 2 + h] = two_of<O>(sums[n][2 * h], sums[n][2 * h + 1]);
    }
  }
};

template <class S>
AAPE_DEVICE void listen(const WarpTokensParams<S>& p, const TwoTokens& at, const ForwardShared<S>& m, Operand<S>& out) {
  float re[S::kStateTiles][4], im[S::kStateTiles][4];
  Levels<S> levels;
  each_response(p, at, m, [&](int, const Complex<float> (&y)[4]) {
    const float own_re[4] = {y[0].re, y[1].re, y[2].re, y[3].re}, own_im[4] = {y[0].im, y[1].im, y[2].im, y[3].im};
    push(re, own_re);
    push(im, own_im);
    levels.push_magnitudes(y);
  });
  levels.standardise(p.grid.states);
  out.set(0, re);
  out.set(1, im);
  out.set(2, levels.level);
}

// sums += a step of the operand · its weights
template <class O>
AAPE_DEVICE void add_step(Sums (&sums)[Chunk<O>::kTiles], const Left<O>& left, const Word* weights) {
  const auto factor = split(left);
  const int lane = threadIdx.x % kLanes;
#pragma unroll
  for (int word = 0; word < 2; ++word) {
    const Word own = load_pack<Word>(weights + word * kLanes + lane);
    if constexpr (std::is_same_v<O, BFloat16>) {
      add_product(sums[2 * word], factor, Right<BFloat16>{{own.at[0], own.at[1]}});
      add_product(sums[2 * word + 1], factor, Right<BFloat16>{{own.at[2], own.at[3]}});
    } else {
      Split<Right<float>> right;
      right.set(0, float_of(own.at[0]), float_of(own.at[1]));
      right.set(1, float_of(own.at[2]), float_of(own.at[3]));
      add_product(sums[word], factor, right);
    }
  }
}

// One chunk's channels of a warp's tokens.
template <class S>
AAPE_DEVICE void make_tokens(const WarpTokensParams<S>& p, const TwoTokens& at, const typename S::X* lines,
                             const Operand<S>& operand, const unsigned char* chunk, int channel) {
  using O = typename S::O;
  using C = Chunk<O>;
  const int own = int(threadIdx.x % 4) * C::kOfLane;
  const float* bias = reinterpret_cast<const float*>(chunk) + own;
  const Word* weights = reinterpret_cast<const Word*>(chunk + C::kChannels * int(sizeof(float)));
  Sums sums[C::kTiles];
#pragma unroll
  for (int n = 0; n < C::kTiles; n += 2) {
    const auto four = load_pack<Pack<float, 4>>(bias + 2 * n);
#pragma unroll
    for (int k = 0; k < 4; ++k) sums[n + k / 2].at[k % 2] = sums[n + k / 2].at[2 + k % 2] = four.at[k];
  }
#pragma unroll Operand<S>::kKept ? kRows : 2
  for (int f = 0; f < kRows; ++f) add_step<O>(sums, operand.frame(p, lines, f), weights + f * C::kWords);
  weights += kRows * C::kWords;
#pragma unroll
  for (int plane = 0; plane < 3; ++plane) {
    if (!p.has(plane)) continue;
#pragma unroll
    for (int k = 0; k < Operand<S>::kPlaneSteps; ++k, weights += C::kWords) {
      add_step<O>(sums, operand.features[plane][k], weights);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (!at.there(h)) continue;
    Pack<O, C::kOfLane> out;
#pragma unroll
    for (int k = 0; k < C::kOfLane; ++k) out.at[k] = narrow<O>(sums[k / 2].at[2 * h + k % 2]);
    store_global(p.to + int64_t(at.row(h)) * p.dim + channel + own, out);
  }
}

// Beside the chunks, lines of float32 find room for no more.
template <class S>
constexpr int kTokensWarps = std::is_same_v<typename S::X, BFloat16> ? S::kMostWarps : 8;

template <class S>
__global__ void __launch_bounds__(kTokensWarps<S>* kLanes, 1) warp_tokens_kernel(const WarpTokensParams<S> p) {
  AAPE_DYN_SHARED(memory);
  const ForwardShared<S> m(p, memory, 2 * p.chunk_bytes);
  copy_together(memory, p.packed, common_bytes<S>());
  Passage<S> passage(p, m.more);
  // A warp that has no tile left goes on with the last token, which it does not store: a block's warps stay together.
  for (int round = 0; round < p.rounds; ++round) {
    const int tile = first_tile() + round * int(blockDim.x / kLanes * gridDim.x);
    const TwoTokens at = tokens_at(p, tile);
    Operand<S> operand;
    load_packs(p, tile, m.lines, KeepNothing());
    wait_for_copies();
    __syncthreads();  // for pixels, and in the first round for weights, which came meanwhile
    listen(p, at, m, operand);
    operand.keep(p, m.lines);
#pragma unroll 1
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      make_tokens(p, at, m.lines, operand, passage(chunk), chunk * Chunk<typename S::O>::kChannels);
    }
    __syncwarp();  // before the lines are written again
  }
}

// run(Sizes()) with those of the kernel that makes a call's tokens; false if there is none, or run says so.
template <class Run>
bool with_token_sizes(const TokensCall& call, Run run) {
  constexpr int64_t kMostChannels = 1 << 20;  // of which all weights are within 32 bits
  return call.planes && call.dim <= kMostChannels && with_sizes(call, [&](auto sizes) {
    using S = decltype(sizes);
    if constexpr (S::kUsual && !std::is_same_v<typename S::O, Float16>) {
      return call.dim % Chunk<typename S::O>::kChannels == 0 && run(sizes);
    }
    return false;
  });
}

template <class S>
WarpTokensParams<S> warp_tokens_params(const TokensCall& call) {
  WarpTokensParams<S> p = {};
  static_cast<WarpStemParams<S>&>(p) = warp_stem_params<S>(call);
  p.to = reinterpret_cast<typename S::O*>(call.tokens.data);
  p.packed = reinterpret_cast<const unsigned char*>(call.packed);
  p.dim = int(call.dim);
  p.chunks = p.dim / Chunk<typename S::O>::kChannels;
  p.chunk_bytes = Chunk<typename S::O>::bytes(kRows + int(call.planes) * Operand<S>::kPlaneSteps);
  return p;
}

// No more warps than its rounds need, as all of a block wait for each other.
template <class S>
Launch tokens_launch(WarpTokensParams<S>& p) {
  const size_t common = size_t(common_bytes<S>()) + 2 * size_t(p.chunk_bytes), own = lines_bytes(p);
  Launch launch = launch_of(p.tokens, kTokensWarps<S>, common, own);
  if (launch.warps < kLeastWarps) return {0, 0, 0};
  const int tiles = (p.tokens + kTokensOfWarp - 1) / kTokensOfWarp, of_block = (tiles + launch.blocks - 1) / launch.blocks;
  p.rounds = (of_block + launch.warps - 1) / launch.warps;
  launch.warps = (of_block + p.rounds - 1) / p.rounds;
  launch.shared = common + size_t(launch.warps) * own;
  return launch;
}

int64_t warp_tokens_bytes(const TokensCall& call) {
  int64_t bytes = 0;
  with_token_sizes(call, [&](auto sizes) {
    auto p = warp_tokens_params<decltype(sizes)>(call);
    if (tokens_launch(p).warps) bytes = common_bytes<decltype(sizes)>() + int64_t(p.chunks) * p.chunk_bytes;
    return true;
  });
  return bytes;
}

template <class S>
void launch_token_weights(const TokensCall& call, const WarpTokensParams<S>& stem, void* stream) {
  const auto values = [](const View& view) { return Values{view.data, view.type}; };
  const TokenWeightsParams<S> p = {stem, reinterpret_cast<unsigned char*>(call.packed), values(call.projection),
                                   values(call.bias), values(call.fusion),
                                   Divisor<int32_t>(call.planes * Operand<S>::kPlaneSteps)};
  const int words = stem.chunks * kRows * Chunk<typename S::O>::kWords, blocks = (words + kThreads - 1) / kThreads;
  AAPE_LAUNCH("embed", (token_weights_kernel<S>), dim3(unsigned(blocks)), dim3(kThreads), 0, stream, p);
}

template <class S>
void launch_warp_tokens(const TokensCall& call, void* stream) {
  WarpTokensParams<S> p = warp_tokens_params<S>(call);
  const Launch launch = tokens_launch(p);
  launch_token_weights(call, p, stream);
  AAPE_LAUNCH("embed", (warp_tokens_kernel<S>), dim3(unsigned(launch.blocks)), dim3(unsigned(launch.warps * kLanes)),
              launch.shared, stream, p);
}

void warp_tokens(const TokensCall& call, void* stream) {
  with_token_sizes(call, [&](auto sizes) {
    launch_warp_tokens<decltype(sizes)>(call, stream);
    return true;
  });
}

}  // namespace cuda
}  // namespace aape
