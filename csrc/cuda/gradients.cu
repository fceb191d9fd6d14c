// Gradients out of what one launch has left: every one a block of columns of a matrix product, or a sum over programs,
// copied into a tensor of its own, all of them together.

#include "api.h"
#include "divisor.cuh"

namespace aape {
namespace cuda {

constexpr int kElements = 32, kSlices = 8;  // of a block: a thread has one element, and its part of a sum's programs

struct GradientParams {
  struct One {
    Values from, to;
    int rows, columns, programs;
    int row, program;  // strides of `from`, in elements
    Divisor<int32_t> by_columns;
  } gradients[kMostGradients];
};

__global__ void __launch_bounds__(kElements* kSlices) gradients_kernel(const GradientParams p) {
  AAPE_DYN_SHARED(memory);
  float* parts = reinterpret_cast<float*>(memory);  // [slice][element]
  const GradientParams::One& one = p.gradients[blockIdx.y];
  const int lane = threadIdx.x % kElements, slice = threadIdx.x / kElements, count = one.rows * one.columns;
  const auto place = [&](int k) {
    const auto [row, column] = one.by_columns(k);
    return row * one.row + column;
  };
  if (one.programs == 1) {
    for (int k = blockIdx.x * blockDim.x + threadIdx.x; k < count; k += gridDim.x * blockDim.x) {
      store(one.to, k, load<float>(one.from, place(k)));
    }
    return;
  }
  for (int first = blockIdx.x * kElements; first < count; first += gridDim.x * kElements) {
    const int k = first + lane;
    float sum = 0;
    for (int n = slice; n < one.programs && k < count; n += kSlices) {
      sum += load<float>(one.from, n * one.program + place(k));
    }
    parts[slice * kElements + lane] = sum;
    __syncthreads();
    if (slice == 0 && k < count) {
      for (int n = 1; n < kSlices; ++n) sum += parts[n * kElements + lane];
      store(one.to, k, sum);
    }
    __syncthreads();
  }
}

void gradients(const std::vector<GradientCall>& calls, void* stream) {
  if (calls.size() > kMostGradients) throw std::runtime_error("embed_backward: too many gradients at once");
  GradientParams p = {};
  int64_t most = 1;
  for (size_t k = 0; k < calls.size(); ++k) {
    const GradientCall& call = calls[k];
    p.gradients[k] = {{call.from.data, call.from.type}, {call.to.data, call.to.type}, int(call.rows), int(call.columns),
                      int(call.programs), int(call.from.stride[1]), int(call.from.stride[0]),
                      Divisor<int32_t>(call.columns)};
    if (call.rows * call.columns > most) most = call.rows * call.columns;
  }
  const int64_t count = (most + kElements * kSlices - 1) / (kElements * kSlices);
  const dim3 grid(unsigned(count < 1024 ? count : 1024), unsigned(calls.size()));
  AAPE_LAUNCH("embed_backward", gradients_kernel, grid, dim3(kElements * kSlices),
              kElements * kSlices * sizeof(float), stream, p);
}

}  // namespace cuda
}  // namespace aape
