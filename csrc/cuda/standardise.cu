// The stem's features out of responses in memory, for more states than a warp has lanes: a warp for each token.

#include "api.h"
#include "warp.cuh"

namespace aape {
namespace cuda {

template <class T>
struct StandardiseParams {
  int64_t tokens;
  int states, planes;
  T* y;  // (tokens, 2, S)
  Values out, grad;
  int64_t out_stride[3], grad_stride[3];
};

template <class T>
__global__ void __launch_bounds__(kThreads) standardise_kernel(const StandardiseParams<T> p) {
  const int64_t token = int64_t(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  if (token >= p.tokens) return;
  const LaneStates<false> states = {int(threadIdx.x % kLanes), p.states};
  const auto rows = [&](const Values& values, const int64_t* stride) {
    return Features<int64_t>{values, p.planes, token * stride[0], stride[1], stride[2]};
  };
  T *re = p.y + token * 2 * p.states, *im = re + p.states;
  standardise_token<T>(
      states, rows(p.out, p.out_stride), rows(p.grad, p.grad_stride), [=](int s) { return Complex<T>{re[s], im[s]}; },
      [=](int s, const Complex<T>& grad_y) {
        re[s] = grad_y.re;
        im[s] = grad_y.im;
      });
}

template <class T>
void launch_standardise(const StandardiseCall& call, void* stream) {
  StandardiseParams<T> p = {};
  p.tokens = call.tokens;
  p.states = int(call.states);
  p.planes = int(call.planes);
  p.y = reinterpret_cast<T*>(call.y.data);
  p.out = {call.features.data, call.features.type};
  p.grad = {call.grad_features.data, call.grad_features.type};
  for (int axis = 0; axis < 3; ++axis) {
    p.out_stride[axis] = call.features.stride[axis];
    p.grad_stride[axis] = call.grad_features.stride[axis];
  }
  AAPE_LAUNCH("standardise", (standardise_kernel<T>), dim3(blocks((p.tokens + kWarps - 1) / kWarps, "standardise")),
              dim3(kThreads), size_t(0), stream, p);
}

void standardise(const StandardiseCall& call, void* stream) {
  if (call.y.type == DType::kFloat64) launch_standardise<double>(call, stream);
  else launch_standardise<float>(call, stream);
}

}  // namespace cuda
}  // namespace aape
