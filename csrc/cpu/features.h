// The stem's features of one token, n from the responses of its states (docs/maths.md §4), and their cotangents.

#pragma once

#include "../magnitudes.h"
#include "tile.h"

namespace aape {
inline namespace AAPE_NAMESPACE {

// n_s = (e_s − mean e)/σ, σ = sqrt(var e + floor). Rows of states are padded to whole vectors; lanes beyond S count for
// nothing, whatever is in them.
template <class T>
class Standardiser {
  using V = typename Simd<T>::Vector;
  using M = Math<V>;
  static constexpr int kLanes = Simd<T>::kLanes;

 public:
  Standardiser(int64_t states, int64_t padded)
      : n_(padded), inside_(padded), padded_(padded), share_(T(1) / T(states)) {
    for (int64_t s = 0; s < padded; ++s) inside_[s] = T(s < states);
  }

  const T* n() const { return n_.data; }

  void forward(const T* re, const T* im) {
    V sum = {};
    for (int64_t s = 0; s < padded_; s += kLanes) {
      const V e = log_magnitude<V>({M::load(re + s), M::load(im + s)});
      M::store(n_.data + s, e);
      sum += M::select(within(s), e, V{});
    }
    const T mean = total(sum) * share_;
    V squares = {};
    for (int64_t s = 0; s < padded_; s += kLanes) {
      const V centred = M::select(within(s), M::load(n_.data + s) - mean, V{});
      M::store(n_.data + s, centred);
      squares += centred * centred;
    }
    inverse_ = T(1) / std::sqrt(total(squares) * share_ + T(kVarianceFloor));
    for (int64_t s = 0; s < padded_; s += kLanes) M::store(n_.data + s, M::load(n_.data + s) * inverse_);
  }

  // Adds to the cotangents of Re y and Im y what comes through n; after `forward` of the same re and im.
  // ∂L/∂e = (ḡ − mean ḡ − n · mean(ḡ n))/σ
  void backward(const T* grad_n, const T* re, const T* im, T* grad_re, T* grad_im) const {
    V sum = {}, product = {};
    for (int64_t s = 0; s < padded_; s += kLanes) {
      const V grad = M::select(within(s), M::load(grad_n + s), V{});
      sum += grad;
      product += grad * M::load(n_.data + s);
    }
    const T mean = total(sum) * share_, along = total(product) * share_;
    for (int64_t s = 0; s < padded_; s += kLanes) {
      const V grad_e = (M::load(grad_n + s) - mean - M::load(n_.data + s) * along) * inverse_;
      const auto slope = log_magnitude_slope<V>({M::load(re + s), M::load(im + s)});
      M::store(grad_re + s, M::load(grad_re + s) + grad_e * slope.re);
      M::store(grad_im + s, M::load(grad_im + s) + grad_e * slope.im);
    }
  }

 private:
  typename M::Mask within(int64_t s) const { return M::load(inside_.data + s) != T(0); }

  static T total(V sum) {
    T lanes[kLanes], all = 0;
    M::store(lanes, sum);
    for (int k = 0; k < kLanes; ++k) all += lanes[k];
    return all;
  }

  Buffer<T> n_, inside_;
  int64_t padded_;
  T share_, inverse_ = 0;
};

}  // namespace AAPE_NAMESPACE
}  // namespace aape
