// What the kernels take, on every device: pointers, sizes and element strides.

#pragma once

#include <cstdint>

#include "grid.h"

namespace aape {

enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

// A tensor of up to five axes, strides in elements.
struct View {
  char* data = nullptr;
  int64_t stride[5] = {0, 0, 0, 0, 0};
  DType type = DType::kFloat32;
};

// With logits, `decay` and `frequency` hold the Lambda Encoder's r, squashed here into the ranges.
struct Ranges {
  bool logits = false;
  double decay_low = 0, decay_log_ratio = 0, band_low = 0, band_width = 0;
};

// x (B, C, F, T); decay, frequency (B, N_f, N_t, S); weight (S, C, P_f); y, grad_y (B, N_f, N_t, 2, S).
// decay, frequency, weight and all gradients are float32, or float64 where x is.
//
// Forward, y may instead be the stem's features (docs/maths.md §4): n with one plane, Re y, Im y and n with three. Where
// their cotangent `grad_features` (B, N_f, N_t, planes, S) is given, that of Re y and Im y is written to grad_y.
struct SbluCall {
  Grid grid;
  Ranges ranges;
  int64_t planes = 2;  // of y and of grad_features
  View x, decay, frequency, weight;
  // Forward, unless data is null; on a GPU also backward, where the responses come with the derivatives for nothing.
  View y;
  View grad_features;
  View grad_y, grad_x, grad_decay, grad_frequency, grad_weight;  // backward; data is null where not needed
  int threads = 1;  // of the CPU
};

// On a GPU: patches (B, N_f, N_t, C·P_f·P_t); fastest where the last axis is contiguous.
struct GatherCall {
  Grid grid;
  View x, patches;
  int threads = 1;  // of the CPU
};

// The stem's prologue, on a GPU: r = W2 · SiLU(hidden) + b2, hidden = W1 · vec(patch) + b1, and the operand
// [patch | features] of the product that makes the tokens; of planes other than 0, the patches alone, and 2 there can be
// up to 32 states. Rows are tokens, in the order of the layout; hidden (rows, H) and r (rows, 2S) and the weights are
// contiguous, in the arithmetic's type.
struct StemCall {
  Grid grid;
  Ranges ranges;
  int64_t hidden_units = 0;
  int64_t planes = 2;
  bool time_major = false;
  View x;                               // (B, C, F, T)
  View w1, b1, w2, b2, weight;          // (H, C·P_f·P_t), (H), (2S, H), (2S), (S, C·P_f)
  View operand, hidden, r;              // operand (rows, C·P_f·P_t + planes·S): its rows' stride, and any type
};

// The whole stem on tensor cores: tokens (rows, D), contiguous, from the operand, which only has a type, that of the tokens, and
// is not written; projection (D, C·P_f·P_t), bias (D) or null and fusion (D, planes·S), contiguous, of any type but float64.
struct TokensCall : StemCall {
  int64_t dim = 0;  // D
  View projection, bias, fusion, tokens;
  char* packed = nullptr;
};

// The stem's backward on tensor cores, where `warp_stem` ran: from `grad`, the features' cotangent (rows, planes·S),
// contiguous, to grad_encoder (rows, 2S + H), the cotangents of r and hidden, both in the operand's type; to grad_y
// (rows, 2S), unless data is null, and to partial (programs, S, C·P_f), whose sum over programs is the projection's gradient,
// in float32. The operand is written again, with more columns: from `one` a column of ones, and zeros; from `active`
// SiLU(hidden).
struct StemGradientCall : StemCall {
  int64_t one = 0, active = 0;
  View grad, grad_encoder, grad_y, partial;
};

// One gradient to be copied on a GPU: from (programs, rows, columns), columns contiguous, summed over programs, to
// (rows, columns), contiguous; of any types but float64.
struct GradientCall {
  int64_t programs = 1, rows = 0, columns = 0;
  View from, to;
};

// The stem's features of y, for one plane and for three, on a GPU. y (tokens, 2, S) is contiguous, in the arithmetic's
// type; features and their cotangent (tokens, planes, S) of any type, null where not needed. With the cotangent, that of y
// is written over y.
struct StandardiseCall {
  int64_t tokens = 0, states = 0, planes = 1;
  View y, features, grad_features;
};

// Sum windows into pixels, on a GPU: windows (B, N_f, tiles, C·P_f, length or more), the last axis contiguous, in the
// arithmetic's type; tile m of a subband begins at frame m · tile · S_t + offset. out (B, C, F, T), written or added to.
struct OverlapAddCall {
  Grid grid;
  int64_t tile = 1, length = 0, offset = 0;
  bool add = false;
  View windows, out;
};

}  // namespace aape
