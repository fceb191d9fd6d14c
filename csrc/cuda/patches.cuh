// Patches as rows, four elements at once: element e = (c · P_f + q) · P_t + t of a token's patch.

#pragma once

#include "divisor.cuh"

namespace aape {
namespace cuda {

template <class IO, class I>
struct PatchParams {
  GridOf<I> grid;
  bool time_major;  // the order of tokens
  const void* x;
  DType type;
  I x_stride[4];
  Divisor<int32_t> by_patch_f, by_patch_t;

  AAPE_DEVICE int length() const { return int(grid.channels * grid.patch_f * grid.patch_t); }
};

// The first pixel of token (b, i, j)'s patch.
template <class IO, class I>
AAPE_DEVICE I corner(const PatchParams<IO, I>& p, I b, I i, I j) {
  return b * p.x_stride[0] + i * p.grid.stride_f * p.x_stride[2] + j * p.grid.stride_t * p.x_stride[3];
}

template <class IO, class I>
AAPE_DEVICE I row_of(const PatchParams<IO, I>& p, I b, I i, I j) {
  const GridOf<I>& g = p.grid;
  return b * g.n_f * g.n_t + (p.time_major ? j * g.n_f + i : i * g.n_t + j);
}

template <class T, class X, class IO, class I>
AAPE_DEVICE Quad<T> load_patch_as(const PatchParams<IO, I>& p, I corner, int e) {
  const int length = p.length();
  const X* x = static_cast<const X*>(p.x) + corner;
  const auto pixel = [&](int at) {
    const auto [line, frame] = p.by_patch_t(at);
    const auto [channel, bin] = p.by_patch_f(line);
    return x + channel * p.x_stride[1] + bin * p.x_stride[2] + frame * p.x_stride[3];
  };
  Quad<T> out;
  // e is a multiple of four: if P_t is one too, all four are in one line
  if (int(p.grid.patch_t) % 4 == 0 && p.x_stride[3] == 1 && e < length) {
    const X* from = pixel(e);
    if (aligned<Quad<X>>(from)) {
      const auto pack = load_pack<Quad<X>>(from);
#pragma unroll
      for (int k = 0; k < 4; ++k) out.at[k] = widen<T>(pack.at[k]);
      return out;
    }
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    out.at[k] = e + k < length ? widen<T>(*pixel(e + k)) : T(0);
  }
  return out;
}

// Elements e … e + 3 of the patch at `corner`; zero behind its end.
template <class T, class IO, class I>
AAPE_DEVICE Quad<T> load_patch(const PatchParams<IO, I>& p, I corner, int e) {
  Quad<T> out;
  with_type<IO>(p.type, [&](auto x) { out = load_patch_as<T, decltype(x)>(p, corner, e); });
  return out;
}

template <class IO, class I>
PatchParams<IO, I> patch_params(const Grid& g, const View& x, bool time_major) {
  PatchParams<IO, I> p = {};
  p.grid = narrowed<I>(g);
  p.time_major = time_major;
  p.x = x.data;
  p.type = x.type;
  for (int axis = 0; axis < 4; ++axis) p.x_stride[axis] = I(x.stride[axis]);
  p.by_patch_f = Divisor<int32_t>(g.patch_f);
  p.by_patch_t = Divisor<int32_t>(g.patch_t);
  return p;
}

}  // namespace cuda
}  // namespace aape
