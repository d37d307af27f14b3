// The logarithms of the probabilities that a row of logits gives.
#pragma once

#include "choose.h"

namespace albireo {
namespace sampling {

// The sum of e^(logit - largest) over a row of finite values and -inf, always in the same order.
inline double total_mass(const Row &row, double largest) {
  constexpr int kHalf = kWidth / 2;
  alignas(64) float padded[kChunk];
  Doubles totals = {};
  for (int64_t begin = 0; begin < row.num_ids; begin += kChunk) {
    const float *chunk = chunk_at(row, begin, padded);
    for (int at = 0; at < kChunk; at += kHalf) {
      HalfFloats values;
      std::memcpy(&values, chunk + at, sizeof values);
      const Doubles distance = __builtin_convertvector(values, Doubles) - largest;
      const LongWords counts = (LongWords)(distance > -700.0);  // none of NaN; what is farther counts for nothing
      totals += (Doubles)((LongWords)exp_exactly((Doubles)((LongWords)distance & counts)) & counts);
    }
  }
  double total = 0;
  for (int i = 0; i < kHalf; i++) total += totals[i];
  return total;
}

// How many tokens come before this one.
inline int32_t num_before(const Row &row, float value, int32_t token) {
  alignas(64) float padded[kChunk];
  int32_t count = 0;
  for (int64_t begin = 0; begin < row.num_ids; begin += kChunk) {
    const float *chunk = chunk_at(row, begin, padded);
    for (int at = 0; at < kChunk; at += kWidth) {
      const Floats values = max(load<Floats>(chunk + at), splat(-kInfinity));  // where it is NaN, -inf
      const Ints comes_before = (values > value) | ((values == value) & (ids_at(row, begin + at) < token));
      count += std::popcount(lane_bits(comes_before));
    }
  }
  return count;
}

// Of `token` and of the `num_top` likeliest; `row` is whole, and as the model gave it.
inline void tell_logprobs(Row row, int32_t token, int32_t num_top, const Scratch &scratch, AlbireoTokenLogprobs &out) {
  row.temperature = 1;
  const double largest = find_maxima(row, scratch.maxima);
  const double normaliser = largest + std::log(total_mass(row, largest));
  const float value = row.logits[token] == row.logits[token] ? row.logits[token] : -kInfinity;
  out.logprob = (float)(value - normaliser);
  out.rank = 1 + num_before(row, value, token);
  const int64_t count = num_top ? find_top(row, num_top, scratch) : 0;
  std::sort(scratch.keys, scratch.keys + count);
  out.num_top = (int32_t)count;
  for (int64_t i = 0; i < count; i++) {
    out.top_ids[i] = id_of(scratch.keys[i]);
    out.top_logprobs[i] = (float)(value_of(scratch.keys[i]) - normaliser);
  }
}

}  // namespace sampling
}  // namespace albireo
