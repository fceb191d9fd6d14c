// The native module. It links no libtorch: tensors are read by DLPack.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>
#include <string>

#include "arguments.h"
#include "cpu/api.h"
#if AAPE_CUDA
#include "cuda/api.h"
#include "cuda/bindings.h"
#endif

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

// Of 16 bits, those types whose matrix products this processor has instructions for; all of them where that is not known.
py::list narrow_products() {
  bool bfloat16 = true, float16 = true;
#if defined(__x86_64__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0, more = 0;
  __get_cpuid_count(7, 1, &more, &ebx, &ecx, &edx);
  __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
  const auto has = [&](unsigned bits, int bit) { return runs_here(&kAvx512) && (bits >> bit & 1); };
  bfloat16 = has(edx, 22) || has(more, 5);   // AMX-BF16, AVX512-BF16
  float16 = has(more, 21) || has(edx, 23);  // AMX-FP16, AVX512-FP16
#endif
  py::list names;
  if (bfloat16) names.append("bfloat16");
  if (float16) names.append("float16");
  return names;
}

py::list instruction_sets() {
  py::list names;
  for (const Kernels* kernels : kVariants)
    if (runs_here(kernels)) names.append(kernels->name);
  return names;
}

// The fastest that runs here, or the one that AAPE_CPU_ISA names, which is read at every call: here, as Python's own
// environment is slow to ask. One that this machine cannot run would end in an illegal instruction: it is refused.
const Kernels& kernels() {
  const char* const name = std::getenv("AAPE_CPU_ISA");
  for (const Kernels* kernels : kVariants)
    if (runs_here(kernels) && (!name || !*name || !std::strcmp(name, kernels->name))) return *kernels;
  std::string known;
  for (const Kernels* kernels : kVariants)
    if (runs_here(kernels)) known += (known.empty() ? "" : ", ") + std::string(kernels->name);
  throw py::value_error("AAPE_CPU_ISA: expected one of " + known + " on this machine, got '" + name + "'");
}

const char* instruction_set() { return kernels().name; }

void sblu(const py::object& x, const py::tuple& sizes, bool quadrature, const py::object& decay,
          const py::object& frequency, const py::object& weight, const py::object& y, int threads) {
  const Kernels& chosen = kernels();
  SbluCall call = sblu_call(x, sizes, quadrature, py::none(), decay, frequency, weight, y);
  call.threads = threads;
  py::gil_scoped_release release;
  chosen.sblu(call);
}

// gradients: of x, decay, frequency and weight
void sblu_backward(const py::object& x, const py::tuple& sizes, bool quadrature, const py::object& decay,
                   const py::object& frequency, const py::object& weight, const py::object& grad_y,
                   const py::tuple& gradients, int threads) {
  const Kernels& chosen = kernels();
  SbluCall call = sblu_call(x, sizes, quadrature, py::none(), decay, frequency, weight, py::none());
  call.threads = threads;
  call.grad_y = view(grad_y);
  views(gradients, {&call.grad_x, &call.grad_decay, &call.grad_frequency, &call.grad_weight});
  py::gil_scoped_release release;
  chosen.sblu_backward(call);
}

// What both directions of the stem are given: (planes, D, hidden units, time-major), x, and the eight weights.
EmbedCall embed_call(const py::object& x, const py::tuple& sizes, bool quadrature, const py::object& logit_ranges,
                     const py::tuple& shape, const py::tuple& weights, int threads) {
  EmbedCall call;
  call.grid = grid(x, sizes, quadrature);
  call.ranges = ranges(logit_ranges);
  call.planes = shape[0].cast<int64_t>();
  call.dim = shape[1].cast<int64_t>();
  call.hidden_units = shape[2].cast<int64_t>();
  call.time_major = shape[3].cast<bool>();
  call.threads = threads;
  call.x = view(x);
  View* const to[] = {&call.proj_w, &call.proj_b, &call.w1, &call.b1, &call.w2, &call.b2, &call.sblu_w, &call.fusion_w};
  views(weights, to);
  return call;
}

// outputs: tokens, the product's operand, hidden, r
void embed(const py::object& x, const py::tuple& sizes, bool quadrature, const py::object& logit_ranges,
           const py::tuple& shape, const py::tuple& weights, const py::tuple& outputs, int threads) {
  const Kernels& chosen = kernels();
  EmbedCall call = embed_call(x, sizes, quadrature, logit_ranges, shape, weights, threads);
  View* const to[] = {&call.tokens, &call.operand, &call.hidden, &call.r};
  views(outputs, to);
  py::gil_scoped_release release;
  chosen.embed(call);
}

// given: hidden, r, the cotangent of the tokens or of the features, and the operand to be written;
// gradients: of x and the eight weights
void embed_backward(const py::object& x, const py::tuple& sizes, bool quadrature, const py::object& logit_ranges,
                    const py::tuple& shape, const py::tuple& weights, const py::tuple& given,
                    const py::tuple& gradients, int threads) {
  const Kernels& chosen = kernels();
  EmbedCall call = embed_call(x, sizes, quadrature, logit_ranges, shape, weights, threads);
  View* const from[] = {&call.hidden, &call.r, &call.grad, &call.grad_features, &call.operand};
  views(given, from);
  View* const to[] = {&call.grad_x,  &call.grad_proj_w, &call.grad_proj_b, &call.grad_w1,     &call.grad_b1,
                      &call.grad_w2, &call.grad_b2,     &call.grad_sblu_w, &call.grad_fusion_w};
  views(gradients, to);
  py::gil_scoped_release release;
  chosen.embed_backward(call);
}

py::dict build_info() {
  py::dict info;
  info["version"] = AAPE_VERSION;
  info["compiler"] = compiler();
  info["architecture"] = architecture();
  info["cplusplus"] = static_cast<long>(__cplusplus);
  info["openmp"] = AAPE_OPENMP;
  info["instruction_sets"] = instruction_sets();
  info["narrow_products"] = narrow_products();
#if AAPE_CUDA
  info["kernels"] = py::make_tuple("cpu", "cuda");
  info["cuda"] = AAPE_CUDA_VERSION;
  info["cuda_architectures"] = AAPE_CUDA_ARCHITECTURES;
#else
  info["kernels"] = py::make_tuple("cpu");
#endif
  return info;
}

#if AAPE_CUDA
py::dict devices() {
  const cuda::Devices found = cuda::devices();
  py::dict out;
  out["error"] = found.error;
  out["driver"] = found.driver;
  out["runtime"] = found.runtime;
  out["capabilities"] = found.capabilities;
  return out;
}
#endif

}  // namespace
}  // namespace aape

PYBIND11_MODULE(_native, m) {
  using namespace aape;
  m.doc() = "Native kernels of aape_kernels. Tensors are trusted to fit: call them through aape_kernels.";
  m.def("build_info", &build_info,
        "How this module was built: version, compiler, architecture, C++ standard, the kernels it holds, the "
        "instruction sets of them that this machine runs, fastest first, the 16-bit types that it has matrix products "
        "of, and the GPU architectures.");
  m.def("instruction_set", &instruction_set,
        "The fastest instruction set that this module has and this machine runs, or the one that AAPE_CPU_ISA names.");
  m.def("sblu", &sblu);
  m.def("sblu_backward", &sblu_backward);
  m.def("embed", &embed);
  m.def("embed_backward", &embed_backward);
#if AAPE_CUDA
  py::module_ gpu = m.def_submodule("cuda", "Kernels for NVIDIA GPUs.");
  cuda::bind(gpu);
  gpu.def("devices", &devices, "What the driver says: error, CUDA versions, compute capabilities (10 · major + minor).");
#endif
}
