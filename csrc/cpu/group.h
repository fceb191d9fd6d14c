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

// Fewer than a line of the cache: `copy_row` would ask for lines first.
template <class T>
AAPE_FN void copy_few(T* to, const T* from, int64_t count) {
  for (; count >= 4; count -= 4, to += 4, from += 4) std::memcpy(to, from, 4 * sizeof(T));
  for (; count; --count) *to++ = *from++;
}

// `count` ≤ lanes numbers of every token of a vector, which fill(token, row) provides -> lines `step` apart.
template <class T, class Fill>
AAPE_FN void gather_block(T* to, int64_t step, int64_t count, Fill fill) {
  using M = Math<typename Simd<T>::Vector>;
  constexpr int lanes = Simd<T>::kLanes;
  alignas(64) T rows[lanes * lanes], turned[lanes * lanes];
  if (count < lanes) fill_zero(rows, lanes * lanes);
  for (int k = 0; k < lanes; ++k) fill(k, rows + k * lanes);
  const auto row = [&](int k) { return rows + k * lanes; };
  if (count == lanes) return transpose<T>(to, step, lanes, row);
  transpose<T>(turned, lanes, lanes, row);
  for (int64_t n = 0; n < count; ++n) M::store(to + n * step, M::load(turned + n * lanes));
}

// Pixels of every token: `runs` runs of `length`, in which pixels are `unit` apart; the runs begin at `offset` and are
// `apart` -> a line for each, `step` apart.
template <class T>
inline void gather_runs(T* to, int64_t step, const View& x, const Group<T>& group, int64_t offset, int64_t unit,
                        int64_t length, int64_t runs, int64_t apart) {
  constexpr int lanes = Simd<T>::kLanes;
  const bool plain = unit == 1 && x.type == kTypeOf<T>;
  const T* pixels = reinterpret_cast<const T*>(x.data);
  struct Piece {
    int64_t offset, first, count;
  } pieces[lanes];
  const int64_t all = runs * length;
  for (int64_t q = 0; q < all; q += lanes, to += lanes * step) {
    // of which runs the next pixels are
    const int64_t count = smaller(lanes, all - q);
    int some = 0;
    for (int64_t n = 0; n < count; n += pieces[some++].count) {
      const int64_t run = (q + n) / length, at = (q + n) % length;
      pieces[some] = {offset + run * apart + at * unit, n, smaller(length - at, count - n)};
    }
    for (int v = 0; v < group.vectors; ++v) {
      const int64_t* corner = group.corner + v * lanes;
      T* lines = to + v * lanes;
      if (plain && some == 1 && count == lanes) {
        const T* from = pixels + pieces[0].offset;
        transpose<T>(lines, step, lanes, [&](int k) { return from + corner[k]; });
      } else if (plain) {
        gather_block(lines, step, count, [&](int k, T* row) {
          for (int n = 0; n < some; ++n)
            copy_few(row + pieces[n].first, pixels + pieces[n].offset + corner[k], pieces[n].count);
        });
      } else {
        gather_block(lines, step, count, [&](int k, T* row) {
          for (int n = 0; n < some; ++n)
            load_row(row + pieces[n].first, x.data + (pieces[n].offset + corner[k]) * size_of(x.type), x.type, unit,
                     pieces[n].count);
        });
      }
    }
  }
}

// Patches -> to[(c · P_f + p) · P_t + f][token].
template <class T>
inline void gather_patches(T* to, const Grid& g, const View& x, const Group<T>& group) {
  constexpr int64_t line = Block<T>::kTokens;
  for (int64_t c = 0; c < g.channels; ++c) {
    T* channel = to + c * g.patch_f * g.patch_t * line;
    const int64_t from = c * x.stride[1];
    if (x.stride[3] == 1 || x.stride[2] != 1) {
      gather_runs(channel, line, x, group, from, x.stride[3], g.patch_t, g.patch_f, x.stride[2]);
    } else {  // mel bins are neighbours
      for (int64_t f = 0; f < g.patch_t; ++f)
        gather_runs(channel + f * line, g.patch_t * line, x, group, from + f * x.stride[3], 1, g.patch_f, 1, 0);
    }
  }
}

// Windows that reach out of their patches -> to[(c · P_f + p) · K + k][token], zero outside the clip.
template <class T>
inline void gather_windows(T* to, const Grid& g, const View& x, const Group<T>& group) {
  constexpr int64_t line = Block<T>::kTokens;
  constexpr int lanes = Simd<T>::kLanes;
  const int64_t offset = (g.patch_t - g.window) / 2, size = size_of(x.type);
  for (int64_t c = 0; c < g.channels; ++c)
    for (int64_t p = 0; p < g.patch_f; ++p, to += g.window * line)
      for (int64_t k = 0; k < g.window; k += lanes)
        for (int64_t m = 0; m < group.lanes(); m += lanes) {
          const int64_t count = smaller(lanes, g.window - k);
          gather_block(to + k * line + m, line, count, [&](int n, T* row) {
            const int64_t t = group.frame[m + n] + offset + k, begin = smaller(count, larger(0, -t));
            const int64_t end = larger(begin, smaller(count, g.frames - t));
            const int64_t at = group.corner[m + n] + c * x.stride[1] + p * x.stride[2] + (offset + k + begin) * x.stride[3];
            fill_zero(row, begin);
            load_row(row + begin, x.data + at * size, x.type, x.stride[3], end - begin);
            fill_zero(row + end, count - end);
          });
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
