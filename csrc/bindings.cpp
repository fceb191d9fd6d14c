// The native module. It links no libtorch: callers pass pointers, sizes and element strides.

#include <pybind11/pybind11.h>

#include <string>

#include "cpu/api.h"

namespace py = pybind11;

namespace aape {
namespace {

constexpr const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

constexpr const char* architecture() {
#if defined(__x86_64__)
  return "x86_64";
#elif defined(__aarch64__)
  return "aarch64";
#else
  return "unknown";
#endif
}

// Fastest first.
const Kernels* const kVariants[] = {
#if defined(__x86_64__)
    &kAvx512, &kAvx2,
#endif
    &kBaseline};

bool runs_here(const Kernels* kernels) {
#if defined(__x86_64__)
  if (kernels == &kAvx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (kernels == &kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return kernels == &kBaseline;
}

py::list instruction_sets() {
  py::list names;
  for (const Kernels* kernels : kVariants)
    if (runs_here(kernels)) names.append(kernels->name);
  return names;
}

// An unknown name, or one this machine cannot run, would end in an illegal instruction: it is refused here.
const Kernels& kernels_named(const std::string& name) {
  for (const Kernels* kernels : kVariants)
    if (name == kernels->name && runs_here(kernels)) return *kernels;
  throw py::value_error("instruction set: expected one that this machine runs, got '" + name + "'");
}

// (pointer, strides, dtype), or None for a tensor that is not there
View view(const py::object& given) {
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

Grid grid(const py::tuple& sizes, bool quadrature) {
  Grid g;
  int64_t* fields[] = {&g.batch,    &g.channels, &g.mel_bins, &g.frames, &g.patch_f, &g.patch_t,
                       &g.stride_f, &g.stride_t, &g.window,   &g.n_f,    &g.n_t,     &g.states};
  if (sizes.size() != std::size(fields)) throw py::value_error("a grid has twelve sizes");
  for (size_t k = 0; k < sizes.size(); ++k) *fields[k] = sizes[k].cast<int64_t>();
  g.quadrature = quadrature;
  return g;
}

// (decay low, log(high/low), band low, band width), or None where decay and frequency are no logits
Ranges ranges(const py::object& given) {
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
SbluCall sblu_call(const py::tuple& sizes, bool quadrature, const py::object& logit_ranges, const py::object& x,
                   const py::object& decay, const py::object& frequency, const py::object& weight,
                   const py::object& y, int threads) {
  SbluCall call;
  call.grid = grid(sizes, quadrature);
  call.ranges = ranges(logit_ranges);
  call.x = view(x);
  call.decay = view(decay);
  call.frequency = view(frequency);
  call.weight = view(weight);
  call.y = view(y);
  call.threads = threads;
  return call;
}

void sblu(const std::string& isa, const py::tuple& sizes, bool quadrature, const py::object& logit_ranges,
          const py::object& x, const py::object& decay, const py::object& frequency, const py::object& weight,
          const py::object& y, int threads) {
  const Kernels& kernels = kernels_named(isa);
  const SbluCall call = sblu_call(sizes, quadrature, logit_ranges, x, decay, frequency, weight, y, threads);
  py::gil_scoped_release release;
  kernels.sblu(call);
}

void sblu_backward(const std::string& isa, const py::tuple& sizes, bool quadrature, const py::object& logit_ranges,
                   const py::object& grad_y, const py::object& x, const py::object& decay, const py::object& frequency,
                   const py::object& weight, const py::object& y, const py::object& grad_x,
                   const py::object& grad_decay, const py::object& grad_frequency, const py::object& grad_weight,
                   int threads) {
  const Kernels& kernels = kernels_named(isa);
  SbluCall call = sblu_call(sizes, quadrature, logit_ranges, x, decay, frequency, weight, y, threads);
  call.grad_y = view(grad_y);
  call.grad_x = view(grad_x);
  call.grad_decay = view(grad_decay);
  call.grad_frequency = view(grad_frequency);
  call.grad_weight = view(grad_weight);
  py::gil_scoped_release release;
  kernels.sblu_backward(call);
}

void gather(const std::string& isa, const py::tuple& sizes, const py::object& x, const py::object& patches,
            int threads) {
  GatherCall call;
  const Kernels& kernels = kernels_named(isa);
  call.grid = grid(sizes, false);
  call.x = view(x);
  call.patches = view(patches);
  call.threads = threads;
  py::gil_scoped_release release;
  kernels.gather(call);
}

py::dict build_info() {
  py::dict info;
  info["version"] = AAPE_VERSION;
  info["compiler"] = compiler();
  info["architecture"] = architecture();
  info["cplusplus"] = static_cast<long>(__cplusplus);
  info["openmp"] = AAPE_OPENMP;
  info["kernels"] = py::make_tuple("cpu");
  info["instruction_sets"] = instruction_sets();
  return info;
}

}  // namespace
}  // namespace aape

PYBIND11_MODULE(_native, m) {
  using namespace aape;
  m.doc() = "Native kernels of aape_kernels. Pointers are trusted: call them through aape_kernels.";
  m.def("build_info", &build_info,
        "How this module was built: version, compiler, architecture, C++ standard, the kernels it holds, and the "
        "instruction sets of them that this machine runs, fastest first.");
  m.def("sblu", &sblu);
  m.def("sblu_backward", &sblu_backward);
  m.def("gather", &gather);
}
