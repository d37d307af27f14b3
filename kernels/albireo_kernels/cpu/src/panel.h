// The one product that everything is made of: rows times a packed panel of 16 outputs. Weights are panels, and so are the
// keys and values of a KV block.
//
//     out[row][lane] (+)= sum over k of x[row][k] * panel[k][lane]
//
// The sums of a few rows stay in registers while the panel streams past. How the types meet:
//
//   weights   activations              on
//   float32   float32                  all
//   bfloat16  float32                  vectors without bfloat16: 32 bits are two weights, of which one is widened by a
//                                      shift and the other by a mask
//   bfloat16  bfloat16                 AVX-512 dot products; AMX tiles for more than a few rows
//   int8      int8                     AVX2 (signs moved to one side), AVX-512 VNNI (one side moved by 128), AMX tiles
//
// Where a build lacks an instruction, plain code takes its place, so that the logic of each level can be tested anywhere.
#pragma once

#include "pack.h"
#include "vector.h"

namespace albireo {

inline constexpr int kPrefetchBytes = 2048;  // ahead in a panel

template <int kDtype>
struct Types;
template <>
struct Types<ALBIREO_FLOAT32> {
  using X = float;
  using Sum = float;
  static constexpr int kGroup = 1;  // inputs in 4 bytes
  static constexpr int kInput = ALBIREO_FLOAT32;
};
template <>
struct Types<ALBIREO_BFLOAT16> {
  using X = std::conditional_t<(kIsa >= ALBIREO_AVX512), uint16_t, float>;
  using Sum = float;
  static constexpr int kGroup = 2;
  static constexpr int kInput = kIsa >= ALBIREO_AVX512 ? ALBIREO_BFLOAT16 : ALBIREO_FLOAT32;
};
template <>
struct Types<ALBIREO_INT8> {
  using X = int8_t;
  using Sum = int32_t;
  static constexpr int kGroup = 4;
  static constexpr int kInput = ALBIREO_INT8;
};

// How one vector of a panel's group is multiplied. A group is worked off in `kParts` parts, each of one activation (or one
// register of them) for all outputs.
template <int kDtype>
struct Lanes;

template <>
struct Lanes<ALBIREO_FLOAT32> {
  static constexpr int kParts = 1;
  Floats weights;
  Lanes(const char *from, int) : weights(load<Floats>(from)) {}
  static Floats broadcast(const float *x, int) { return splat(*x); }
  Floats add(Floats sum, Floats x) const { return sum + x * weights; }
};

template <>
struct Lanes<ALBIREO_BFLOAT16> {
#if ALBIREO_ISA >= 2 && defined(__AVX512BF16__)
  static constexpr int kParts = 1;
  __m512bh pairs;
  Lanes(const char *from, int) : pairs((__m512bh)_mm512_loadu_si512(from)) {}
  static __m512bh broadcast(const uint16_t *x, int) { return (__m512bh)_mm512_set1_epi32(load<int32_t>(x)); }
  Floats add(Floats sum, __m512bh x) const { return (Floats)_mm512_dpbf16_ps((__m512)sum, x, pairs); }
#else
  static constexpr int kParts = 2;  // even inputs, odd inputs
  Floats weights;
  Lanes(const char *from, int part) {
    const Words words = load<Words>(from);
    weights = (Floats)(part == 0 ? words << 16 : words & 0xFFFF0000);
  }
  static Floats broadcast(const float *x, int part) { return splat(x[part]); }
  static Floats broadcast(const uint16_t *x, int part) { return splat(widen(x[part])); }
  Floats add(Floats sum, Floats x) const { return sum + x * weights; }
#endif
};

template <>
struct Lanes<ALBIREO_INT8> {
  static constexpr int kParts = 1;
#if ALBIREO_ISA >= 2
  // x is moved up by 128 to be unsigned, which adds 128 times the sum of the weights; that is taken off at the end.
  static constexpr bool kIsShifted = true;
  Ints quads;
  Lanes(const char *from, int) : quads(load<Ints>(from)) {}
  static Ints broadcast(const int8_t *x, int) { return splat((int32_t)(load<uint32_t>(x) ^ 0x80808080)); }
#if defined(__AVX512VNNI__)
  Ints add(Ints sum, Ints x) const { return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)quads); }
