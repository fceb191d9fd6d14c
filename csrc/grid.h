// The patch grid of one call, for every backend; the names are those of docs/maths.md §1. All sizes in elements.

#pragma once

#include <cstdint>

namespace aape {

// I: the type that the sizes, and offsets made of them, are counted in.
template <class I>
struct GridOf {
  I batch, channels, mel_bins, frames;
  I patch_f, patch_t, stride_f, stride_t, window;
  I n_f, n_t, states;
  bool quadrature;
};

using Grid = GridOf<int64_t>;

}  // namespace aape
