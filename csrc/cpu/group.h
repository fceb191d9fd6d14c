// A group: tokens that are worked on together, one a lane, and the tile [elements][tokens] of what belongs to them.

#pragma once

#include "product.h"

namespace aape {
inline namespace AAPE_NAMESPACE {

// Rows `first` … `first + count − 1` of the tokens; lanes behind them repeat the last one.
template <class T>
struct Group {
  static constexpr int kLanes = Simd<T>::kLanes;
  static constexpr int kTokens = Block<T>::kTokens;
  int64_t first, count;
  int vectors;
  int64_t corner[kTokens];       // of the patch, in elements of x
  int64_t mel[kTokens];          // first mel bin of the patch
  int64_t frame[kTokens];        // first frame of the patch
  int64_t clip[kTokens];

  Group(const Grid& g, const View& x, bool time_major, int64_t first_row, int64_t rows)
      : first(first_row), count(rows), vectors(int((rows + kLanes - 1) / kLanes)) {
    for (int64_t m = 0; m < vectors * kLanes; ++m) {
      const int64_t row = first + smaller(m, count - 1), inner = time_major ? g.n_f : g.n_t, outer = time_major ? g.n_t : g.n_f;
      const int64_t fast = row % inner, slow = row / inner % outer;
      clip[m] = row / inner / outer;
      mel[m] = (time_major ? fast : slow) * g.stride_f;
      frame[m] = (time_major ? slow : fast) * g.stride_t;
      corner[m] = clip[m] * x.stride[0] + mel[m] * x.stride[2] + frame[m] * x.stride[3];
    }
  }
  int64_t lanes() const { return int64_t(vectors) * kLanes; }
};

// A run of `length` pixels of every token, `unit` apart from `offset` on -> lines `step` apart.
template <class T>
inline void gather_run(T* to, int64_t step, const View& x, const Group<T>& group, int64_t offset, int64_t unit,
                       int64_t length) {
  constexpr int lanes = Simd<T>::kLanes;
  const bool plain = x.type == (sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32);
  const int64_t size = size_of(x.type);
  alignas(64) T widened[lanes * lanes];
  int64_t q = 0;
  if (!plain || unit == 1) {
    for (; q + lanes <= length; q += lanes) {
      for (int v = 0; v < group.vectors; ++v) {
        const int64_t* corner = group.corner + v * lanes;
        T* at = to + q * step + v * lanes;
        if (plain) {
          const T* from = reinterpret_cast<const T*>(x.data) + offset + q;
          transpose<T>(at, step, lanes, [&](int k) { return from + corner[k]; });
        } else {
          for (int k = 0; k < lanes; ++k)
            load_row(widened + k * lanes, x.data + (corner[k] + offset + q * unit) * size, x.type, unit, lanes);
          transpose<T>(at, step, lanes, [&](int k) { return widened + k * lanes; });
        }
      }
    }
  }
  for (; q < length; ++q)
    for (int64_t m = 0; m < group.lanes(); ++m)
      load_row(to + q * step + m, x.data + (group.corner[m] + offset + q * unit) * size, x.type, 1, 1);
}

// Patches -> to[(c · P_f + p) · P_t + f][token].
template <class T>
inline void gather_patches(T* to, const Grid& g, const View& x, const Group<T>& group) {
  constexpr int64_t line = Block<T>::kTokens;
  for (int64_t c = 0; c < g.channels; ++c) {
    T* channel = to + c * g.patch_f * g.patch_t * line;
    if (x.stride[3] == 1 || x.stride[2] != 1) {
      for (int64_t p = 0; p < g.patch_f; ++p)
        gather_run(channel + p * g.patch_t * line, line, x, group, c * x.stride[1] + p * x.stride[2], x.stride[3], g.patch_t);
    } else {  // mel bins are neighbours
      for (int64_t f = 0; f < g.patch_t; ++f)
        gather_run(channel + f * line, g.patch_t * line, x, group, c * x.stride[1] + f * x.stride[3], 1, g.patch_f);
    }
  }
}

// Windows that reach out of their patches -> to[(c · P_f + p) · K + k][token], zero outside the clip.
template <class T>
inline void gather_windows(T* to, const Grid& g, const View& x, const Group<T>& group) {
  constexpr int64_t line = Block<T>::kTokens;
  const int64_t offset = (g.patch_t - g.window) / 2, size = size_of(x.type);
  for (int64_t c = 0; c < g.channels; ++c)
    for (int64_t p = 0; p < g.patch_f; ++p)
      for (int64_t k = 0; k < g.window; ++k, to += line)
        for (int64_t m = 0; m < group.lanes(); ++m) {
          const int64_t t = group.frame[m] + offset + k;
          const int64_t at = group.corner[m] + c * x.stride[1] + p * x.stride[2] + (offset + k) * x.stride[3];
          if (t < 0 || t >= g.frames) to[m] = 0;
          else load_row(to + m, x.data + at * size, x.type, 1, 1);
        }
}

// Where a group's windows lie: row r of x and frame k at data[r · row + k · line].
template <class T>
struct Windows {
  T* data;
  int64_t row;
};

}  // namespace AAPE_NAMESPACE
}  // namespace aape
