// The native module. It links no libtorch: callers pass pointers, sizes and strides.

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

constexpr const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc";
#else
  return "unknown";
#endif
}

constexpr const char* architecture() {
#if defined(__x86_64__) || defined(_M_X64)
  return "x86_64";
#elif defined(__aarch64__) || defined(_M_ARM64)
  return "aarch64";
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict info;
  info["version"] = AAPE_VERSION;
  info["compiler"] = compiler();
  info["architecture"] = architecture();
  info["cplusplus"] = static_cast<long>(__cplusplus);
  info["kernels"] = py::tuple();
  return info;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of aape_kernels.";
  m.def("build_info", &build_info,
        "How this module was built: version, compiler, architecture, C++ standard, and the kernels it holds.");
}
