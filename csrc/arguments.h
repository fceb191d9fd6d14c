// What Python passes, as the kernels take it.

#pragma once

#include <pybind11/pybind11.h>

#include <iterator>
#include <string>

#include "calls.h"

namespace aape {

namespace py = pybind11;

// (pointer, strides, dtype), or None for a tensor that is not there
inline View view(const py::object& given) {
  View out;
  if (given.is_none()) return out;
  auto parts = given.cast<py::tuple>();
  out.data = reinterpret_cast<char*>(parts[0].cast<uintptr_t>());
  auto strides = parts[1].cast<py::tuple>();
  if (strides.size() > 5) throw py::value_error("a view has at most five axes");
  for (size_t axis = 0; axis < strides.size(); ++axis) out.stride[axis] = strides[axis].cast<int64_t>();
  out.type = static_cast<DType>(parts[2].cast<int>());
  return out;
}

// As many views as there are places for.
template <size_t kCount>
void views(const py::tuple& given, View* const (&to)[kCount]) {
  if (given.size() != kCount) throw py::value_error("expected " + std::to_string(kCount) + " views");
  for (size_t k = 0; k < kCount; ++k) *to[k] = view(given[k]);
}

inline Grid grid(const py::tuple& sizes, bool quadrature) {
  Grid g;
  int64_t* fields[] = {&g.batch,    &g.channels, &g.mel_bins, &g.frames, &g.patch_f, &g.patch_t,
                       &g.stride_f, &g.stride_t, &g.window,   &g.n_f,    &g.n_t,     &g.states};
  if (sizes.size() != std::size(fields)) throw py::value_error("a grid has twelve sizes");
  for (size_t k = 0; k < sizes.size(); ++k) *fields[k] = sizes[k].cast<int64_t>();
  g.quadrature = quadrature;
  return g;
}

// (decay low, log(high/low), band low, band width), or None where decay and frequency are no logits
inline Ranges ranges(const py::object& given) {
  Ranges out;
  if (given.is_none()) return out;
  auto parts = given.cast<py::tuple>();
  out.logits = true;
  out.decay_low = parts[0].cast<double>();
  out.decay_log_ratio = parts[1].cast<double>();
  out.band_low = parts[2].cast<double>();
  out.band_width = parts[3].cast<double>();
  return out;
}

// What forward and backward are both given.
inline SbluCall sblu_call(const py::tuple& sizes, bool quadrature, const py::object& logit_ranges, const py::object& x,
                          const py::object& decay, const py::object& frequency, const py::object& weight,
                          const py::object& y) {
  SbluCall call;
  call.grid = grid(sizes, quadrature);
  call.ranges = ranges(logit_ranges);
  call.x = view(x);
  call.decay = view(decay);
  call.frequency = view(frequency);
  call.weight = view(weight);
  call.y = view(y);
  return call;
}

}  // namespace aape
