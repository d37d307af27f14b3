// What the machine can do at most, measured with the instructions that the kernels use: how fast one thread reads memory,
// and how fast it multiplies. Benchmarks hold the kernels against these rates.
#pragma once

#include "panel.h"

namespace albireo {

// Reads memory as fast as one thread can; the result depends on every byte, so that no read can be left out.
inline uint64_t read_memory(const char *from, int64_t num_bytes) {
  constexpr int kStreams = 8;
  Words sums[kStreams] = {};
  for (int64_t i = 0; i + kStreams * 4 * kWidth <= num_bytes; i += kStreams * 4 * kWidth) {
    for (int line = 0; line < kStreams * 4 * kWidth; line += 64) __builtin_prefetch(from + i + line + kPrefetchBytes);
    for (int stream = 0; stream < kStreams; stream++) sums[stream] += load<Words>(from + i + stream * 4 * kWidth);
  }
  for (int stream = 1; stream < kStreams; stream++) sums[0] += sums[stream];
  uint64_t total = 0;
  for (int lane = 0; lane < kWidth; lane++) total += sums[0][lane];
  return total;
}

// Multiplies panels that stay in the first-level cache, as many rows at once as a kernel would take. Returns the number of
// multiplications, of which each also adds.
template <int kDtype>
inline int64_t multiply_in_cache(int64_t num_rounds) {
  constexpr int kRows = kIsa == ALBIREO_AMX && kDtype != ALBIREO_FLOAT32 ? 32 : kMaxRows<kDtype>;
  constexpr int64_t kGroups = 64, kInputs = kGroups * Types<kDtype>::kGroup;
  alignas(64) static thread_local typename Types<kDtype>::X x[kRows * kInputs];
  alignas(64) static thread_local char panel[kGroups * kGroupBytes];
  alignas(64) static thread_local typename Types<kDtype>::Sum out[kRows * kPanel];
#if ALBIREO_ISA == 3
  configure_tiles();
#endif
  for (int64_t round = 0; round < num_rounds; round++) {
    multiply<kDtype>(x, kInputs, kRows, panel, kGroups, nullptr, out, kPanel, false);
    asm volatile("" ::: "memory");  // every round counts
  }
  return num_rounds * kRows * kInputs * kPanel;
}

}  // namespace albireo
