// A token's states in one warp: sums over them, and with these its features (docs/maths.md §4) and their adjoint. For all
// kernels that have the states of a token at once.

#pragma once

#include "../magnitudes.h"
#include "device.h"

namespace aape {
namespace cuda {

constexpr int kLanes = 32;
constexpr int kWarps = 8;  // of a block
constexpr int kThreads = kLanes * kWarps;

// Of all lanes, each of which has to come here; the same bits in each of them.
template <class T>
AAPE_DEVICE T lane_sum(T value) {
#pragma unroll
  for (int distance = kLanes / 2; distance; distance /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
  return value;
}

// What a lane has of one token's S states: its own, where kOne, of at most as many as there are lanes, else every 32nd. A lane
// without a state takes part in the sums.
template <bool kOne>
struct LaneStates {
  int lane, count;

  template <class Visit>
  AAPE_DEVICE void each(Visit visit) const {
    if (!kOne) {
      for (int s = lane; s < count; s += kLanes) visit(s);
    } else if (lane < count) {
      visit(lane);
    }
  }

  // value(s) as a function of s; where kOne asked for once.
  template <class T, class Value>
  AAPE_DEVICE auto kept(Value value) const {
    T own = 0;
    if (kOne) each([&](int s) { own = value(s); });
    return [=](int s) { return kOne ? own : value(s); };
  }

  // Over all S.
  template <class T, class Value>
  AAPE_DEVICE T mean(Value value) const {
    T sum = 0;
    each([&](int s) { sum += value(s); });
    return lane_sum(sum) * (T(1) / T(count));
  }
};

// One token's features or their cotangents: [n] with one plane, [Re y | Im y | n] with three; null where there are none.
template <class I>
struct Features {
  Values values;
  int planes;
  I at, plane, state;  // the first element, and element strides

  template <class T>
  AAPE_DEVICE T load(int k, int s) const {
    return aape::load<T>(values, at + k * plane + s * state);
  }
  template <class T>
  AAPE_DEVICE void store(int k, int s, T value) const {
    aape::store(values, at + k * plane + s * state, value);
  }
};

// n = (e − mean e)/σ, σ = sqrt(var e + floor)
template <class T>
struct Standard {
  T mean, inverse;  // mean e, 1/σ
  AAPE_DEVICE T n(T e) const { return (e - mean) * inverse; }
};

// Write the features of a token with responses y(s), and, where `grad` has their cotangents, give(s, that of y).
template <class T, class States, class I, class Y, class Give>
AAPE_DEVICE void standardise_token(const States& states, const Features<I>& out, const Features<I>& grad, Y y,
                                   Give give) {
  const auto level = states.template kept<T>([=](int s) { return log_magnitude<T>(y(s)); });
  const T mean = states.template mean<T>(level);
  const T variance = states.template mean<T>([&](int s) { return (level(s) - mean) * (level(s) - mean); });
  const Standard<T> standard = {mean, T(1) / Math<T>::sqrt(variance + T(kVarianceFloor))};
  if (out.values.data) {
    states.each([&](int s) {
      if (out.planes == 3) {
        out.store(0, s, y(s).re);
        out.store(1, s, y(s).im);
      }
      out.store(out.planes - 1, s, standard.n(level(s)));
    });
  }
  if (!grad.values.data) return;
  // ∂L/∂e = (ḡ − mean ḡ − n · mean(ḡ n))/σ
  const auto grad_n = states.template kept<T>([=](int s) { return grad.template load<T>(grad.planes - 1, s); });
  const T grad_mean = states.template mean<T>(grad_n);
  const T along = states.template mean<T>([&](int s) { return grad_n(s) * standard.n(level(s)); });
  states.each([&](int s) {
    const T grad_e = fma(-standard.n(level(s)), along, grad_n(s) - grad_mean) * standard.inverse;
    const Complex<T> slope = log_magnitude_slope<T>(y(s));
    Complex<T> direct = {0, 0};
    if (grad.planes == 3) direct = {grad.template load<T>(0, s), grad.template load<T>(1, s)};
    give(s, Complex<T>{fma(grad_e, slope.re, direct.re), fma(grad_e, slope.im, direct.im)});
  });
}

}  // namespace cuda
}  // namespace aape
