// csrc/cuda compiled for the CPU, as a Python module with the functions of aape_kernels._native.cuda.

#include "emulator.h"

#include <pybind11/pybind11.h>

#include "../../csrc/cuda/api.h"
#include "../../csrc/cuda/bindings.h"

namespace aape {
namespace cuda {
void set_device(int) {}
}  // namespace cuda
}  // namespace aape

// Compiled with a name of its own for every copy of the sources: pybind11 keeps one module of a name.
PYBIND11_MODULE(AAPE_MODULE, module) {
  aape::cuda::bind(module);
  module.def("set_order", [](int order, unsigned seed) {
    aape::emulator::turns() = {static_cast<aape::emulator::Order>(order), seed};
  }, "How the threads of a block take turns: 0 forward, 1 reverse, 2 shuffled by `seed`.");
  module.def("set_multiprocessors", [](int count) { aape::emulator::chip() = count; }, "How many the chip has.");
}
