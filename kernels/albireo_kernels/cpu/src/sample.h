// Draws one token per sampling row. What a draw means is defined in ../../reference/sampling.py.
//
// Nothing here sorts a vocabulary. A row is read in chunks of 64 logits, and takes one of four routes:
//
// - Greedy: the largest logit.
// - Unfiltered: the largest sum of scaled logit and Gumbel noise. Two logarithms per token would be the cost of it, but
//   cheap upper bounds of the noise show for nearly all tokens that they cannot beat the best one so far.
// - A small top-k: the k-th largest of all chunks' maxima is a lower bound of the k-th largest value, and few more than
//   k values reach it. They are collected and the best k of them selected; top-p and noise then concern only those.
// - All else: a histogram of the values' distances from the largest one, of counts for top-k and of masses for top-p.
//   It shows the narrow range of values in which the last survivor lies; only those are collected and put into order.
//   The last survivor is the `Cut`, and the draw is as in the unfiltered route, among the tokens not behind it.
//
// Logits are compared after they have been divided by the temperature: different ones may become equal, and then their
// ids decide. NaN is no value here: it never survives, and a row without values draws token 0.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>

#include "albireo_cpu.h"
#include "vector.h"
#include "worker.h"

namespace albireo {
namespace sampling {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kMinTemperature = 1e-5f;  // below it a row is greedy
inline constexpr int kChunk = 64;                // logits that share one maximum
inline constexpr float kMostNoise = 22.9f;       // no noise is larger: -log(2^-33) is 22.87
// Tokens so far behind the best one are not counted. All of them together have less than 2^32 * e^-64 = 7e-19 of its
// mass, and none can be drawn: noise differs by no more than 25.7.
inline constexpr int kReach = 64;
inline constexpr int kBuckets = 4096;     // the histogram's, over kReach
inline constexpr int64_t kSortable = 2048;  // so many tokens are sorted rather than divided further

typedef float HalfFloats __attribute__((vector_size(2 * kWidth)));  // half as many as Floats
typedef double Doubles __attribute__((vector_size(4 * kWidth)));    // as many as HalfFloats
typedef uint64_t LongWords __attribute__((vector_size(4 * kWidth)));

static_assert(kChunk % kWidth == 0);

struct Row {
  float *logits;
  int32_t vocab_size;
  float temperature;
  int32_t top_k;  // 0: all
  double top_p;   // 1: all
  uint32_t k0, k1;
};

// The last survivor: tokens of larger values survive too, and of equal values those of lower ids.
struct Cut {
  float value;
  int32_t id;
};
inline constexpr Cut kNoCut = {-kInfinity, std::numeric_limits<int32_t>::max()};

// A thread's memory.
struct Scratch {
  uint64_t *keys;     // [vocab_size], candidates
  double *histogram;  // [kBuckets + 1], the last one for tokens that do not count
  float *maxima;      // [chunks]
  float *ranked;      // [chunks], the same, in another order
};

inline int64_t num_chunks(int32_t vocab_size) { return ((int64_t)vocab_size + kChunk - 1) / kChunk; }

// Where the parts of a thread's memory begin, each at a whole number of cache lines.
struct Layout {
  int64_t histogram, maxima, ranked, end;
  explicit Layout(int32_t vocab_size) {
    const auto padded = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
    histogram = padded(vocab_size * (int64_t)sizeof(uint64_t));
    maxima = histogram + padded((kBuckets + 1) * sizeof(double));
    ranked = maxima + padded(num_chunks(vocab_size) * sizeof(float));
    end = ranked + padded(num_chunks(vocab_size) * sizeof(float));
  }
};

inline Scratch scratch_of(const AlbireoSample &op, const Worker &worker) {
  char *base = (char *)op.scratch + worker.index * op.scratch_bytes;
  const Layout at(op.vocab_size);
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

// ---- Noise

// How x = 2^k * m comes apart, for positive normal numbers; m lies in [sqrt(1/2), sqrt(2)).
inline Ints exponent_of(Floats x) { return ((Ints)x - 0x3F3504F3) >> 23; }

// k * log(2) + log(1 + f), for 1 + f in [sqrt(1/2), sqrt(2)). The series is f - f^2 / 2 + f^3 * P(f), with a P that was
// fitted to the least relative error of log(1 + f) (3e-9).
inline Floats log_of(Ints k, Floats f) {
  const Floats times = __builtin_convertvector(k, Floats);
  Floats p = splat(0.0674663857f);
  p = p * f - 0.116756514f;
  p = p * f + 0.118881628f;
  p = p * f - 0.124055892f;
  p = p * f + 0.142195523f;
  p = p * f - 0.166679963f;
  p = p * f + 0.200021192f;
  p = p * f - 0.250000089f;
  p = p * f + 0.333333135f;
  const Floats square = f * f;
  const Floats tail = (square * f * p + times * 1.42860677e-6f) - 0.5f * square;
  return (tail + f) + times * 0.693145752f;  // log(2) in two parts, the larger of 15 bits: this product is exact
}

inline Floats log(Floats x) {
  const Ints k = exponent_of(x);
  return log_of(k, (Floats)((Ints)x - (k << 23)) - 1.0f);
}

// log(1 - v) for 0 < v < 1. With 1 - v = 2^k * (1 + f), f = (2^-k - 1) - 2^-k * v, of which only the last difference
// rounds: nothing of a small v is lost.
inline Floats log1p_minus(Floats v) {
  const Ints k = exponent_of(1.0f - v);
  const Floats scale = (Floats)((127 - k) << 23);
  return log_of(k, (scale - 1.0f) - scale * v);
}

inline Words mix(Words h) {
  h = (h ^ h >> 16) * 0x85EBCA6Bu;
  h = (h ^ h >> 13) * 0xC2B2AE35u;
  return h ^ h >> 16;
}

// The uniform numbers v in (0, 1) that the noise of token ids is made of.
inline Floats uniform(const Row &row, Ints ids) {
  const Words h = mix(mix(((Words)ids * 0x9E3779B9u) ^ row.k0) + row.k1);
  // To the nearest float32: both halves are exact, and only their sum rounds.
  const Floats high = __builtin_convertvector((Ints)(h >> 16), Floats);
  const Floats low = __builtin_convertvector((Ints)(h & 0xFFFF), Floats);
  const Floats v = ((high * 65536.0f + low) + 0.5f) * 0x1p-32f;
  return min(v, splat(1.0f - 0x1p-24f));
}

inline Floats gumbel(Floats v) { return -log(-log1p_minus(v)); }

// At least the noise of v: -log1p(-v) >= v, hence noise <= -log(v), and log2(v) >= exponent + fraction, which is what
// its bits say. The margin is larger than what all the roundings add up to.
inline Floats noise_bound(Floats v) {
  const float log_2 = 0.693147182f;
  return __builtin_convertvector((Ints)v, Floats) * (-log_2 * 0x1p-23f) + (127 * log_2 + 1e-3f);
}

// ---- Reading a row

// The 64 logits from `begin` on. The last chunk is completed with NaN in `padded`: no values.
inline const float *chunk_at(const Row &row, int64_t begin, float *padded) {
  const int64_t count = row.vocab_size - begin;
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

inline Floats scaled(const Row &row, Floats logits) { return logits / splat(row.temperature); }

// Sets the largest scaled value of every chunk, and returns that of the row. Division keeps the order of values, so one
// for each chunk is enough.
inline float find_maxima(const Row &row, float *maxima) {
  alignas(64) float padded[kChunk];
  float most = -kInfinity;
  for (int64_t begin = 0; begin < row.vocab_size; begin += kChunk) {
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

// What top-k and top-p add up: tokens, or their mass relative to that of the largest value.
enum class Measure { kCount, kMass };

template <Measure kMeasure>
inline double measure(uint64_t key, double largest) {
  return kMeasure == Measure::kCount ? 1.0 : std::exp((double)value_of(key) - largest);
}

template <Measure kMeasure>
inline double measure(const uint64_t *keys, int64_t count, double largest) {
  double total = 0;
  for (int64_t i = 0; i < count; i++) total += measure<kMeasure>(keys[i], largest);
  return total;
}

// How many tokens, given in order, it takes to reach the limit; all where it is not reached. At least 1. The conditions
// are such that NaN, of infinite values, counts as reached.
template <Measure kMeasure>
inline int64_t prefix(const uint64_t *keys, int64_t count, double before, double limit, double largest) {
  for (int64_t i = 0; i < count; i++) {
    before += measure<kMeasure>(keys[i], largest);
    if (!(before < limit)) return i + 1;
  }
  return count;
}

// The token with which the limit is reached; keys come in any order and change theirs. Halves them around the median
// until sorting is cheap.
template <Measure kMeasure>
inline Cut reach(uint64_t *keys, int64_t count, double before, double limit, double largest) {
  while (count > kSortable) {
    const int64_t half = count / 2;
    std::nth_element(keys, keys + half, keys + count);
    const double after = before + measure<kMeasure>(keys, half, largest);
    if (after < limit) {
      before = after;
      keys += half;
      count -= half;
    } else {
      count = half;
    }
  }
  std::sort(keys, keys + count);
  const uint64_t last = keys[prefix<kMeasure>(keys, count, before, limit, largest) - 1];
  return {value_of(last), id_of(last)};
}

// ---- Routes

// The first of the largest logits.
inline int32_t draw_greedy(const Row &row) {
  alignas(64) float padded[kChunk];
  // In each lane, the largest value and the first chunk that has it.
  Floats most = splat(-kInfinity);
  Ints where = {};
  for (int64_t begin = 0; begin < row.vocab_size; begin += kChunk) {
    const Floats values = chunk_max(chunk_at(row, begin, padded));
    const Ints more = values > most;
    most = max(values, most);
    where = (where & ~more) | (splat((int32_t)begin) & more);
  }
  const float value = largest(most);
  int32_t begin = std::numeric_limits<int32_t>::max();
  for (int i = 0; i < kWidth; i++) {
    if (most[i] == value) begin = std::min(begin, (int32_t)where[i]);
  }
  for (int32_t id = begin; id < row.vocab_size; id++) {
    if (row.logits[id] == value) return id;
  }
  return 0;  // all are NaN
}

// The first of the largest sums of value and noise, among the survivors of a cut.
inline int32_t draw(const Row &row, Cut cut) {
  alignas(64) float padded[kChunk], scores[kWidth];
  float best = -kInfinity;
  int32_t best_id = 0;
  // Ids ascend, so that an equal score is no better. Bounds hold exactly: rounded sums keep the order of what is added.
  for (int64_t begin = 0; begin < row.vocab_size; begin += kChunk) {
    const float *chunk = chunk_at(row, begin, padded);
    if (!lane_bits(scaled(row, chunk_max(chunk)) + kMostNoise > best)) continue;
    for (int at = 0; at < kChunk; at += kWidth) {
      const Ints ids = lane_ids() + (int32_t)(begin + at);
      const Floats values = scaled(row, load<Floats>(chunk + at));
      const Floats v = uniform(row, ids);
      const Ints survives = (values > cut.value) | ((values == cut.value) & (ids <= cut.id));
      if (!lane_bits((values + noise_bound(v) > best) & survives)) continue;
      store(scores, select(survives, values + gumbel(v), splat(-kInfinity)));
      for (int i = 0; i < kWidth; i++) {
        if (scores[i] > best) {
          best = scores[i];
          best_id = (int32_t)(begin + at + i);
        }
      }
    }
  }
  return best_id;
}

// As `draw`, among few tokens, in any order.
inline int32_t draw_among(const Row &row, const uint64_t *keys, int64_t count) {
  float best = -kInfinity;
  int32_t best_id = id_of(keys[0]);
  for (int64_t begin = 0; begin < count; begin += kWidth) {
    const int lanes = (int)std::min<int64_t>(kWidth, count - begin);
    Ints ids = {};
    for (int i = 0; i < lanes; i++) ids[i] = id_of(keys[begin + i]);
    const Floats noise = gumbel(uniform(row, ids));
    for (int i = 0; i < lanes; i++) {
      const float score = value_of(keys[begin + i]) + noise[i];
      if (score > best || (score == best && ids[i] < best_id)) {
        best = score;
        best_id = ids[i];
      }
    }
  }
  return best_id;
}

// The best top_k tokens, in any order; fewer where the row has no more values. top_k chunks must exist.
inline int64_t find_top_k(const Row &row, const Scratch &scratch) {
  const int64_t chunks = num_chunks(row.vocab_size);
  find_maxima(row, scratch.maxima);
  // The k-th largest maximum: k chunks have a value that is not below it. Values above it lie in fewer than k chunks,
  // and of those that are equal the first k are enough, so that candidates stay few even where all values are equal.
  std::copy_n(scratch.maxima, chunks, scratch.ranked);
  std::nth_element(scratch.ranked, scratch.ranked + row.top_k - 1, scratch.ranked + chunks, std::greater<float>());
  const float bound = scratch.ranked[row.top_k - 1];
  alignas(64) float padded[kChunk], values[kWidth];
  int64_t count = 0;
  int32_t num_equal = 0;
  for (int64_t begin = 0; begin < row.vocab_size; begin += kChunk) {
    if (scratch.maxima[begin / kChunk] < bound) continue;
    const float *chunk = chunk_at(row, begin, padded);
    for (int at = 0; at < kChunk; at += kWidth) {
      const Floats here = scaled(row, load<Floats>(chunk + at));
      uint32_t lanes = lane_bits(here >= bound);
      if (!lanes) continue;
      store(values, here);
      for (; lanes; lanes &= lanes - 1) {
        const int i = std::countr_zero(lanes);
        if (values[i] == bound && num_equal++ >= row.top_k) continue;
        scratch.keys[count++] = key_of(values[i], (int32_t)(begin + at + i));
      }
    }
  }
  if (count <= row.top_k) return count;
  std::nth_element(scratch.keys, scratch.keys + row.top_k, scratch.keys + count);
  return row.top_k;
}

inline int32_t draw_top_k(const Row &row, const Scratch &scratch) {
  uint64_t *keys = scratch.keys;
  int64_t count = find_top_k(row, scratch);
  if (count == 0) return 0;
  if (row.top_p < 1) {
    std::sort(keys, keys + count);
    const double largest = value_of(keys[0]);
    const double limit = row.top_p * measure<Measure::kMass>(keys, count, largest);
    count = prefix<Measure::kMass>(keys, count, 0, limit, largest);
  }
  return draw_among(row, keys, count);
}

// The histogram's buckets of values, kBuckets for those that do not count. Every step of this keeps the order of
// values, so buckets are in order too.
inline Ints buckets_of(Floats values, Ints ids, float largest, Cut cut) {
  const Floats distance = largest - values;
  const Ints counts = ((values > cut.value) | ((values == cut.value) & (ids <= cut.id))) & (distance < (float)kReach);
  // Selected before it is converted: only finite numbers can be.
  const Floats finite = select(counts, distance, splat((float)kReach));
  return __builtin_convertvector(finite * (float)(kBuckets / kReach), Ints);
}

template <Measure kMeasure>
inline void fill_histogram(const Row &row, const Scratch &scratch, float largest, Cut cut) {
  constexpr int kHalf = kWidth / 2;
  alignas(64) float padded[kChunk], values[kWidth];
  alignas(64) int32_t buckets[kWidth];
  alignas(64) double weights[kWidth];
  std::fill_n(weights, kWidth, 1.0);
  std::fill_n(scratch.histogram, kBuckets + 1, 0.0);
  for (int64_t begin = 0; begin < row.vocab_size; begin += kChunk) {
    if (!(largest - scratch.maxima[begin / kChunk] < kReach)) continue;
    const float *chunk = chunk_at(row, begin, padded);
    for (int at = 0; at < kChunk; at += kWidth) {
      const Floats here = scaled(row, load<Floats>(chunk + at));
      const Ints where = buckets_of(here, lane_ids() + (int32_t)(begin + at), largest, cut);
      if (!lane_bits(where != kBuckets)) continue;
      store(buckets, where);
      if (kMeasure == Measure::kMass) {
        store(values, here);
        for (int half = 0; half < kWidth; half += kHalf) {
          const Doubles wide = __builtin_convertvector(load<HalfFloats>(values + half), Doubles);
          store(weights + half, exp_exactly(wide - (double)largest));
        }
      }
      for (int i = 0; i < kWidth; i++) scratch.histogram[buckets[i]] += weights[i];
    }
  }
}

// Collects the tokens of a bucket, in the order of their ids.
inline int64_t collect(const Row &row, const Scratch &scratch, float largest, Cut cut, int bucket) {
  alignas(64) float padded[kChunk], values[kWidth];
  const float end = (float)(bucket + 1) / (kBuckets / kReach);  // of its distances
  int64_t count = 0;
  for (int64_t begin = 0; begin < row.vocab_size; begin += kChunk) {
    if (largest - scratch.maxima[begin / kChunk] >= end) continue;
    const float *chunk = chunk_at(row, begin, padded);
    for (int at = 0; at < kChunk; at += kWidth) {
      const Floats here = scaled(row, load<Floats>(chunk + at));
      const Ints where = buckets_of(here, lane_ids() + (int32_t)(begin + at), largest, cut);
      uint32_t lanes = lane_bits(where == bucket);
      if (!lanes) continue;
      store(values, here);
      for (; lanes; lanes &= lanes - 1) {
        const int i = std::countr_zero(lanes);
        scratch.keys[count++] = key_of(values[i], (int32_t)(begin + at + i));
      }
    }
  }
  return count;
}

// Among the survivors of a cut, the token with which `limit` tokens, or that share of their mass, are reached. Where
// there are fewer tokens, the cut stays. `scratch.maxima` are set, and `largest`, which is finite, is the largest of
// them.
template <Measure kMeasure>
inline Cut find_cut(const Row &row, const Scratch &scratch, float largest, Cut cut, double limit) {
  fill_histogram<kMeasure>(row, scratch, largest, cut);
  const double *histogram = scratch.histogram;
  double total = 0;
  for (int i = 0; i < kBuckets; i++) total += histogram[i];
  if (kMeasure == Measure::kCount && total <= limit) return cut;
  if (kMeasure == Measure::kMass) limit *= total;
  // The same sums again, which reach the limit before the buckets end. A bucket that reaches it is not empty: the first
  // one holds the largest value.
  int bucket = 0;
  double before = 0;
  while (bucket < kBuckets - 1 && before + histogram[bucket] < limit) before += histogram[bucket++];
  const int64_t count = collect(row, scratch, largest, cut, bucket);
  return reach<kMeasure>(scratch.keys, count, before, limit, largest);
}

inline int32_t draw_filtered(const Row &row, const Scratch &scratch) {
  const float largest = find_maxima(row, scratch.maxima);
  if (!std::isfinite(largest)) return draw(row, kNoCut);  // the first one that is infinite, which survives any filter
  Cut cut = kNoCut;
  if (row.top_k) cut = find_cut<Measure::kCount>(row, scratch, largest, cut, row.top_k);
  if (row.top_p < 1) cut = find_cut<Measure::kMass>(row, scratch, largest, cut, row.top_p);
  return draw(row, cut);
}

inline int32_t draw_row(const Row &row, const Scratch &scratch) {
  if (!(row.temperature >= kMinTemperature) || row.top_k == 1) return draw_greedy(row);
  if (row.top_k == 0 && row.top_p >= 1) return draw(row, kNoCut);
  // The bound of the k-th value is a good one as long as few chunks hold more than one of the best k.
  if (row.top_k && row.top_k <= num_chunks(row.vocab_size) / 2) return draw_top_k(row, scratch);
  return draw_filtered(row, scratch);
}

inline Row row_of(const AlbireoSample &op, const AlbireoStep &step, int64_t index) {
  Row row;
  row.logits = op.logits + index * op.logits_stride;
  row.vocab_size = op.vocab_size;
  row.temperature = step.temperature[index];
  row.top_k = step.top_k[index] > 0 && step.top_k[index] < op.vocab_size ? step.top_k[index] : 0;
  row.top_p = step.top_p[index];
  row.k0 = (uint32_t)step.noise_keys[index];
  row.k1 = (uint32_t)(step.noise_keys[index] >> 32);
  return row;
}

inline void suppress(const Row &row, const AlbireoStep &step, int64_t index) {
  for (int64_t i = step.suppressed_starts[index]; i < step.suppressed_starts[index + 1]; i++) {
    row.logits[step.suppressed_ids[i]] = -kInfinity;
  }
}

}  // namespace sampling

// Scratch of one thread, a whole number of cache lines.
inline int64_t sample_scratch_bytes(int32_t vocab_size) { return sampling::Layout(vocab_size).end; }

// False: aborted while meeting the other ranks.
//
// Ranks meet twice, and need not meet a third time when they have read the tokens. Logits are only touched between the
// two meetings, so whoever is past the second may go on to the next step and write its logits. The tokens of that step
// are written after its own first meeting, to which every thread comes only after it has read the tokens of this one.
inline bool sample(const AlbireoSample &op, AlbireoStep &step, Worker &worker) {
  if (!worker.meet()) return false;
  const sampling::Scratch scratch = sampling::scratch_of(op, worker);
  for (;;) {
    const int64_t index = worker.rank + worker.take(1) * worker.num_ranks;
    if (index >= step.num_samples) break;
    const sampling::Row row = sampling::row_of(op, step, index);
    sampling::suppress(row, step, index);
    op.tokens[index] = sampling::draw_row(row, scratch);
  }
  if (!worker.meet()) return false;
  const Share share(step.num_samples, worker);
  for (int64_t i = share.begin; i < share.end; i++) {
    step.tokens[i] = op.tokens[i];
    step.last_tokens[step.sample_slots[i]] = op.tokens[i];
  }
  return true;
}

}  // namespace albireo
