// Packed matrices: sizes, packing and unpacking. The layout is drawn in albireo_cpu.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "vector.h"

namespace albireo {

inline constexpr int kGroupBytes = 64;  // one group of inputs of all outputs of a panel

inline int64_t round_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

inline int bytes_of(int dtype) { return dtype == ALBIREO_FLOAT32 ? 4 : dtype == ALBIREO_INT8 ? 1 : 2; }

inline int32_t padded_in(int dtype, int32_t num_in) { return (int32_t)round_up(num_in, 64 / bytes_of(dtype)); }

inline int64_t panel_bytes(int dtype, int32_t num_in) { return (int64_t)padded_in(dtype, num_in) * bytes_of(dtype) * kPanel; }

inline int64_t num_panels(int32_t num_out) { return (num_out + kPanel - 1) / kPanel; }

inline const char *panel_of(const AlbireoMatrix &matrix, int64_t panel) {
  return (const char *)matrix.data + panel * panel_bytes(matrix.dtype, matrix.num_in);
}

// Where an element lies within its panel, in bytes.
inline int64_t place_in_panel(int dtype, int lane, int64_t input) {
  const int bytes = bytes_of(dtype), group = 4 / bytes;
  return input / group * kGroupBytes + lane * 4 + input % group * bytes;
}

// A float16 has 5 bits of exponent and 10 of fraction. Moved to a float's places they mean 2^-112 of the number, also where
// it is subnormal.
inline float half_to_float(uint16_t half) {
  const uint32_t moved = (uint32_t)(half & 0x7FFF) << 13;
  float magnitude;
  std::memcpy(&magnitude, &moved, 4);
  magnitude *= 0x1p112f;
  if ((half & 0x7C00) == 0x7C00) magnitude = half & 0x3FF ? NAN : INFINITY;
  return half & 0x8000 ? -magnitude : magnitude;
}

inline float element(const void *rows, int dtype, int64_t index) {
  switch (dtype) {
    case ALBIREO_FLOAT32: return ((const float *)rows)[index];
    case ALBIREO_BFLOAT16: return widen(((const uint16_t *)rows)[index]);
    case ALBIREO_FLOAT16: return half_to_float(((const uint16_t *)rows)[index]);
    default: return ((const int8_t *)rows)[index];
  }
}

inline void put(char *place, int dtype, float value) {
  if (dtype == ALBIREO_FLOAT32) {
    std::memcpy(place, &value, 4);
  } else if (dtype == ALBIREO_BFLOAT16) {
    const uint16_t half = narrow(value);
    std::memcpy(place, &half, 2);
  } else {
    *(int8_t *)place = (int8_t)value;
  }
}

// What a row's values are divided by to become integers within +-127.
inline float int8_scale(float largest) { return largest > 0 ? largest / 127.0f : 1.0f; }

inline void pack_row(const AlbireoMatrix &target, char *panel, int64_t output, const void *rows, int from_dtype,
                     int64_t start) {
  const int lane = output % kPanel;
  if (target.dtype == from_dtype && from_dtype == ALBIREO_BFLOAT16) {  // most weights
    const auto *from = (const uint16_t *)rows + start;
    for (int64_t k = 0; k + 1 < target.num_in; k += 2) std::memcpy(panel + k / 2 * kGroupBytes + lane * 4, from + k, 4);
    if (target.num_in % 2) {
      std::memcpy(panel + target.num_in / 2 * kGroupBytes + lane * 4, from + target.num_in - 1, 2);
    }
    return;
  }
  for (int64_t k = 0; k < target.num_in; k++) {
    put(panel + place_in_panel(target.dtype, lane, k), target.dtype, element(rows, from_dtype, start + k));
  }
}

// As `pack_row`, to int8. `wide` has room for a row, which is read once.
inline void quantize_row(const AlbireoMatrix &target, char *panel, int64_t output, const void *rows, int from_dtype,
                         int64_t start, float *wide) {
  float largest = 0;
  for (int64_t k = 0; k < target.num_in; k++) {
    wide[k] = element(rows, from_dtype, start + k);
    largest = std::max(largest, std::fabs(wide[k]));
  }
  const float scale = int8_scale(largest);
  int32_t sum = 0;
  for (int64_t k = 0; k < target.num_in; k++) {
    const float rounded = std::nearbyint(wide[k] / scale);
    sum += (int32_t)rounded;
    put(panel + place_in_panel(ALBIREO_INT8, output % kPanel, k), ALBIREO_INT8, rounded);
  }
  target.scales[output] = scale;
  target.sums[output] = sum;
}

inline void pack(const AlbireoMatrix &target, const void *rows, int from_dtype, int64_t stride, int32_t num_rows,
                 int32_t first_panel, int32_t panel_step) {
  const int64_t bytes = panel_bytes(target.dtype, target.num_in);
  const bool is_int8 = target.dtype == ALBIREO_INT8;
  std::vector<float> wide(is_int8 ? target.num_in : 0);
  for (int32_t first = 0; first < num_rows; first += kPanel) {
    const int64_t index = first_panel + first / kPanel * panel_step;
    char *panel = (char *)target.data + index * bytes;
    std::memset(panel, 0, bytes);
    for (int lane = 0; lane < kPanel; lane++) {
      const int64_t output = index * kPanel + lane;
      const bool is_there = first + lane < num_rows;
      const int64_t start = (first + lane) * stride;
      if (is_there && is_int8) {
        quantize_row(target, panel, output, rows, from_dtype, start, wide.data());
      } else if (is_there) {
        pack_row(target, panel, output, rows, from_dtype, start);
      } else if (is_int8) {
        target.scales[output] = 0;
        target.sums[output] = 0;
      }
    }
  }
}

inline void unpack(const AlbireoMatrix &source, float *rows, int64_t stride) {
  for (int64_t output = 0; output < source.num_out; output++) {
    const char *panel = panel_of(source, output / kPanel);
    const float scale = source.dtype == ALBIREO_INT8 ? source.scales[output] : 1.0f;
    for (int64_t k = 0; k < source.num_in; k++) {
      const char *place = panel + place_in_panel(source.dtype, output % kPanel, k);
      rows[output * stride + k] = scale * element(place, source.dtype, 0);
    }
  }
}

}  // namespace albireo
