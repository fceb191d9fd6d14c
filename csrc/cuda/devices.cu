// Devices: which there are, or why not, and the current one.

#include "api.h"
#include "device.h"

namespace aape {
namespace cuda {

// PyTorch's guard has set it already, but for its own copy of the CUDA runtime.
void set_device(int index) {
  int now = -1;
  check(cudaGetDevice(&now), "device");
  if (now != index) check(cudaSetDevice(index), "device");
}

Devices devices() {
  Devices found;
  int count = 0;
  cudaRuntimeGetVersion(&found.runtime);
  cudaError_t status = cudaDriverGetVersion(&found.driver);
  if (status == cudaSuccess) status = cudaGetDeviceCount(&count);
  if (status == cudaErrorNoDevice) count = 0;
  else if (status != cudaSuccess) found.error = cudaGetErrorString(status);
  if (!found.error.empty()) count = 0;
  for (int device = 0; device < count; ++device) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    found.capabilities.push_back(10 * major + minor);
  }
  cudaGetLastError();  // not to be taken for that of the next launch
  return found;
}

}  // namespace cuda
}  // namespace aape
