// The patch grid of one call, for every backend; the names are those of docs/maths.md §1. All sizes in elements.

#pragma once

#include <cstdint>

namespace aape {

struct Grid {
  int64_t batch, channels, mel_bins, frames;
  int64_t patch_f, patch_t, stride_f, stride_t, window;
  int64_t n_f, n_t, states;
  bool quadrature;
};

}  // namespace aape
