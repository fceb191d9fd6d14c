// Where processors of one instruction set were measured to differ (benchmarks/NOTES.md, "An Intel processor"): Intel's
// Emerald Rapids and AMD's Zen 5.

#pragma once

#include <unistd.h>

#include <cstdint>

#include "../sblu.h"

namespace aape {
inline namespace AAPE_NAMESPACE {

// The vendor is Intel, whatever the core.
inline bool is_intel() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

// A core's second-level cache is of 2 MiB or more.
inline bool has_large_second_cache() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const bool large = sysconf(_SC_LEVEL2_CACHE_SIZE) >= 2 << 20;
  return large;
#else
  return false;
#endif
}

}  // namespace AAPE_NAMESPACE
}  // namespace aape
