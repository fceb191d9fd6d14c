// Patches out of the spectrogram, as rows or as columns of a matrix.

#pragma once

#include "tile.h"

namespace aape {
inline namespace AAPE_NAMESPACE {

// Patches transposed: a row of x is read once for each frame of a patch, and what is written lies side by side.
template <class T>
inline void gather_columns(const GatherCall& call) {
  const Grid& g = call.grid;
  const View &x = call.x, &to = call.patches;
  const int64_t rows = g.batch * g.n_f, in = size_of(x.type), out = size_of(to.type);
  const bool plain = x.type == DType::kFloat32 && to.type == DType::kFloat32;
  const int threads = int(smaller(call.threads, rows));
#pragma omp parallel num_threads(threads)
  {
    Buffer<T> tokens(g.n_t);
#pragma omp for schedule(static)
    for (int64_t k = 0; k < rows; ++k) {
      int64_t i = k % g.n_f, b = k / g.n_f;
      char* at = to.data + (b * to.stride[0] + i * to.stride[1]) * out;
      for (int64_t c = 0; c < g.channels; ++c) {
        for (int64_t p = 0; p < g.patch_f; ++p) {
          const char* from =
              x.data + (b * x.stride[0] + c * x.stride[1] + (i * g.stride_f + p) * x.stride[2]) * in;
          for (int64_t f = 0; f < g.patch_t; ++f, at += to.stride[3] * out, from += x.stride[3] * in) {
            int64_t step = g.stride_t * x.stride[3];
            if (plain && to.stride[2] == 1) {
              auto source = reinterpret_cast<const float*>(from);
              auto target = reinterpret_cast<float*>(at);
              for (int64_t j = 0; j < g.n_t; ++j) target[j] = source[j * step];
            } else {
              load_row(tokens.data, from, x.type, step, g.n_t);
              store_row(at, tokens.data, to.type, to.stride[2], g.n_t);
            }
          }
        }
      }
    }
  }
}

template <class T>
inline void gather_rows(const GatherCall& call) {
  const Grid& g = call.grid;
  const View &x = call.x, &to = call.patches;
  const int64_t rows = g.batch * g.n_f, in = size_of(x.type), out = size_of(to.type);
  const bool plain = x.type == to.type && x.stride[3] == 1;
  const int threads = int(smaller(call.threads, rows * g.n_t));
#pragma omp parallel num_threads(threads)
  {
    Buffer<T> row(g.patch_t);
#pragma omp for schedule(static)
    for (int64_t k = 0; k < rows * g.n_t; ++k) {
      int64_t j = k % g.n_t, i = k / g.n_t % g.n_f, b = k / g.n_t / g.n_f;
      char* at = to.data + (b * to.stride[0] + i * to.stride[1] + j * to.stride[2]) * out;
      for (int64_t c = 0; c < g.channels; ++c) {
        const char* from = x.data + (b * x.stride[0] + c * x.stride[1] + i * g.stride_f * x.stride[2] +
                                     j * g.stride_t * x.stride[3]) * in;
        for (int64_t p = 0; p < g.patch_f; ++p, at += g.patch_t * out, from += x.stride[2] * in) {
          if (plain) {
            std::memcpy(at, from, g.patch_t * in);
          } else {
            load_row(row.data, from, x.type, x.stride[3], g.patch_t);
            store_row(at, row.data, to.type, 1, g.patch_t);
          }
        }
      }
    }
  }
}

}  // namespace AAPE_NAMESPACE
}  // namespace aape
