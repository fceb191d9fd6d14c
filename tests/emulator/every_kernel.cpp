// Every CUDA kernel once, on memory of exactly its size, for sanitizers: with threads.h a missing barrier is a race that
// ThreadSanitizer names, with fibers.h AddressSanitizer sees what is out of bounds. The numbers are other tests' business.

#include "emulator.h"

#include <cstdio>
#include <cstdlib>

#include "../../csrc/cuda/api.h"

namespace {

using namespace aape;

std::vector<float> numbers(int64_t count) {
  std::vector<float> out(count);
  for (auto& value : out) value = float(std::rand()) / RAND_MAX + 0.1f;
  return out;
}

View view(std::vector<float>& data, std::initializer_list<int64_t> shape) {
  View out;
  out.data = reinterpret_cast<char*>(data.data());
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
  const int64_t length = (tile - 1) * g.stride_t + g.window, programs = 1;
  auto x = numbers(g.batch * g.channels * g.mel_bins * g.frames), out = x;
  auto decay = numbers(tokens * g.states), frequency = decay, grad_decay = decay, grad_frequency = decay;
  auto weight = numbers(g.states * rows), partial = numbers(programs * g.states * rows);
  auto y = numbers(tokens * 2 * g.states), grad = y;
  auto windows = numbers(g.batch * g.n_f * tiles * rows * length);

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
  sum.windows = view(windows, {g.batch, g.n_f, tiles, rows, length});
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

}  // namespace

namespace aape {
namespace cuda {
void set_device(int) {}
}  // namespace cuda
}  // namespace aape

int main() {
  // overlapping windows, more rows than are loaded at once, more states than one block's, two tiles; and odd windows
  run({1, 1, 20, 144, 20, 16, 20, 8, 16, 1, 17, 33, true}, false);
  run({1, 2, 6, 23, 3, 5, 3, 2, 5, 2, 10, 3, false}, true);
  std::puts("clean");
}
