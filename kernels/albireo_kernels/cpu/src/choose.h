// How a row's token is chosen. What a draw means is defined in ../../reference/sampling.py.
//
// Nothing here sorts a vocabulary. A row is read in chunks of 64 logits, and takes one of four routes, by its parameters:
//
// - Greedy: the largest logit.
// - Noisy: the largest sum of scaled logit and Gumbel noise. Two logarithms per token would be the cost of it, but cheap
//   upper bounds of the noise show for nearly all tokens that they cannot beat the best one so far.
// - Candidates, of a small top-k: the k-th largest of all chunks' maxima is a lower bound of the k-th largest value, and
//   few more than k values reach it. They are collected and the best k of them selected; all else concerns only those.
// - Whole: a histogram of the values' distances from the largest one, of counts for top-k and of masses for top-p. It
//   shows the narrow range of values in which the last survivor lies; only those are collected and put into order. The
//   last survivor is the `Cut`, and the draw is as in the noisy route, among the tokens not behind it.
//
// The first three can be taken over parts of a row: the best of the parts' best tokens is the row's.
//
// Logits are compared after they have been divided by the temperature: different ones may become equal, and then their
// ids decide. NaN is no value here: it never survives.
#pragma once

#include <functional>

#include "noise.h"
#include "row.h"

