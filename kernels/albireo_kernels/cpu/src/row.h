// One row's logits, or a rank's part of them, and the order of its tokens.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "albireo_cpu.h"
#include "vector.h"
#include "worker.h"

namespace albireo {
namespace sampling {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr int32_t kNoToken = std::numeric_limits<int32_t>::max();
inline constexpr int kChunk = 64;        // logits that share one maximum
inline constexpr int kBuckets = 4096;    // of a histogram

typedef float HalfFloats __attribute__((vector_size(2 * kWidth)));  // half as many as Floats
typedef double Doubles __attribute__((vector_size(4 * kWidth)));    // as many as HalfFloats
typedef uint64_t LongWords __attribute__((vector_size(4 * kWidth)));

static_assert(kChunk % kWidth == 0);

// The tokens from first_id on.
struct Row {
  float *logits;
  int32_t first_id, num_ids;
  float temperature;
  int32_t top_k;  // 0: all
  double top_p;   // 1: all
  double min_p;   // 0: all
  uint32_t k0, k1;
};

// The last survivor: tokens of larger values survive too, and of equal values those of lower ids.
struct Cut {
  float value;
  int32_t id;
};
inline constexpr Cut kNoCut = {-kInfinity, kNoToken};

// The token of the largest score, the first of them; -inf: there is none.
struct Best {
  float score;
  int32_t id;
};
inline constexpr Best kNone = {-kInfinity, kNoToken};

inline Best better(Best a, Best b) {
  if (a.score != b.score) return a.score > b.score ? a : b;
  return a.id < b.id ? a : b;
}

// A thread's memory.
struct Scratch {
  uint64_t *keys;     // candidates: all of a row, or all ranks'
  double *histogram;  // [kBuckets + 1], the last one for tokens that do not count
  float *maxima;      // [chunks]
  float *ranked;      // [chunks], the same, in another order
};

inline int64_t num_chunks(int32_t num_ids) { return ((int64_t)num_ids + kChunk - 1) / kChunk; }

// Where the parts of a thread's memory begin, each at a whole number of cache lines.
struct Layout {
  int64_t histogram, maxima, ranked, end;
  explicit Layout(int32_t vocab_size) {
    const auto padded = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
    const int64_t num_keys = std::max<int64_t>(vocab_size, ALBIREO_MAX_RANKS * ALBIREO_MAX_CANDIDATES);
    histogram = padded(num_keys * (int64_t)sizeof(uint64_t));
    maxima = histogram + padded((kBuckets + 1) * sizeof(double));
    ranked = maxima + padded(num_chunks(vocab_size) * sizeof(float));
    end = ranked + padded(num_chunks(vocab_size) * sizeof(float));
  }
};

inline Scratch scratch_of(const AlbireoScratch &scratch, const Worker &worker) {
  char *base = (char *)scratch.data + worker.index * scratch.bytes;
  const Layout at(scratch.vocab_size);
  return {(uint64_t *)base, (double *)(base + at.histogram), (float *)(base + at.maxima), (float *)(base + at.ranked)};
}

// ---- Vectors

inline Ints lane_ids() {
  Ints ids;
  for (int i = 0; i < kWidth; i++) ids[i] = i;
  return ids;
}

// One bit per lane of a comparison's result.
inline uint32_t lane_bits(Ints mask) {
#if defined(__AVX512F__) && ALBIREO_ISA >= 2
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX2__) && ALBIREO_ISA < 2
  return (uint32_t)_mm256_movemask_ps((__m256)mask);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kWidth; i++) bits |= (uint32_t)(mask[i] & 1) << i;
  return bits;
#endif
}

// e^x to about 1e-15, for -700 <= x <= 0. Anything else gives anything.
inline Doubles exp_exactly(Doubles x) {
  const double magic = 6755399441055744.0;  // 1.5 * 2^52: rounds to an integer, which the low bits then are
  const Doubles shifted = x * 1.4426950408889634 + magic;
  const Doubles whole = shifted - magic;
  const Doubles r = (x - whole * 0x1.62e42feep-1) - whole * 0x1.a39ef35793c76p-33;  // log(2) in two parts
  // Taylor's series up to r^12; |r| <= log(2) / 2.
  Doubles p = r * (1.0 / 479001600) + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  return (Doubles)((LongWords)p + ((LongWords)shifted << 52));
}

// ---- Reading a row

// The 64 logits from `begin` on. The last chunk is completed with NaN in `padded`: no values.
inline const float *chunk_at(const Row &row, int64_t begin, float *padded) {
  const int64_t count = row.num_ids - begin;
  if (count >= kChunk) return row.logits + begin;
  std::copy_n(row.logits + begin, count, padded);
  std::fill(padded + count, padded + kChunk, std::numeric_limits<float>::quiet_NaN());
  return padded;
}

// The largest values of a chunk, in any lane; -inf where there are none. (NaN is not larger than anything.)
inline Floats chunk_max(const float *chunk) {
  Floats most = splat(-kInfinity);
  for (int i = 0; i < kChunk; i += kWidth) most = max(load<Floats>(chunk + i), most);
  return most;
}

// The token ids of the vector that begins at a place of the row.
inline Ints ids_at(const Row &row, int64_t place) { return lane_ids() + (row.first_id + (int32_t)place); }

inline Floats scaled(const Row &row, Floats logits) { return logits / splat(row.temperature); }

// Sets the largest scaled value of every chunk, and returns that of the row. Division keeps the order of values, so one
// for each chunk is enough.
inline float find_maxima(const Row &row, float *maxima) {
  alignas(64) float padded[kChunk];
  float most = -kInfinity;
  for (int64_t begin = 0; begin < row.num_ids; begin += kChunk) {
    const float chunk_most = largest(chunk_max(chunk_at(row, begin, padded))) / row.temperature;
    const float value = chunk_most == chunk_most ? chunk_most : -kInfinity;  // inf / inf
    maxima[begin / kChunk] = value;
    most = std::max(most, value);
  }
  return most;
}

// ---- Order: by value descending, then by id ascending

// Ascending keys are tokens in order; -0 equals 0.
inline uint64_t key_of(float value, int32_t id) {
  const int32_t bits = std::bit_cast<int32_t>(value + 0.0f);
  const int32_t ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF);
  return (uint64_t)((uint32_t)ascending ^ 0x7FFFFFFFu) << 32 | (uint32_t)id;
}

inline float value_of(uint64_t key) {
  const int32_t ascending = (int32_t)((uint32_t)(key >> 32) ^ 0x7FFFFFFFu);
  return std::bit_cast<float>(ascending ^ ((ascending >> 31) & 0x7FFFFFFF));
}

inline int32_t id_of(uint64_t key) { return (int32_t)(uint32_t)key; }

}  // namespace sampling
}  // namespace albireo
