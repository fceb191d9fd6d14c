// The CPU kernels: one table of functions per instruction set.

#pragma once

#include "../calls.h"

namespace aape {

struct Kernels {
  const char* name;
  void (*sblu)(const SbluCall&);
  void (*sblu_backward)(const SbluCall&);
  void (*gather)(const GatherCall&);
};

extern const Kernels kBaseline, kAvx2, kAvx512;

}  // namespace aape