#else
  Ints add(Ints sum, Ints x) const {
    return sum + (x & 255) * (quads << 24 >> 24) + (x >> 8 & 255) * (quads << 16 >> 24) +
           (x >> 16 & 255) * (quads << 8 >> 24) + (x >> 24 & 255) * (quads >> 24);
  }
#endif
#elif ALBIREO_ISA == 1 && defined(__AVX2__)
  // One factor has to be unsigned: |w| * (x with the sign of w). Weights and x are within +-127, so that the sum of two
  // products fits 16 bits.
  static constexpr bool kIsShifted = false;
  __m256i quads, magnitudes;
  Lanes(const char *from, int) : quads(load<__m256i>(from)), magnitudes(_mm256_abs_epi8(quads)) {}
  static __m256i broadcast(const int8_t *x, int) { return _mm256_set1_epi32(load<int32_t>(x)); }
  Ints add(Ints sum, __m256i x) const {
    const __m256i pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(x, quads));
    return sum + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
#else
  static constexpr bool kIsShifted = false;
  Ints quads;
  Lanes(const char *from, int) : quads(load<Ints>(from)) {}
  static Ints broadcast(const int8_t *x, int) { return splat(load<int32_t>(x)); }
  Ints add(Ints sum, Ints x) const {
    return sum + (x << 24 >> 24) * (quads << 24 >> 24) + (x << 16 >> 24) * (quads << 16 >> 24) +
           (x << 8 >> 24) * (quads << 8 >> 24) + (x >> 24) * (quads >> 24);
  }
#endif
};

template <int kDtype>
using SumVector = std::conditional_t<kDtype == ALBIREO_INT8, Ints, Floats>;

inline constexpr int kVectors = kPanel / kWidth;  // of a panel

// Rows whose sums fit the registers, beside the weights and one activation.
template <int kDtype>
inline constexpr int kMaxRows = kVectors == 1 ? 12 : kDtype == ALBIREO_INT8 ? 4 : 6;

// Not inlined: among other code, compilers run out of registers.
template <int kDtype, int kRows>
[[gnu::noinline]] void multiply_rows(const typename Types<kDtype>::X *x, int64_t stride, const char *panel, int64_t num_groups,
                          const int32_t *sums, typename Types<kDtype>::Sum *out, int64_t out_stride, bool adds) {
  using Vector = SumVector<kDtype>;
  using Lane = Lanes<kDtype>;
  // Few rows: each part of a group gets sums of its own, because two additions in a row to the same one have to wait.
  constexpr int kSums = kRows * kVectors * Lane::kParts <= 12 ? Lane::kParts : 1;
  Vector part_sums[kSums][kRows][kVectors] = {};
  for (int row = 0; adds && row < kRows; row++) {
    for (int v = 0; v < kVectors; v++) part_sums[0][row][v] = load<Vector>(out + row * out_stride + v * kWidth);
  }
  for (int64_t group = 0; group < num_groups; group++, panel += kGroupBytes, x += Types<kDtype>::kGroup) {
    __builtin_prefetch(panel + kPrefetchBytes);
#pragma GCC unroll 2
    for (int part = 0; part < Lane::kParts; part++) {
      auto &sum = part_sums[part % kSums];
      // The order matters: an activation is used for both vectors at once and then forgotten, so that all sums fit.
      const Lane first(panel, part), last(panel + kGroupBytes - kWidth * 4, part);
#pragma GCC unroll 12
      for (int row = 0; row < kRows; row++) {
        const auto broadcast = Lane::broadcast(x + row * stride, part);
        sum[row][0] = first.add(sum[row][0], broadcast);
        if constexpr (kVectors == 2) sum[row][1] = last.add(sum[row][1], broadcast);
      }
    }
  }
  auto &total = part_sums[0];
  for (int part = 1; part < kSums; part++) {
    for (int row = 0; row < kRows; row++) {
      for (int v = 0; v < kVectors; v++) total[row][v] += part_sums[part][row][v];
    }
  }
  if constexpr (kDtype == ALBIREO_INT8) {
    if (Lane::kIsShifted && sums != nullptr) {
      for (int row = 0; row < kRows; row++) {
        for (int v = 0; v < kVectors; v++) total[row][v] -= 128 * load<Ints>(sums + v * kWidth);
      }
    }
  }
  for (int row = 0; row < kRows; row++) {
    for (int v = 0; v < kVectors; v++) store(out + row * out_stride + v * kWidth, total[row][v]);
  }
}

