// The CPU kernels: one table of functions per instruction set.

#pragma once

#include "../calls.h"

namespace aape {

// The whole stem (docs/maths.md §3, §4), tokens = rows (B·N) in the order of the layout. Everything but x, `operand` and
// `grad_features` is contiguous, and all but these and `grad` in the arithmetic's type: proj_w (D, C·P_f·P_t),
// w1 (H, C·P_f·P_t), w2 (2S, H), sblu_w (S, C·P_f), fusion_w (D, planes·S). data is null for what is not there, or not
// wanted.
struct EmbedCall {
  Grid grid;
  Ranges ranges;
  int64_t planes = 2, dim = 0, hidden_units = 0;
  bool time_major = false;
  int threads = 1;
  View x, proj_w, proj_b, w1, b1, w2, b2, sblu_w, fusion_w;
  // Forward writes tokens (rows, D), or where the product is done elsewhere its operand [patch | features], rows as far
  // apart as stride[0] says; backward writes that too, if asked.
  View tokens, operand;
  View hidden, r;  // (rows, H) and (rows, 2S): written by forward, read by backward
  // Backward: the cotangent of the tokens (rows, D), or where the product is done elsewhere that of the features.
  View grad, grad_features;
  View grad_x, grad_proj_w, grad_proj_b, grad_w1, grad_b1, grad_w2, grad_b2, grad_sblu_w, grad_fusion_w;
};

struct Kernels {
  const char* name;
  void (*sblu)(const SbluCall&);
  void (*sblu_backward)(const SbluCall&);
  void (*embed)(const EmbedCall&);
  void (*embed_backward)(const EmbedCall&);
};

extern const Kernels kBaseline, kAvx2, kAvx512;

}  // namespace aape
