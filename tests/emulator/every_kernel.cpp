// Every CUDA kernel once, on memory of exactly its size, for sanitizers: with threads.h a missing barrier is a race that
// ThreadSanitizer names, with fibers.h AddressSanitizer sees what is out of bounds. The numbers are other tests' business.

#include "emulator.h"

#include <cstdio>
#include <cstdlib>

#include "../../csrc/cuda/api.h"

namespace {

using namespace aape;

template <class T = float>
std::vector<T> numbers(int64_t count) {
  std::vector<T> out(count);
  for (auto& value : out) value = T(float(std::rand()) / RAND_MAX + 0.1f);
  return out;
}

template <class T>
View view(std::vector<T>& data, std::initializer_list<int64_t> shape) {
  View out;
  out.data = reinterpret_cast<char*>(data.data());
  out.type = std::is_same_v<T, BFloat16>  ? DType::kBFloat16
             : std::is_same_v<T, Float16> ? DType::kFloat16
                                          : DType::kFloat32;
  int64_t stride = 1;
  for (int axis = int(shape.size()); axis-- > 0;) {
    out.stride[axis] = stride;
    stride *= *(shape.begin() + axis);
  }
  return out;
}

void run(Grid g, bool time_major) {
  const int64_t rows = g.channels * g.patch_f, patch = rows * g.patch_t, tokens = g.batch * g.n_f * g.n_t;
  const int64_t units = 40, tile = cuda::tile_tokens(g, DType::kFloat32), tiles = (g.n_t + tile - 1) / tile;
  const int64_t length = (tile - 1) * g.stride_t + g.window, padded = (length + 7) / 8 * 8, programs = 1;
  auto x = numbers(g.batch * g.channels * g.mel_bins * g.frames), out = x;
  auto decay = numbers(tokens * g.states), frequency = decay, grad_decay = decay, grad_frequency = decay;
  auto weight = numbers(g.states * rows), partial = numbers(programs * g.states * rows);
  auto y = numbers(tokens * 2 * g.states), grad = y;
  auto windows = numbers(g.batch * g.n_f * tiles * rows * padded);

  SbluCall call;
  call.grid = g;
  call.x = view(x, {g.batch, g.channels, g.mel_bins, g.frames});
  call.decay = view(decay, {g.batch, g.n_f, g.n_t, g.states});
  call.frequency = view(frequency, {g.batch, g.n_f, g.n_t, g.states});
  call.weight = view(weight, {g.states, rows});
  call.y = view(y, {g.batch, g.n_f, g.n_t, 2, g.states});
  call.grad_y = view(grad, {g.batch, g.n_f, g.n_t, 2, g.states});
  call.grad_decay = view(grad_decay, {g.batch, g.n_f, g.n_t, g.states});
  call.grad_frequency = view(grad_frequency, {g.batch, g.n_f, g.n_t, g.states});
  cuda::sblu(call, nullptr);
  cuda::sblu_backward_states(call, nullptr);
  cuda::sblu_backward_weight(call, partial.data(), programs, nullptr);
  cuda::sblu_backward_windows(call, windows.data(), nullptr);

  auto features = numbers(tokens * 3 * g.states), grad_features = features;
  StandardiseCall standardise;
  standardise.tokens = tokens;
  standardise.states = g.states;
  standardise.planes = 3;
  standardise.y = call.y;
  standardise.features = view(features, {tokens, 3, g.states});
  standardise.grad_features = view(grad_features, {tokens, 3, g.states});
  cuda::standardise(standardise, nullptr);
  const bool at_once = g.states <= 32;
  if (at_once) {
    call.planes = 3;
    call.y = view(features, {g.batch, g.n_f, g.n_t, 3, g.states});
    call.grad_features = view(grad_features, {g.batch, g.n_f, g.n_t, 3, g.states});
    cuda::sblu(call, nullptr);
  }
  const std::vector<int64_t> planes_at_once = at_once ? std::vector<int64_t>{1, 3} : std::vector<int64_t>{0, 2};

  OverlapAddCall sum;
  sum.grid = g;
  sum.tile = tile;
  sum.length = length;
  sum.offset = (g.patch_t - g.window) / 2;
  sum.windows = view(windows, {g.batch, g.n_f, tiles, rows, padded});
  sum.out = view(out, {g.batch, g.channels, g.mel_bins, g.frames});
  cuda::overlap_add(sum, nullptr);

  auto w1 = numbers(units * patch), b1 = numbers(units), w2 = numbers(2 * g.states * units), b2 = numbers(2 * g.states);
  auto hidden = numbers(tokens * units);
  auto r = numbers(tokens * 2 * g.states), patches = numbers(tokens * patch);
  StemCall stem;
  stem.grid = g;
  stem.ranges = {true, 0.1, 3.0, 0.2, 2.9};
  stem.hidden_units = units;
  stem.time_major = time_major;
  stem.x = call.x;
  stem.w1 = view(w1, {units, patch});
  stem.b1 = view(b1, {units});
  stem.w2 = view(w2, {2 * g.states, units});
  stem.b2 = view(b2, {2 * g.states});
  stem.weight = call.weight;
  stem.hidden = view(hidden, {tokens, units});
  stem.r = view(r, {tokens, 2 * g.states});
  for (int64_t planes : planes_at_once) {
    auto operand = numbers(tokens * (patch + planes * g.states));
    stem.planes = planes;
    stem.operand = view(operand, {tokens, patch + planes * g.states});
    cuda::stem(stem, nullptr);
  }

  GatherCall gather;
  gather.grid = g;
  gather.x = call.x;
  gather.patches = view(patches, {g.batch, g.n_f, g.n_t, patch});
  cuda::gather(gather, nullptr);
}

// A stem on tensor cores, of x in X and an operand in O, and the gradients that are copied after it.
template <class X, class O>
void run_on_tensor_cores(Grid g, int64_t units, int64_t planes, bool time_major) {
  const int64_t rows = g.channels * g.patch_f, patch = rows * g.patch_t, tokens = g.batch * g.n_f * g.n_t;
  const int64_t active = (patch + planes * g.states + 1 + 7) / 8 * 8, columns = active + (units + 7) / 8 * 8;
  auto x = numbers<X>(g.batch * g.channels * g.mel_bins * g.frames);
  auto w1 = numbers<X>(units * patch), b1 = numbers<X>(units);
  auto w2 = numbers(2 * g.states * units), b2 = numbers(2 * g.states), weight = numbers(g.states * rows);
  auto operand = numbers<O>(tokens * columns);
  auto hidden = numbers(tokens * units), r = numbers(tokens * 2 * g.states);
  StemGradientCall call;
  call.grid = g;
  call.ranges = {true, 0.1, 3.0, 0.2, 2.9};
  call.hidden_units = units;
  call.planes = planes;
  call.time_major = time_major;
  call.x = view(x, {g.batch, g.channels, g.mel_bins, g.frames});
  call.w1 = view(w1, {units, patch});
  call.b1 = view(b1, {units});
  call.w2 = view(w2, {2 * g.states, units});
  call.b2 = view(b2, {2 * g.states});
  call.weight = view(weight, {g.states, rows});
  call.operand = view(operand, {tokens, columns});
  call.hidden = view(hidden, {tokens, units});
  call.r = view(r, {tokens, 2 * g.states});
  const int64_t programs = cuda::warp_stem_programs(call);
  if (!cuda::warp_stem(call, nullptr) || programs == 0) throw std::runtime_error("not on tensor cores");

  auto grad = numbers<O>(tokens * planes * g.states);
  auto grad_encoder = numbers<O>(tokens * (2 * g.states + units));
  auto grad_y = numbers(tokens * 2 * g.states), partial = numbers(programs * g.states * rows);
  call.one = patch + planes * g.states;
  call.active = active;
  call.grad = view(grad, {tokens, planes * g.states});
  call.grad_encoder = view(grad_encoder, {tokens, 2 * g.states + units});
  call.grad_y = view(grad_y, {tokens, 2 * g.states});
  call.partial = view(partial, {programs, g.states, rows});
  cuda::warp_stem_backward(call, nullptr);

  auto grad_weight = numbers(g.states * rows);
  auto block = numbers<O>(tokens * units);
  GradientCall sum, copy;
  sum.programs = programs;
  sum.rows = g.states;
  sum.columns = rows;
  sum.from = call.partial;
  sum.to = view(grad_weight, {g.states, rows});
  copy.rows = tokens;
  copy.columns = units;
  copy.from = view(grad_encoder, {1, tokens, 2 * g.states + units});
  copy.to = view(block, {tokens, units});
  cuda::gradients({sum, copy}, nullptr);
}

// A stem whose tokens one kernel makes, of x in X and tokens in O, with a bias or without.
template <class X, class O>
void run_tokens(Grid g, int64_t units, int64_t planes, int64_t dim, bool with_bias) {
  const int64_t patch = 256, tokens = g.batch * g.n_f * g.n_t;
  auto x = numbers<X>(g.batch * g.mel_bins * g.frames);
  auto w1 = numbers<X>(units * patch), b1 = numbers<X>(units);
  auto w2 = numbers(2 * g.states * units), b2 = numbers(2 * g.states), weight = numbers(g.states * 16);
  auto projection = numbers<O>(dim * patch), bias = numbers<O>(dim), to = numbers<O>(tokens * dim);
  auto fusion = numbers(dim * planes * g.states), hidden = numbers(tokens * units), r = numbers(tokens * 2 * g.states);
  TokensCall call;
  call.grid = g;
  call.ranges = {true, 0.1, 3.0, 0.2, 2.9};
  call.hidden_units = units;
  call.planes = planes;
  call.x = view(x, {g.batch, 1, g.mel_bins, g.frames});
  call.w1 = view(w1, {units, patch});
  call.b1 = view(b1, {units});
  call.w2 = view(w2, {2 * g.states, units});
  call.b2 = view(b2, {2 * g.states});
  call.weight = view(weight, {g.states, 16});
  call.hidden = view(hidden, {tokens, units});
  call.r = view(r, {tokens, 2 * g.states});
  call.dim = dim;
  call.projection = view(projection, {dim, patch});
  if (with_bias) call.bias = view(bias, {dim});
  call.fusion = view(fusion, {dim, planes * g.states});
  call.tokens = view(to, {tokens, dim});
  call.operand.type = call.tokens.type;
  const int64_t bytes = cuda::warp_tokens_bytes(call);
  if (!bytes) throw std::runtime_error("not by one kernel");
  auto packed = numbers(bytes / 4);
  call.packed = reinterpret_cast<char*>(packed.data());
  cuda::warp_tokens(call, nullptr);
}

// SBLU on tensor cores, where `windows` are x's gradient itself or have their own memory.
void run_unit_on_tensor_cores(Grid g, bool disjoint) {
  const int64_t rows = g.channels * g.patch_f, tokens = g.batch * g.n_f * g.n_t;
  auto x = numbers(g.batch * g.channels * g.mel_bins * g.frames), grad_x = x;
  auto decay = numbers(tokens * g.states), frequency = decay, grad_decay = decay, grad_frequency = decay;
  auto weight = numbers(g.states * rows), y = numbers(tokens * 2 * g.states), grad = y;
  auto windows = numbers(tokens * rows * g.window);
  SbluCall call;
  call.grid = g;
  call.x = view(x, {g.batch, g.channels, g.mel_bins, g.frames});
  call.decay = view(decay, {g.batch, g.n_f, g.n_t, g.states});
  call.frequency = view(frequency, {g.batch, g.n_f, g.n_t, g.states});
  call.weight = view(weight, {g.states, rows});
  call.y = view(y, {g.batch, g.n_f, g.n_t, 2, g.states});
  if (!cuda::warp_sblu(call, nullptr)) throw std::runtime_error("not on tensor cores");
  call.y = {};
  call.grad_y = view(grad, {g.batch, g.n_f, g.n_t, 2, g.states});
  call.grad_decay = view(grad_decay, {g.batch, g.n_f, g.n_t, g.states});
  call.grad_frequency = view(grad_frequency, {g.batch, g.n_f, g.n_t, g.states});
  call.grad_x = view(windows, {g.batch, g.n_f, g.n_t, rows, g.window});
  if (disjoint) {
    call.grad_x = view(grad_x, {1});
    const int64_t strides[] = {g.mel_bins * g.frames, g.stride_f * g.frames, g.stride_t, g.frames, 1};
    std::copy(strides, strides + 5, call.grad_x.stride);
  }
  const int64_t programs = cuda::warp_sblu_programs(call);
  if (!programs) throw std::runtime_error("not on tensor cores");
  auto partial = numbers(programs * g.states * rows);
  cuda::warp_sblu_backward(call, partial.data(), nullptr);
}

}  // namespace