// How many of the rows that are left to take at once: one or two in the end would leave the multipliers waiting for each
// other. Where a group has parts, three rows are as good as many; else even parts are best.
template <int kDtype>
inline int rows_at_once(int num_left) {
  constexpr int kMost = kMaxRows<kDtype>;
  if (num_left <= kMost) return num_left;
  if (Lanes<kDtype>::kParts == 1) {
    const int parts = (num_left + kMost - 1) / kMost;
    return (num_left + parts - 1) / parts;
  }
  return num_left - kMost < 3 ? num_left - 3 : kMost;
}

// All rows against some groups of a panel, a few rows at a time.
template <int kDtype>
inline void multiply_groups(const typename Types<kDtype>::X *x, int64_t stride, int num_rows, const char *panel,
                            int64_t num_groups, const int32_t *sums, typename Types<kDtype>::Sum *out,
                            int64_t out_stride, bool adds) {
  while (num_rows > 0) {
    const int rows = rows_at_once<kDtype>(num_rows);
    const auto run = [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
      ((rows == kIndex + 1 &&
        (multiply_rows<kDtype, kIndex + 1>(x, stride, panel, num_groups, sums, out, out_stride, adds), true)) ||
       ...);
    };
    run(std::make_integer_sequence<int, kMaxRows<kDtype>>());
    x += rows * stride;
    out += rows * out_stride;
    num_rows -= rows;
  }
}

inline constexpr int64_t kGroupsAtOnce = 256;  // of a panel: they stay in the first-level cache for all rows

template <int kDtype>
inline void multiply_vectors(const typename Types<kDtype>::X *x, int64_t stride, int num_rows, const char *panel,
                             int64_t num_groups, const int32_t *sums, typename Types<kDtype>::Sum *out,
                             int64_t out_stride, bool adds) {
  const int64_t at_once = num_rows > kMaxRows<kDtype> ? kGroupsAtOnce : num_groups;
  for (int64_t group = 0; group < num_groups; group += at_once) {
    const int64_t count = std::min(at_once, num_groups - group);
    multiply_groups<kDtype>(x + group * Types<kDtype>::kGroup, stride, num_rows, panel + group * kGroupBytes, count,
                            group == 0 ? sums : nullptr, out, out_stride, adds || group > 0);
  }
}

// AMX: tile 0 and 1 hold sums of 16 rows each, 2 and 3 their activations, 4 the panel. A tile row is 64 bytes.
#if ALBIREO_ISA == 3

