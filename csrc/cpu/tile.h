// A tile: neighbouring tokens of one subband whose windows are worked on together, so that what they share is
// projected once and stays in the first-level cache.

#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "convert.h"
#include "processor.h"
#include "simd.h"

namespace aape {
inline namespace AAPE_NAMESPACE {

AAPE_FN int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
AAPE_FN int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
AAPE_FN int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Sums at once, as many as registers hold beside what they are made of; frames are padded to whole blocks of so many.
constexpr int kSums = AAPE_VECTOR_BYTES == 64 ? 16 : 8;
constexpr int kVectorBlock = 2;

struct Tiling {
  int64_t tokens;      // of a full tile
  int64_t frames;      // that a full tile's windows span
  int64_t tiles;       // along a row of tokens
  int64_t units;       // tiles in all
  int64_t rows;        // C·P_f
  int64_t states;      // S, padded to whole blocks of vectors
  int64_t columns;     // frames, padded to whole blocks
};

template <class T>
AAPE_FN Tiling tiling(const Grid& g) {
  Tiling t;
  t.rows = g.channels * g.patch_f;
  int64_t budget = larger(g.window, smaller(128, 16384 / t.rows));
  // windows with gaps between them share nothing, and the gaps' frames must not be touched
  t.tokens = g.stride_t > g.window ? 1 : smaller(g.n_t, (budget - g.window) / g.stride_t + 1);
  t.frames = (t.tokens - 1) * g.stride_t + g.window;
  t.tiles = (g.n_t + t.tokens - 1) / t.tokens;
  t.units = g.batch * g.n_f * t.tiles;
  t.states = round_up(g.states, Simd<T>::kLanes);
  t.columns = round_up(t.frames, kSums);
  return t;
}

// Where unit k lies: tokens (b, i, first … first + count − 1), windows from frame `frame` on.
struct Unit {
  int64_t b, i, first, count, frame, frames;
};

AAPE_FN Unit unit_at(const Grid& g, const Tiling& t, int64_t k) {
  Unit unit;
  int64_t tile = k % t.tiles, row = k / t.tiles;
  unit.i = row % g.n_f;
  unit.b = row / g.n_f;
  unit.first = tile * t.tokens;
  unit.count = smaller(t.tokens, g.n_t - unit.first);
  unit.frame = unit.first * g.stride_t + (g.patch_t - g.window) / 2;
  unit.frames = (unit.count - 1) * g.stride_t + g.window;
  return unit;
}

// Aligned scratch memory, released with the scope.
template <class T>
struct Buffer {
  T* data;
  explicit Buffer(int64_t count) : data(static_cast<T*>(std::aligned_alloc(64, round_up(count * sizeof(T) + 64, 64)))) {
    if (data) return;
    // threads cannot throw into who called them
    std::fprintf(stderr, "aape_kernels: no memory for %lld bytes of scratch\n", static_cast<long long>(count * sizeof(T)));
    std::abort();
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T& operator[](int64_t k) const { return data[k]; }
};

template <class T>
inline void fill_zero(T* to, int64_t count) {
  if (count) std::memset(to, 0, count * sizeof(T));  // few or none are often asked for, and a call each
}

// weight (S, C, P_f), any strides -> [C·P_f][states], zero beyond S
template <class T>
inline void pack_weight(T* to, const View& weight, const Grid& g, const Tiling& t) {
  fill_zero(to, t.rows * t.states);
  for (int64_t c = 0; c < g.channels; ++c) {
    for (int64_t p = 0; p < g.patch_f; ++p) {
      const char* from = weight.data + (c * weight.stride[1] + p * weight.stride[2]) * size_of(weight.type);
      load_row(to + (c * g.patch_f + p) * t.states, from, weight.type, weight.stride[0], g.states);
    }
  }
}

// x's frames under the tile's windows -> [C·P_f][columns], zero outside the clip and beyond the tile
template <class T>
inline void load_tile(T* to, const View& x, const Grid& g, const Tiling& t, const Unit& unit) {
  int64_t begin = larger(0, unit.frame), end = smaller(g.frames, unit.frame + unit.frames);
  int64_t before = begin - unit.frame, count = end - begin, size = size_of(x.type);
  for (int64_t c = 0; c < g.channels; ++c) {
    for (int64_t p = 0; p < g.patch_f; ++p) {
      T* row = to + (c * g.patch_f + p) * t.columns;
      int64_t at = unit.b * x.stride[0] + c * x.stride[1] + (unit.i * g.stride_f + p) * x.stride[2];
      fill_zero(row, before);
      load_row(row + before, x.data + (at + begin * x.stride[3]) * size, x.type, x.stride[3], count);
      fill_zero(row + before + count, t.columns - before - count);
    }
  }
}

// Asks for memory that is soon to be read, into the first cache.
AAPE_FN void fetch(const void* from, int64_t bytes) {
  constexpr int64_t line = 64;
  for (int64_t at = 0; at < bytes; at += line) __builtin_prefetch(static_cast<const char*>(from) + at);
}

// Where in x, in bytes, the pixels are that are asked for while others are projected, a line of the cache a row and block of
// frames: rows are pages apart, and no processor looks ahead from one page to the next.
struct Ahead {
  const char* data = nullptr;
  int64_t channel = 0, mel = 0, frame = 0;
  int64_t turn = -1;  // from which row on they are those of the next block of frames, if from any

  Ahead() = default;
  Ahead(const View& x, const Grid& g, const Unit& unit) {
    const int64_t size = size_of(x.type);
    channel = x.stride[1] * size;
    mel = x.stride[2] * size;
    frame = x.stride[3] * size;
    data = x.data + unit.b * x.stride[0] * size + unit.i * g.stride_f * mel + unit.frame * frame;
  }
};

// Rows of pixels under a tile's windows: frame f of row r = (c, p) at data[c · channel + p · mel + f].
template <class T>
struct Rows {
  const T* data;
  int64_t channel, mel;
};

template <class T>
AAPE_FN const T* row_at(const Rows<T>& x, const Grid& g, int64_t r) {
  return x.data + r / g.patch_f * x.channel + r % g.patch_f * x.mel;
}

// In `tile`, once `load_tile` has filled it.
template <class T>
AAPE_FN Rows<T> rows_of(const T* tile, const Grid& g, const Tiling& t) {
  return {tile, g.patch_f * t.columns, t.columns};
}

// In x itself, where a tile and what pads its frames lie in the clip and a block of frames is whole lines of the cache: rows
// a power of two apart share its sets, which lose a line before the next block comes for the rest of it.
template <class T>
AAPE_FN bool rows_in_place(Rows<T>& rows, const View& x, const Grid& g, const Unit& unit) {
  if (AAPE_VECTOR_BYTES < 64 || x.type != kTypeOf<T> || x.stride[3] != 1) return false;
  if (unit.frame < 0 || unit.frame + round_up(unit.frames, kSums) > g.frames) return false;
  const int64_t at = unit.b * x.stride[0] + unit.i * g.stride_f * x.stride[2] + unit.frame;
  rows = {reinterpret_cast<const T*>(x.data) + at, x.stride[1], x.stride[2]};
  return true;
}

// What to ask for while unit k is projected: the next unit's pixels; or on Intel's cores its own, a few rows before they are
// read, if that is where they lie and done once. There the sixteen reads of a line that is not in the first cache all wait.
template <class T>
AAPE_FN Ahead ahead_of(const View& x, const Grid& g, const Tiling& t, int64_t k, bool in_place) {
  if (!in_place || t.states != Simd<T>::kLanes || !is_intel()) return {x, g, unit_at(g, t, smaller(k + 1, t.units - 1))};
  const int64_t few = smaller(4, g.patch_f);  // as long as the second cache takes to answer
  Ahead own(x, g, unit_at(g, t, k));
  own.data += few * own.mel;
  own.turn = g.patch_f - few;
  return own;
}

// u[t][s] = Σ_r x[r][t] · weight[r][s]
template <class T, int kVectors>
AAPE_FN void project_states(T* u, const Rows<T>& x, const T* weight, const Grid& g, const Tiling& t, int64_t frames,
                            int64_t s, const Ahead& ahead) {
  using M = Math<typename Simd<T>::Vector>;
  constexpr int lanes = Simd<T>::kLanes, block = kSums / kVectors;
  for (int64_t f = 0; f < frames; f += block) {
    typename Simd<T>::Vector sum[block][kVectors] = {};
    const T* states = weight + s;
    for (int64_t c = 0; c < g.channels; ++c) {
      const T* from = x.data + c * x.channel + f;
      const char* next = ahead.data + c * ahead.channel + f * ahead.frame;
      for (int64_t p = 0; p < g.patch_f; ++p, from += x.mel, next += ahead.mel, states += t.states) {
        if (p == ahead.turn) next += block * ahead.frame - g.patch_f * ahead.mel;
        __builtin_prefetch(next);
        for (int v = 0; v < kVectors; ++v) {
          auto w = M::load(states + v * lanes);
          for (int k = 0; k < block; ++k) sum[k][v] += from[k] * w;
        }
      }
    }
    for (int k = 0; k < block; ++k)
      for (int v = 0; v < kVectors; ++v) M::store(u + (f + k) * t.states + s + v * lanes, sum[k][v]);
  }
}

template <class T>
inline void project(T* u, const Rows<T>& x, const T* weight, const Grid& g, const Tiling& t, int64_t frames,
                    const Ahead& ahead) {
  constexpr int lanes = Simd<T>::kLanes;
  int64_t s = 0;
  for (; s + kVectorBlock * lanes <= t.states; s += kVectorBlock * lanes)
    project_states<T, kVectorBlock>(u, x, weight, g, t, frames, s, s ? Ahead() : ahead);
  for (; s < t.states; s += lanes) project_states<T, 1>(u, x, weight, g, t, frames, s, s ? Ahead() : ahead);
}

}  // namespace AAPE_NAMESPACE
}  // namespace aape
