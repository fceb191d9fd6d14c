// csrc/cuda as a Python module with the functions of aape_kernels._native.cuda, whose launches are written down. All of it
// at once: the headers take longer than what they are for.

#include "record.h"

#include "../../csrc/cuda/bindings.cpp"
#include "../../csrc/cuda/gather.cu"
#include "../../csrc/cuda/gradients.cu"
#include "../../csrc/cuda/overlap_add.cu"
#include "../../csrc/cuda/sblu_backward.cu"
#include "../../csrc/cuda/sblu_forward.cu"
#include "../../csrc/cuda/standardise.cu"
#include "../../csrc/cuda/stem.cu"
#include "../../csrc/cuda/warp_sblu.cu"
#include "../../csrc/cuda/warp_sblu_backward.cu"
#include "../../csrc/cuda/warp_stem.cu"
#include "../../csrc/cuda/warp_stem_backward.cu"
#include "../../csrc/cuda/warp_tokens.cu"

namespace aape {
namespace cuda {
void set_device(int) {}
}  // namespace cuda
}  // namespace aape

namespace py = pybind11;

PYBIND11_MODULE(recorded_launches, module) {
  using aape::recorder::launches;
  aape::cuda::bind(module);
  module.def("take", [] {
    py::list out;
    for (const auto& one : launches()) {
      const auto three = [](const dim3& d) { return py::make_tuple(d.x, d.y, d.z); };
      out.append(py::make_tuple(one.kernel, one.launcher, three(one.grid), three(one.block), one.shared,
                                py::bytes(one.parameters)));
    }
    launches().clear();
    return out;
  }, "The launches since the last time: (kernel, launcher, grid, block, shared bytes, parameters).");
  module.def("set_multiprocessors", [](int count) { aape::recorder::chip() = count; });
}
