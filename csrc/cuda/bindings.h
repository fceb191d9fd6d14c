#pragma once

#include <pybind11/pybind11.h>

namespace aape {
namespace cuda {

// The kernels as functions of `module`.
void bind(pybind11::module_& module);

}  // namespace cuda
}  // namespace aape
