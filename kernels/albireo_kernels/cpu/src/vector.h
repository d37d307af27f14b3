// Vectors of floats, as wide as the processor's: 16 with AVX-512, else 8. They are the compiler's own vector types, so
// that one source serves every processor; only what the compiler cannot express is written with intrinsics.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "albireo_cpu.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef ALBIREO_ISA
#define ALBIREO_ISA 0
#endif

namespace albireo {

inline constexpr int kIsa = ALBIREO_ISA;
inline constexpr int kWidth = kIsa >= ALBIREO_AVX512 ? 16 : 8;
inline constexpr int kPanel = ALBIREO_PANEL;
inline constexpr int kBlock = ALBIREO_BLOCK;

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef uint16_t HalfWords __attribute__((vector_size(2 * kWidth)));

template <class Vector, class Element>
inline Vector load(const Element *from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class Vector, class Element>
inline void store(Element *to, Vector vector) {
  std::memcpy(to, &vector, sizeof vector);
}

inline Floats splat(float x) { return x - Floats{}; }
inline Ints splat(int32_t x) { return x - Ints{}; }

inline Floats select(Ints mask, Floats yes, Floats no) { return (Floats)(((Ints)yes & mask) | ((Ints)no & ~mask)); }
inline Floats abs(Floats x) { return (Floats)((Ints)x & 0x7FFFFFFF); }
inline Floats max(Floats a, Floats b) { return a > b ? a : b; }
inline Floats min(Floats a, Floats b) { return a < b ? a : b; }

inline float sum(Floats x) {
  float total = 0;
  for (int i = 0; i < kWidth; i++) total += x[i];
  return total;
}

inline float largest(Floats x) {
  float most = x[0];
  for (int i = 1; i < kWidth; i++) most = x[i] > most ? x[i] : most;
  return most;
}

// e^x to about 2 units in the last place; 0 below -87.3, where the result would be no normal number. x <= 88.
// Cody and Waite's reduction, and the polynomial of Cephes' expf.
inline Floats exp(Floats x) {
  const Ints underflows = x < -87.3f;
  x = max(x, splat(-87.3f));
  const Floats shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const Ints exponent = (Ints)shifted - 0x4B400000;
  const Floats whole = shifted - 12582912.0f;
  Floats r = x - whole * 0.693359375f;
  r = r - whole * -2.12194440e-4f;
  Floats p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Floats scaled = (Floats)((Ints)p + (exponent << 23));
  return select(underflows, Floats{}, scaled);
}

// bfloat16 to float32, exactly; float32 to bfloat16, to nearest even (NaN stays NaN).
inline float widen(uint16_t x) {
  const uint32_t word = (uint32_t)x << 16;
  float wide;
  std::memcpy(&wide, &word, 4);
  return wide;
}

inline uint16_t narrow(float x) {
  uint32_t word;
  std::memcpy(&word, &x, 4);
  if (x != x) return (uint16_t)(word >> 16 | 0x40);
  return (uint16_t)((word + 0x7FFF + (word >> 16 & 1)) >> 16);
}

inline Floats widen(HalfWords x) { return (Floats)(__builtin_convertvector(x, Words) << 16); }

inline HalfWords narrow(Floats x) {
  const Words word = (Words)x;
  const Words rounded = (word + 0x7FFF + (word >> 16 & 1)) >> 16;
  const Words quiet = word >> 16 | 0x40;
  const Words is_nan = (Words)(x != x);
  return __builtin_convertvector((quiet & is_nan) | (rounded & ~is_nan), HalfWords);
}

// Stores a value, or a vector of them, in the type of what it points to.
inline void write(float *to, float x) { *to = x; }
inline void write(float *to, Floats x) { store(to, x); }
inline void write(uint16_t *to, float x) { *to = narrow(x); }
inline void write(uint16_t *to, Floats x) { store(to, narrow(x)); }

inline float round_to_bfloat16(float x) { return widen(narrow(x)); }
inline Floats round_to_bfloat16(Floats x) { return widen(narrow(x)); }

}  // namespace albireo
