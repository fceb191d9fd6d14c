// What Python passes, as the kernels take it.

#pragma once

#include <pybind11/pybind11.h>

#include <iterator>
#include <stdexcept>
#include <string>

#include "calls.h"
#include "dlpack.h"

namespace aape {

namespace py = pybind11;

// A tensor, or None for one that is not there.
inline View view(const py::object& given) {
  View out;
  if (given.is_none()) return out;
  const dlpack::Tensor tensor = dlpack::borrow(given);
  if (tensor.axes > 5) throw py::value_error("a view has at most five axes");
  int64_t count = 1;
  for (int axis = 0; axis < tensor.axes; ++axis) {
    out.stride[axis] = tensor.strides[axis];
    count *= tensor.shape[axis];
  }
  if (count && !tensor.data)
    throw std::runtime_error("expected tensors that have memory, got one of shape " + dlpack::text(tensor) +
                             " whose memory was freed (by FSDP, whose own forward brings it back?)");
  out.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  out.type = dlpack::dtype(tensor);
  return out;
}

// As many views as there are places for.
template <size_t kCount>
void views(const py::tuple& given, View* const (&to)[kCount]) {
  if (given.size() != kCount) throw py::value_error("expected " + std::to_string(kCount) + " views");
  for (size_t k = 0; k < kCount; ++k) *to[k] = view(given[k]);
}

// The grid of x (B, C, F, T), which holds at least one patch, and (P_f, P_t, S_f, S_t, window, states).
inline Grid grid(const py::object& x, const py::tuple& sizes, bool quadrature) {
  const dlpack::Tensor tensor = dlpack::borrow(x);
  if (tensor.axes != 4) throw py::value_error("expected an x of four axes, got " + std::to_string(tensor.axes));
  Grid g;
  int64_t* const own[] = {&g.batch, &g.channels, &g.mel_bins, &g.frames};
  for (size_t axis = 0; axis < std::size(own); ++axis) *own[axis] = tensor.shape[axis];
  int64_t* const given[] = {&g.patch_f, &g.patch_t, &g.stride_f, &g.stride_t, &g.window, &g.states};
  if (sizes.size() != std::size(given)) throw py::value_error("a grid has six sizes");
  for (size_t k = 0; k < sizes.size(); ++k) *given[k] = sizes[k].cast<int64_t>();
  g.n_f = (g.mel_bins - g.patch_f) / g.stride_f + 1;
  g.n_t = (g.frames - g.patch_t) / g.stride_t + 1;
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
inline SbluCall sblu_call(const py::object& x, const py::tuple& sizes, bool quadrature, const py::object& logit_ranges,
                          const py::object& decay, const py::object& frequency, const py::object& weight,
                          const py::object& y) {
  SbluCall call;
  call.grid = grid(x, sizes, quadrature);
  call.ranges = ranges(logit_ranges);
  call.x = view(x);
  call.decay = view(decay);
  call.frequency = view(frequency);
  call.weight = view(weight);
  call.y = view(y);
  return call;
}

}  // namespace aape
