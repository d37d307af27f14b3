// The keyed noise that picks a token, in vectors; what it is stands in ../../reference/sampling.py.
#pragma once

#include "vector.h"

namespace albireo {
namespace sampling {

inline constexpr float kMostNoise = 22.9f;  // no noise is larger: -log(2^-33) is 22.87

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

inline constexpr uint32_t kGolden = 0x9E3779B9u;

// The hashes of token ids, given as their products with kGolden; k0 and k1 are the key.
inline Words hash(Words products, uint32_t k0, uint32_t k1) { return mix(mix(products ^ k0) + k1); }

// The uniform numbers v in (0, 1) that the noise of token ids is made of.
inline Floats uniform(Ints ids, uint32_t k0, uint32_t k1) {
  const Words h = hash((Words)ids * kGolden, k0, k1);
  // To the nearest float32: both halves are exact, and only their sum rounds.
  const Floats high = __builtin_convertvector((Ints)(h >> 16), Floats);
  const Floats low = __builtin_convertvector((Ints)(h & 0xFFFF), Floats);
  const Floats v = ((high * 65536.0f + low) + 0.5f) * 0x1p-32f;
  return min(v, splat(1.0f - 0x1p-24f));
}

inline Floats gumbel(Floats v) { return -log(-log1p_minus(v)); }

// At least the noise of a hash: -log1p(-v) >= v, hence noise <= -log(v); v >= (h >> 8) * 2^-24; and log2 of a number is at
// least exponent + fraction, which is what its bits say. The margin is larger than what all the roundings add up to.
inline Floats noise_bound(Words h) {
  const float log_2 = 0.693147182f;
  const Floats least = __builtin_convertvector((Ints)(h >> 8), Floats);
  return __builtin_convertvector((Ints)least, Floats) * (-log_2 * 0x1p-23f) + ((127 + 24) * log_2 + 1e-3f);
}

}  // namespace sampling
}  // namespace albireo
