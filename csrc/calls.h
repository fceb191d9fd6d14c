// What the kernels take, on every device: pointers, sizes and element strides.

#pragma once

#include <cstdint>

#include "grid.h"

namespace aape {

enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

// A tensor of up to five axes, strides in elements.
struct View {
  char* data = nullptr;
  int64_t stride[5] = {0, 0, 0, 0, 0};
  DType type = DType::kFloat32;
};

// With logits, `decay` and `frequency` hold the Lambda Encoder's r, squashed here into the ranges.
struct Ranges {
  bool logits = false;
  double decay_low = 0, decay_log_ratio = 0, band_low = 0, band_width = 0;
};

// x (B, C, F, T); decay, frequency (B, N_f, N_t, S); weight (S, C, P_f); y, grad_y (B, N_f, N_t, 2, S).
// decay, frequency, weight and all gradients are float32, or float64 where x is.
struct SbluCall {
  Grid grid;
  Ranges ranges;
  View x, decay, frequency, weight;
  // Forward; also backward, where the responses come with the derivatives for nothing, unless data is null.
  View y;
  View grad_y, grad_x, grad_decay, grad_frequency, grad_weight;  // backward; data is null where not needed
  int threads = 1;  // of the CPU
};

// patches (B, N_f, N_t, C·P_f·P_t); fastest where one of the last two axes is contiguous
struct GatherCall {
  Grid grid;
  View x, patches;
  int threads = 1;  // of the CPU
};

}  // namespace aape