namespace albireo {
namespace sampling {

inline constexpr float kMinTemperature = 1e-5f;  // below it a row is greedy
// Tokens so far behind the best one are not counted. All of them together have less than 2^32 * e^-64 = 7e-19 of its
// mass, and none can be drawn: noise differs by no more than 25.7.
inline constexpr int kReach = 64;           // what a histogram's buckets cover
inline constexpr int64_t kSortable = 2048;  // so many tokens are sorted rather than divided further

enum class Route { kGreedy, kNoisy, kCandidates, kWhole };

inline Route route_of(const Row &row) {
  if (!(row.temperature >= kMinTemperature) || row.top_k == 1) return Route::kGreedy;
  if (row.top_k > 0 && row.top_k <= ALBIREO_MAX_CANDIDATES) return Route::kCandidates;
  return row.top_k == 0 && row.top_p >= 1 && !(row.min_p > 0) ? Route::kNoisy : Route::kWhole;
}

// The least value that survives min-p.
inline float min_p_value(const Row &row, float largest) { return (float)((double)largest + std::log(row.min_p)); }

// ---- Measures

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
inline Best best_of(const Row &row) {
  alignas(64) float padded[kChunk];
  // In each lane, the largest value and the first chunk that has it.
  Floats most = splat(-kInfinity);
  Ints where = {};
  for (int64_t begin = 0; begin < row.num_ids; begin += kChunk) {
    const Floats values = chunk_max(chunk_at(row, begin, padded));
    const Ints more = values > most;
    most = max(values, most);
    where = (where & ~more) | (splat((int32_t)begin) & more);
  }
  const float value = largest(most);
  if (value == -kInfinity) return kNone;
  int32_t place = kNoToken;
  for (int i = 0; i < kWidth; i++) {
    if (most[i] == value) place = std::min(place, (int32_t)where[i]);
  }
  while (row.logits[place] != value) place++;
  return {value, row.first_id + place};
}

// Whether any token of a chunk may score more than `best`; `most` are its largest logits, in any lane.
inline bool may_beat(const Row &row, const float *chunk, int64_t begin, Floats most, float best) {
  // Quotients are replaced by products. What beats the best one is no further from 0 than it, or than the largest, by
  // more than the noise, so that this is more than the difference makes up for.
  const Floats inverse = splat(1.0f / row.temperature);
  const Floats farthest = max(abs(most * inverse), splat(std::fabs(best))) + kMostNoise;
  const Floats enough = best - farthest * 4e-7f;
  if (best > -kInfinity && !lane_bits(most * inverse + kMostNoise > enough)) return false;
  Words products = (Words)ids_at(row, begin) * kGolden;
  Ints any = {};
  for (int at = 0; at < kChunk; at += kWidth) {
    any |= ~(load<Floats>(chunk + at) * inverse + noise_bound(hash(products, row.k0, row.k1)) <= enough);
    products += kWidth * kGolden;
  }
  return lane_bits(any);
}

// The first of the largest sums of value and noise, among the survivors of a cut.
inline Best noisy_best_of(const Row &row, Cut cut) {
  alignas(64) float padded[kChunk], scores[kWidth];
  Best best = kNone;
  // Ids ascend, so that an equal score is no better. Bounds hold exactly: rounded sums keep the order of what is added.
  for (int64_t begin = 0; begin < row.num_ids; begin += kChunk) {
    const float *chunk = chunk_at(row, begin, padded);
    if (!may_beat(row, chunk, begin, chunk_max(chunk), best.score)) continue;
    for (int at = 0; at < kChunk; at += kWidth) {
      const Ints ids = ids_at(row, begin + at);
      const Floats values = scaled(row, load<Floats>(chunk + at));
      const Ints survives = (values > cut.value) | ((values == cut.value) & (ids <= cut.id));
      store(scores, select(survives, values + gumbel(uniform(ids, row.k0, row.k1)), splat(-kInfinity)));
      for (int i = 0; i < kWidth; i++) {
        if (scores[i] > best.score) best = {scores[i], ids[i]};
      }
    }
  }
  return best;
}

// As `noisy_best_of`, among few tokens, in any order.
inline Best noisy_best_among(const Row &row, const uint64_t *keys, int64_t count) {
  Best best = kNone;
  for (int64_t begin = 0; begin < count; begin += kWidth) {
    const int lanes = (int)std::min<int64_t>(kWidth, count - begin);
    Ints ids = {};
    for (int i = 0; i < lanes; i++) ids[i] = id_of(keys[begin + i]);
    const Floats noise = gumbel(uniform(ids, row.k0, row.k1));
    for (int i = 0; i < lanes; i++) best = better(best, {value_of(keys[begin + i]) + noise[i], ids[i]});
  }
  return best.score == -kInfinity ? kNone : best;
}

// As the loop of `find_top`, where even -inf, or NaN in its place, may be among the best `count`.
inline int64_t find_down_to_nothing(const Row &row, int32_t count, const Scratch &scratch) {
  int64_t num_found = 0;
  int32_t num_nothing = 0;
  for (int32_t place = 0; place < row.num_ids; place++) {
    if (num_nothing >= count && scratch.maxima[place / kChunk] == -kInfinity) continue;
    const float value = row.logits[place] / row.temperature;
    const bool is_value = value > -kInfinity;
    if (!is_value && num_nothing++ >= count) continue;
    scratch.keys[num_found++] = key_of(is_value ? value : -kInfinity, row.first_id + place);
  }
  return num_found;
}

inline int64_t keep_top(int64_t num_found, int32_t count, const Scratch &scratch) {
  if (num_found <= count) return num_found;
  std::nth_element(scratch.keys, scratch.keys + count, scratch.keys + num_found);
  return count;
}

// Puts the best `count` tokens into `scratch.keys`, in any order; fewer where the row is shorter.
inline int64_t find_top(const Row &row, int32_t count, const Scratch &scratch) {
  const int64_t chunks = num_chunks(row.num_ids);
  find_maxima(row, scratch.maxima);
  // The k-th largest maximum: k chunks have a value that is not below it. Values above it lie in fewer than k chunks,
  // and of those that are equal the first k are enough, so that candidates stay few even where all values are equal.
  float bound = -kInfinity;
  if (count <= chunks) {
    std::copy_n(scratch.maxima, chunks, scratch.ranked);
    std::nth_element(scratch.ranked, scratch.ranked + count - 1, scratch.ranked + chunks, std::greater<float>());
    bound = scratch.ranked[count - 1];
  }
  if (bound == -kInfinity) return keep_top(find_down_to_nothing(row, count, scratch), count, scratch);
  alignas(64) float padded[kChunk], values[kWidth];
  int64_t num_found = 0;
  int32_t num_equal = 0;
  for (int64_t begin = 0; begin < row.num_ids; begin += kChunk) {
    if (scratch.maxima[begin / kChunk] < bound) continue;
    const float *chunk = chunk_at(row, begin, padded);
    for (int at = 0; at < kChunk; at += kWidth) {
      const Floats here = scaled(row, load<Floats>(chunk + at));
      uint32_t lanes = lane_bits(here >= bound);
      if (!lanes) continue;
      const Ints ids = ids_at(row, begin + at);
      store(values, here);
      for (; lanes; lanes &= lanes - 1) {
        const int i = std::countr_zero(lanes);
        if (values[i] == bound && num_equal++ >= count) continue;
        scratch.keys[num_found++] = key_of(values[i], ids[i]);
      }
    }
  }
  return keep_top(num_found, count, scratch);
}

// How many of the best tokens, in order, survive min-p and top-p.
inline int64_t num_survivors(const Row &row, const uint64_t *keys, int64_t count) {
  const float largest = value_of(keys[0]);
  if (row.min_p > 0) {
    const float least = min_p_value(row, largest);
    while (count > 1 && value_of(keys[count - 1]) < least) count--;
  }
  if (row.top_p >= 1) return count;
  const double limit = row.top_p * measure<Measure::kMass>(keys, count, largest);
  return prefix<Measure::kMass>(keys, count, 0, limit, largest);
}

// The draw from a small top-k, `count` tokens at least of which are given in any order.
inline Best draw_from_candidates(const Row &row, uint64_t *keys, int64_t count) {
  if (count > row.top_k) {
    std::nth_element(keys, keys + row.top_k, keys + count);
    count = row.top_k;
  }
  if (count == 0) return kNone;
  if (row.top_p < 1 || row.min_p > 0) {
    std::sort(keys, keys + count);
    count = num_survivors(row, keys, count);
  }
  return noisy_best_among(row, keys, count);
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
  for (int64_t begin = 0; begin < row.num_ids; begin += kChunk) {
    if (!(largest - scratch.maxima[begin / kChunk] < kReach)) continue;
    const float *chunk = chunk_at(row, begin, padded);
    for (int at = 0; at < kChunk; at += kWidth) {
      const Floats here = scaled(row, load<Floats>(chunk + at));
      const Ints where = buckets_of(here, ids_at(row, begin + at), largest, cut);
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
  for (int64_t begin = 0; begin < row.num_ids; begin += kChunk) {
    if (largest - scratch.maxima[begin / kChunk] >= end) continue;
    const float *chunk = chunk_at(row, begin, padded);
    for (int at = 0; at < kChunk; at += kWidth) {
      const Floats here = scaled(row, load<Floats>(chunk + at));
      const Ints where = buckets_of(here, ids_at(row, begin + at), largest, cut);
      uint32_t lanes = lane_bits(where == bucket);
      if (!lanes) continue;
      store(values, here);
      for (; lanes; lanes &= lanes - 1) {
        const int i = std::countr_zero(lanes);
        scratch.keys[count++] = key_of(values[i], row.first_id + (int32_t)(begin + at + i));
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

// The draw where the order of a whole row decides.
inline Best draw_filtered(const Row &row, const Scratch &scratch) {
  const float largest = find_maxima(row, scratch.maxima);
  if (largest == -kInfinity) return kNone;
  // Infinite ones survive any filter; the first is drawn.
  if (!std::isfinite(largest)) return noisy_best_of(row, kNoCut);
  Cut cut = kNoCut;
  if (row.min_p > 0) cut = {min_p_value(row, largest), kNoToken};
  if (row.top_k) cut = find_cut<Measure::kCount>(row, scratch, largest, cut, row.top_k);
  if (row.top_p < 1) cut = find_cut<Measure::kMass>(row, scratch, largest, cut, row.top_p);
  return noisy_best_of(row, cut);
}

}  // namespace sampling
}  // namespace albireo
