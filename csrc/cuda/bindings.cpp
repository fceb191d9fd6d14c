// The CUDA kernels for Python. No CUDA header is needed here: the tests build this file with the emulated kernels.

#include "bindings.h"

#include "../arguments.h"
#include "api.h"

namespace aape {
namespace cuda {
namespace {

// The device and the stream to launch on come last: (index, cudaStream_t as a number).
struct Place {
  int device;
  void* stream;
  explicit Place(const py::tuple& given)
      : device(given[0].cast<int>()), stream(reinterpret_cast<void*>(given[1].cast<uintptr_t>())) {}
};

// Run `launch(stream)` without the GIL.
template <class Launch>
void on(const Place& place, Launch launch) {
  py::gil_scoped_release release;
  set_device(place.device);
  launch(place.stream);
}

void py_sblu(const py::object& x, const py::tuple& sizes, bool quadrature, const py::object& logit_ranges,
             const py::object& decay, const py::object& frequency, const py::object& weight, const py::object& features,
             int64_t planes, const py::object& grad_features, const py::object& grad_y, const py::tuple& place) {
  SbluCall call = sblu_call(x, sizes, quadrature, logit_ranges, decay, frequency, weight, features);
  call.planes = planes;
  call.grad_features = view(grad_features);
  call.grad_y = view(grad_y);
  on(Place(place), [&](void* stream) { sblu(call, stream); });
}

void py_standardise(const py::object& x, const py::tuple& sizes, int64_t planes, const py::object& y,
                    const py::object& features, const py::object& grad_features, const py::tuple& place) {
  const Grid g = grid(x, sizes, false);
  StandardiseCall call;
  call.tokens = g.batch * g.n_f * g.n_t;
  call.states = g.states;
  call.planes = planes;
  call.y = view(y);
  call.features = view(features);
  call.grad_features = view(grad_features);
  on(Place(place), [&](void* stream) { standardise(call, stream); });
}

void py_states(const py::object& x, const py::tuple& sizes, bool quadrature, const py::object& logit_ranges,
               const py::object& grad_y, const py::object& decay, const py::object& frequency, const py::object& weight,
               const py::object& y, const py::object& grad_decay, const py::object& grad_frequency,
               const py::tuple& place) {
  SbluCall call = sblu_call(x, sizes, quadrature, logit_ranges, decay, frequency, weight, y);
  call.grad_y = view(grad_y);
  call.grad_decay = view(grad_decay);
  call.grad_frequency = view(grad_frequency);
  on(Place(place), [&](void* stream) { sblu_backward_states(call, stream); });
}

void py_weight(const py::object& x, const py::tuple& sizes, bool quadrature, const py::object& logit_ranges,
               const py::object& grad_y, const py::object& decay, const py::object& frequency,
               const py::object& partial, int64_t programs, const py::tuple& place) {
  SbluCall call = sblu_call(x, sizes, quadrature, logit_ranges, decay, frequency, py::none(), py::none());
  call.grad_y = view(grad_y);
  void* sums = view(partial).data;
  on(Place(place), [&](void* stream) { sblu_backward_weight(call, sums, programs, stream); });
}

void py_windows(const py::object& x, const py::tuple& sizes, bool quadrature, const py::object& logit_ranges,
                const py::object& grad_y, const py::object& decay, const py::object& frequency,
                const py::object& weight, const py::object& windows, const py::tuple& place) {
  SbluCall call = sblu_call(x, sizes, quadrature, logit_ranges, decay, frequency, weight, py::none());
  call.grad_y = view(grad_y);
  void* to = view(windows).data;
  on(Place(place), [&](void* stream) { sblu_backward_windows(call, to, stream); });
}

// The gradient of x's windows has five axes.
SbluCall backward_call(const py::object& x, const py::tuple& sizes, bool quadrature, const py::object& logit_ranges,
                       const py::object& grad_y, const py::object& windows) {
  const py::none none;
  SbluCall call = sblu_call(x, sizes, quadrature, logit_ranges, none, none, none, none);
  call.grad_y = view(grad_y);
  call.grad_x = view(windows);
  return call;
}

int64_t py_warp_sblu_programs(const py::object& x, const py::tuple& sizes, bool quadrature, const py::object& grad_y,
                              const py::object& windows, const py::tuple& place) {
  const SbluCall call = backward_call(x, sizes, quadrature, py::none(), grad_y, windows);
  int64_t programs = 0;
  on(Place(place), [&](void*) { programs = warp_sblu_programs(call); });
  return programs;
}

void py_warp_sblu_backward(const py::object& x, const py::tuple& sizes, bool quadrature, const py::object& logit_ranges,
                           const py::object& grad_y, const py::tuple& leaves, const py::tuple& gradients,
                           const py::object& partial, const py::object& windows, const py::tuple& place) {
  SbluCall call = backward_call(x, sizes, quadrature, logit_ranges, grad_y, windows);
  views(leaves, {&call.decay, &call.frequency, &call.weight});
  views(gradients, {&call.grad_decay, &call.grad_frequency});
  void* sums = view(partial).data;
  on(Place(place), [&](void* stream) { warp_sblu_backward(call, sums, stream); });
}

void py_overlap_add(const py::object& x, const py::tuple& sizes, const py::object& windows, const py::object& out,
                    int64_t tile, int64_t length, int64_t offset, bool add, const py::tuple& place) {
  OverlapAddCall call;
  call.grid = grid(x, sizes, false);
  call.windows = view(windows);
  call.out = view(out);
  call.tile = tile;
  call.length = length;
  call.offset = offset;
  call.add = add;
  on(Place(place), [&](void* stream) { overlap_add(call, stream); });
}

// What the stem's calls share: x, then w1, b1, w2, b2 and the SBLU's weight, then operand, hidden and r.
void set_stem(StemCall& call, const py::object& x, const py::tuple& sizes, bool quadrature, bool time_major,
              const py::object& logit_ranges, const py::tuple& weights, const py::tuple& rows, int64_t hidden_units,
              int64_t planes) {
  call.grid = grid(x, sizes, quadrature);
  call.time_major = time_major;
  call.ranges = ranges(logit_ranges);
  call.x = view(x);
  views(weights, {&call.w1, &call.b1, &call.w2, &call.b2, &call.weight});
  views(rows, {&call.operand, &call.hidden, &call.r});
  call.hidden_units = hidden_units;
  call.planes = planes;
}

void py_stem(const py::object& x, const py::tuple& sizes, bool quadrature, bool time_major,
             const py::object& logit_ranges, const py::tuple& weights, const py::tuple& rows, int64_t hidden_units,
             int64_t planes, const py::tuple& place) {
  StemCall call;
  set_stem(call, x, sizes, quadrature, time_major, logit_ranges, weights, rows, hidden_units, planes);
  on(Place(place), [&](void* stream) { stem(call, stream); });
}

bool py_warp_stem(const py::object& x, const py::tuple& sizes, bool quadrature, bool time_major,
                  const py::object& logit_ranges, const py::tuple& weights, const py::tuple& rows, int64_t hidden_units,
                  int64_t planes, const py::tuple& place) {
  StemCall call;
  set_stem(call, x, sizes, quadrature, time_major, logit_ranges, weights, rows, hidden_units, planes);
  bool done = false;
  on(Place(place), [&](void* stream) { done = warp_stem(call, stream); });
  return done;
}

int64_t py_warp_tokens_bytes(const py::object& x, const py::tuple& sizes, bool quadrature, int type,
                             int64_t hidden_units, int64_t planes, int64_t dim, const py::tuple& place) {
  TokensCall call;
  call.grid = grid(x, sizes, quadrature);
  call.x = view(x);
  call.operand.type = static_cast<DType>(type);
  call.hidden_units = hidden_units;
  call.planes = planes;
  call.dim = dim;
  int64_t bytes = 0;
  on(Place(place), [&](void*) { bytes = warp_tokens_bytes(call); });
  return bytes;
}

// rows: tokens, hidden and r; product: projection, bias and fusion.
void py_warp_tokens(const py::object& x, const py::tuple& sizes, bool quadrature, bool time_major,
                    const py::object& logit_ranges, const py::tuple& weights, const py::tuple& rows,
                    int64_t hidden_units, int64_t planes, const py::tuple& product, int64_t dim,
                    const py::object& packed, const py::tuple& place) {
  TokensCall call;
  set_stem(call, x, sizes, quadrature, time_major, logit_ranges, weights, py::make_tuple(py::none(), rows[1], rows[2]),
           hidden_units, planes);
  call.tokens = view(rows[0]);
  call.operand.type = call.tokens.type;
  views(product, {&call.projection, &call.bias, &call.fusion});
  call.dim = dim;
  call.packed = view(packed).data;
  on(Place(place), [&](void* stream) { warp_tokens(call, stream); });
}

int64_t py_warp_stem_programs(const py::object& x, const py::tuple& sizes, bool quadrature, const py::object& operand,
                              int64_t hidden_units, int64_t planes, const py::tuple& place) {
  StemCall call;
  call.grid = grid(x, sizes, quadrature);
  call.x = view(x);
  call.operand = view(operand);
  call.hidden_units = hidden_units;
  call.planes = planes;
  int64_t programs = 0;
  on(Place(place), [&](void*) { programs = warp_stem_programs(call); });
  return programs;
}

void py_warp_stem_backward(const py::object& x, const py::tuple& sizes, bool quadrature, bool time_major,
                           const py::object& logit_ranges, const py::tuple& weights, const py::tuple& rows,
                           int64_t hidden_units, int64_t planes, const py::tuple& gradients, int64_t one,
                           int64_t active, const py::tuple& place) {
  StemGradientCall call;
  set_stem(call, x, sizes, quadrature, time_major, logit_ranges, weights, rows, hidden_units, planes);
  views(gradients, {&call.grad, &call.grad_encoder, &call.grad_y, &call.partial});
  call.one = one;
  call.active = active;
  on(Place(place), [&](void* stream) { warp_stem_backward(call, stream); });
}

// Pairs of tensors and sizes: (from, to, (programs, rows, columns)).
void py_gradients(const py::object&, const py::tuple&, const py::tuple& given, const py::tuple& place) {
  std::vector<GradientCall> calls;
  for (const auto& one : given) {
    const auto parts = one.cast<py::tuple>();
    const auto sizes = parts[2].cast<py::tuple>();
    GradientCall call;
    call.from = view(parts[0]);
    call.to = view(parts[1]);
    call.programs = sizes[0].cast<int64_t>();
    call.rows = sizes[1].cast<int64_t>();
    call.columns = sizes[2].cast<int64_t>();
    calls.push_back(call);
  }
  on(Place(place), [&](void* stream) { gradients(calls, stream); });
}

void py_gather(const py::object& x, const py::tuple& sizes, const py::object& patches, const py::tuple& place) {
  GatherCall call;
  call.grid = grid(x, sizes, false);
  call.x = view(x);
  call.patches = view(patches);
  on(Place(place), [&](void* stream) { gather(call, stream); });
}

int64_t py_tile_tokens(const py::object& x, const py::tuple& sizes, int type) {
  return tile_tokens(grid(x, sizes, false), static_cast<DType>(type));
}

}  // namespace

void bind(py::module_& module) {
  module.def("sblu", &py_sblu);
  module.def("standardise", &py_standardise);
  module.def("sblu_backward_states", &py_states);
  module.def("sblu_backward_weight", &py_weight);
  module.def("sblu_backward_windows", &py_windows);
  module.def("warp_sblu_programs", &py_warp_sblu_programs);
  module.def("warp_sblu_backward", &py_warp_sblu_backward);
  module.def("overlap_add", &py_overlap_add);
  module.def("stem", &py_stem);
  module.def("warp_stem", &py_warp_stem);
  module.def("warp_stem_programs", &py_warp_stem_programs);
  module.def("warp_tokens", &py_warp_tokens);
  module.def("warp_tokens_bytes", &py_warp_tokens_bytes);
  module.def("warp_stem_backward", &py_warp_stem_backward);
  module.def("gradients", &py_gradients);
  module.def("gather", &py_gather);
  module.def("tile_tokens", &py_tile_tokens);
}

}  // namespace cuda
}  // namespace aape