namespace aape {
namespace cuda {
void set_device(int) {}
}  // namespace cuda
}  // namespace aape

int main() {
  // overlapping windows, more rows than are loaded at once, more states than one block's, two tiles; and odd windows
  run({1, 1, 20, 143, 20, 15, 20, 8, 15, 1, 17, 33, true}, false);
  run({1, 2, 6, 23, 3, 5, 3, 2, 5, 2, 10, 3, false}, true);
  // packs of 16 bytes, the last tile of tokens not whole; and pixel by pixel, sizes that fill no product
  const Grid usual = {1, 1, 32, 104, 16, 16, 16, 8, 16, 2, 12, 16, true}, odd = {1, 2, 9, 21, 3, 4, 2, 3, 6, 4, 6, 7, true};
  run_on_tensor_cores<BFloat16, BFloat16>(usual, 32, 3, false);
  run_on_tensor_cores<BFloat16, BFloat16>(odd, 21, 1, true);
  run_on_tensor_cores<float, float>(usual, 64, 3, true);
  run_on_tensor_cores<float, Float16>(odd, 21, 2, false);
  run_tokens<BFloat16, BFloat16>(usual, 32, 3, 96, true);
  run_tokens<float, float>(usual, 64, 1, 48, false);
  run_tokens<float, BFloat16>(usual, 40, 2, 64, true);
  run_unit_on_tensor_cores({1, 1, 32, 208, 16, 16, 16, 16, 16, 2, 13, 20, true}, true);
  run_unit_on_tensor_cores(odd, false);
  std::puts("clean");
}
