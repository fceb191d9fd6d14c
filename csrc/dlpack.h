// Tensors as Python holds them, read by one C call each: the C exchange API of DLPack 1.3, its structs as far as they are
// used. torch's own getters go by way of Python, and behind a large call each takes a µs (benchmarks/NOTES.md).

#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "calls.h"

namespace aape {
namespace dlpack {

namespace py = pybind11;

// DLTensor: its shape and strides, in elements, are the tensor's own and live as long as it is not changed.
struct Tensor {
  void* data;
  int32_t device_type, device_index;
  int32_t axes;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

// DLPackExchangeAPI
struct Exchange {
  uint32_t major, minor;
  const Exchange* previous;  // of another major version
  void *allocate, *own, *wrap;
  int (*borrow)(void* object, Tensor* out);
  void* stream;
};

inline const Exchange& exchange() {
  // not by a static's initialisation, whose lock a thread could wait for that holds the GIL
  static const Exchange* found = nullptr;
  if (found) return *found;
  const py::object capsule = py::module_::import("torch").attr("Tensor").attr("__dlpack_c_exchange_api__");
  const auto* api = static_cast<const Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  while (api && api->major != 1) api = api->previous;
  if (!api || !api->borrow) throw std::runtime_error("expected a torch whose tensors DLPack 1.3 can read");
  return *(found = api);
}

inline Tensor borrow(const py::object& tensor) {
  Tensor out;
  if (exchange().borrow(tensor.ptr(), &out)) throw py::error_already_set();
  return out;
}

inline std::string text(const Tensor& tensor) {
  std::string out = "(";
  for (int axis = 0; axis < tensor.axes; ++axis) out += (axis ? ", " : "") + std::to_string(tensor.shape[axis]);
  return out + (tensor.axes == 1 ? ",)" : ")");
}

inline DType dtype(const Tensor& tensor) {
  constexpr int kFloat = 2, kBFloat = 4;  // of DLDataTypeCode
  const int bits = tensor.type_bits;
  if (tensor.type_code == kBFloat && bits == 16) return DType::kBFloat16;
  if (tensor.type_code == kFloat && bits == 16) return DType::kFloat16;
  if (tensor.type_code == kFloat && bits == 32) return DType::kFloat32;
  if (tensor.type_code == kFloat && bits == 64) return DType::kFloat64;
  throw py::type_error("expected a tensor of 16, 32 or 64 bits floating point");
}

}  // namespace dlpack
}  // namespace aape