inline constexpr int kMinTileRows = 5;  // below, vectors waste less

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
// In assembly: gcc's intrinsics take tile numbers as written only, and tell the compiler neither that a tile is loaded from
// memory nor how much of the configuration is read.
inline void configure_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64};
    uint8_t num_rows[16] = {16, 16, 16, 16, 16};
  } config;
  asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
}
template <int kTile>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
inline void load_tile(const void *from, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(kTile) : "memory");
}
template <int kTile>
inline void store_tile(void *to, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride_bytes), "i"(kTile) : "memory");
}
template <int kDtype, int kSum, int kX>
inline void multiply_tiles() {
  if constexpr (kDtype == ALBIREO_INT8) {
    asm volatile("tdpbssd %%tmm4, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kX));
  } else {
    asm volatile("tdpbf16ps %%tmm4, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kX));
  }
}
#else
// The same in plain code, after Intel's description of the instructions.
inline thread_local char tiles[5][16][64];
inline void configure_tiles() {}
template <int kTile>
inline void zero_tile() {
  std::memset(tiles[kTile], 0, sizeof tiles[kTile]);
}
template <int kTile>
inline void load_tile(const void *from, int64_t stride_bytes) {
  for (int row = 0; row < 16; row++) std::memcpy(tiles[kTile][row], (const char *)from + row * stride_bytes, 64);
}
template <int kTile>
inline void store_tile(void *to, int64_t stride_bytes) {
  for (int row = 0; row < 16; row++) std::memcpy((char *)to + row * stride_bytes, tiles[kTile][row], 64);
}
template <int kDtype, int kSum, int kX>
inline void multiply_tiles() {
  using Sum = typename Types<kDtype>::Sum;
  constexpr int kGroup = Types<kDtype>::kGroup;
  for (int row = 0; row < 16; row++) {
    for (int lane = 0; lane < 16; lane++) {
      Sum total = load<Sum>(tiles[kSum][row] + 4 * lane);
      for (int group = 0; group < 16; group++) {
        for (int i = 0; i < kGroup; i++) {
          total += (Sum)element(tiles[kX][row] + 4 * group, kDtype, i) * (Sum)element(tiles[4][group] + 4 * lane, kDtype, i);
        }
      }
      store(tiles[kSum][row] + 4 * lane, total);
    }
  }
}
#endif

template <int kDtype, int kRowTiles>
inline void multiply_row_tiles(const typename Types<kDtype>::X *x, int64_t stride, const char *panel, int64_t num_groups,
                               typename Types<kDtype>::Sum *out, int64_t out_stride, bool adds) {
  constexpr int kGroup = Types<kDtype>::kGroup;
  const int64_t stride_bytes = stride * sizeof *x;
  if (adds) {
    load_tile<0>(out, out_stride * 4);
    if constexpr (kRowTiles == 2) load_tile<1>(out + 16 * out_stride, out_stride * 4);
  } else {
    zero_tile<0>();
    if constexpr (kRowTiles == 2) zero_tile<1>();
  }
  for (int64_t group = 0; group < num_groups; group += 16) {
    load_tile<4>(panel + group * kGroupBytes, kGroupBytes);
    load_tile<2>(x + group * kGroup, stride_bytes);
    multiply_tiles<kDtype, 0, 2>();
    if constexpr (kRowTiles == 2) {
      load_tile<3>(x + 16 * stride + group * kGroup, stride_bytes);
      multiply_tiles<kDtype, 1, 3>();
    }
  }
  store_tile<0>(out, out_stride * 4);
  if constexpr (kRowTiles == 2) store_tile<1>(out + 16 * out_stride, out_stride * 4);
}

#endif

// Rows of activations that are read, and rows of `out` that are written: tiles are whole.
inline int64_t touched_rows(int64_t num_rows) { return round_up(num_rows, 16); }

// Args:
//   x: rows that are `stride` elements apart, of whole groups (zero where the panel's inputs end).
//   num_groups: of the panel; with tiles a multiple of 16.
//   sums: [16], of the panel's integers; else null.
//   out: rows of 16 that are `out_stride` apart.
template <int kDtype>
inline void multiply(const typename Types<kDtype>::X *x, int64_t stride, int num_rows, const char *panel,
                     int64_t num_groups, const int32_t *sums, typename Types<kDtype>::Sum *out, int64_t out_stride,
                     bool adds) {
#if ALBIREO_ISA == 3
  if constexpr (kDtype != ALBIREO_FLOAT32) {
    if (num_rows >= kMinTileRows && num_groups % 16 == 0) {
      for (; num_rows > 16; num_rows -= 32, x += 32 * stride, out += 32 * out_stride) {
        multiply_row_tiles<kDtype, 2>(x, stride, panel, num_groups, out, out_stride, adds);
      }
      if (num_rows > 0) multiply_row_tiles<kDtype, 1>(x, stride, panel, num_groups, out, out_stride, adds);
      return;
    }
  }
#endif
  multiply_vectors<kDtype>(x, stride, num_rows, panel, num_groups, sums, out, out_stride, adds);
}

}  // namespace albireo
