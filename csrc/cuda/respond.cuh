// What SBLU's kernels do with a projected tile: a state's gain, Horner's rule on a token's window, and what of it is stored.

#pragma once

#include "sblu.cuh"

namespace aape {
namespace cuda {

// A state's α and ω, and d/dr where they come from logits.
template <class T>
struct State {
  T decay, frequency, decay_slope, frequency_slope;
};

template <class T>
AAPE_DEVICE State<T> state_of(const Squash<T>& squash, T decay, T frequency) {
  State<T> state = {decay, frequency, T(1), T(1)};
  if (squash.logits) {
    T share = sigmoid<T>(decay);
    state.decay = squash.decay_low * exp<T>(share * squash.decay_log_ratio);
    state.decay_slope = state.decay * squash.decay_log_ratio * share * (T(1) - share);
    share = sigmoid<T>(frequency);
    state.frequency = fma(squash.band_width, share, squash.band_low);
    state.frequency_slope = squash.band_width * share * (T(1) - share);
  }
  return state;
}

template <class T, class IO, class I>
AAPE_DEVICE State<T> load_state(const SbluParams<T, IO, I>& p, const Tile<I>& t, I j, I s) {
  const I at = t.b * p.state_stride[0] + t.i * p.state_stride[1] + j * p.state_stride[2] + s * p.state_stride[3];
  return state_of(p.squash, p.decay[at], p.frequency[at]);
}

// A polynomial and its slope dP/dz, one step of the Horner run that carries both.
template <class T>
struct Jet {
  Complex<T> value = {0, 0}, slope = {0, 0};
  AAPE_DEVICE void add(const Complex<T>& z, T w) {
    slope = step<T>(slope, z, value);
    value = step<T>(value, z, w);
  }
};

// The parity as a constant on both ways, so that the series' terms are constants too.
template <class T, bool kDerivative>
AAPE_DEVICE Gain<T> gain_of(const State<T>& state, bool even) {
  return even ? gain<T, kDerivative>(state.decay, state.frequency, true)
              : gain<T, kDerivative>(state.decay, state.frequency, false);
}

// y from P±.
template <class T>
AAPE_DEVICE Complex<T> response(const Complex<T>& gamma, const Complex<T>& plus, const Complex<T>& minus,
                                bool quadrature) {
  Complex<T> y = gamma * plus;
  if (quadrature) y.im = (gamma * minus).im;
  return y;
}

template <class T, class IO, class I>
AAPE_DEVICE void store_response(const SbluParams<T, IO, I>& p, const Tile<I>& t, I j, I s, const Complex<T>& y) {
  const I to = t.b * p.y_stride[0] + t.i * p.y_stride[1] + j * p.y_stride[2] + s * p.y_stride[4];
  store(p.y, to, y.re);
  store(p.y, to + p.y_stride[3], y.im);
}

// All states of the token are in this warp; a lane without one gives s >= S.
template <class T, class IO, class I>
AAPE_DEVICE void store_features(const SbluParams<T, IO, I>& p, const Tile<I>& t, I j, int s, const Complex<T>& y) {
  const auto rows = [&](const Values& values, const I* stride) {
    return Features<I>{values, p.planes, t.b * stride[0] + t.i * stride[1] + j * stride[2], stride[3], stride[4]};
  };
  const I to = t.b * p.grad_y_stride[0] + t.i * p.grad_y_stride[1] + j * p.grad_y_stride[2];
  const LaneStates<true> states = {s, int(p.grid.states)};
  standardise_token<T>(
      states, rows(p.y, p.y_stride), rows(p.grad, p.grad_stride), [=](int) { return y; },
      [&](int own, const Complex<T>& grad_y) {
        p.grad_y[to + own * p.grad_y_stride[4]] = grad_y.re;
        p.grad_y[to + p.grad_y_stride[3] + own * p.grad_y_stride[4]] = grad_y.im;
      });
}

// Every thread folds the windows of its tokens and its state and runs Horner's rule on them.
template <class T, class IO, class I>
AAPE_DEVICE void respond(const SbluParams<T, IO, I>& p, const Tile<I>& t, const T* u) {
  const int lane = threadIdx.x % kLanes;
  const bool quadrature = p.grid.quadrature, even = p.grid.window % 2 == 0, standardised = p.planes != 2;
  const I states = p.grid.states;
  const bool there = t.state + lane < states;
  if (!there && !standardised) return;
  // a lane that is there only for the sums has something to read
  const I s = there ? t.state + lane : states - 1;
  for (int n = threadIdx.x / kLanes; n < t.count; n += kWarps) {
    const I j = t.first + n;
    const State<T> state = load_state(p, t, j, s);
    const Gain<T> g = gain_of<T, false>(state, even);
    const T* left = u + n * int(p.grid.stride_t) * kPitch + lane;
    const T* right = left + (int(p.grid.window) - 1) * kPitch;
    Complex<T> plus = {0, 0}, minus = {0, 0};
    for (int m = 0; m < int(p.grid.window) / 2; ++m, left += kPitch, right -= kPitch) {
      plus = step<T>(plus, g.z, *right + *left);
      if (quadrature) minus = step<T>(minus, g.z, *right - *left);
    }
    if (!even) {
      plus = step<T>(plus, g.z, *left);
      if (quadrature) minus = minus * g.z;
    }
    const Complex<T> y = response(g.gamma, plus, minus, quadrature);
    if (standardised) store_features(p, t, j, there ? int(s) : int(states), y);
    else store_response(p, t, j, s, y);
  }
}

}  // namespace cuda
}  // namespace aape
