// Rows times a packed matrix. Threads take a few panels at a time, so that one whose core is wanted elsewhere takes fewer.
#pragma once

#include <algorithm>

#include "panel.h"
#include "worker.h"

namespace albireo {

inline constexpr int kRowsAtOnce = 32;            // whose sums wait for the epilogue
inline constexpr int64_t kBytesAtOnce = 128 << 10;  // of panels: they stay in a core's cache for all rows

inline int64_t num_rows_of(const AlbireoStep &step, int32_t extent) {
  return extent == ALBIREO_EACH_SAMPLE ? step.num_samples : step.num_tokens;
}

template <class Element>
inline void put_elements(Element *to, const float *values, int64_t count) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) write(to + i, load<Floats>(values + i));
  for (; i < count; i++) write(to + i, values[i]);
}

// Writes values of a row, of which there are `count`, from `column` on.
inline void put_row(const AlbireoRows &out, int64_t row, int64_t column, const float *values, int64_t count) {
  const int64_t start = row * out.stride + column;
  if (out.dtype == ALBIREO_BFLOAT16) return put_elements((uint16_t *)out.data + start, values, count);
  put_elements((float *)out.data + start, values, count);
}

inline void add_row(const AlbireoRows &out, int64_t row, int64_t column, const float *values, int64_t count) {
  auto *to = (float *)out.data + row * out.stride + column;
  for (int64_t i = 0; i < count; i++) to[i] += values[i];
}

inline Floats silu(Floats x) { return x / (1.0f + exp(min(-x, splat(88.0f)))); }

// The products of one panel: [rows, 16], ready to be used.
template <int kDtype>
struct Products {
  using Sum = typename Types<kDtype>::Sum;
  alignas(64) Sum sums[kRowsAtOnce * kPanel];

  void make(const AlbireoGemm &op, int64_t first_row, int num_rows, int64_t panel) {
    const auto *x = (const typename Types<kDtype>::X *)op.x.data + first_row * op.x.stride;
    // Only tiles take the padding: float32 rows have less of it than bfloat16 weights.
    const int64_t num_in = kIsa < ALBIREO_AMX ? round_up(op.weight.num_in, Types<kDtype>::kGroup) : op.weight.padded_in;
    const int64_t num_groups = num_in / Types<kDtype>::kGroup;
    const int32_t *panel_sums = kDtype == ALBIREO_INT8 ? op.weight.sums + panel * kPanel : nullptr;
    multiply<kDtype>(x, op.x.stride, num_rows, panel_of(op.weight, panel), num_groups, panel_sums, sums, kPanel, false);
  }

  Floats value(const AlbireoGemm &op, int64_t row, int local_row, int64_t panel, int v) const {
    const int64_t lane = panel * kPanel + v * kWidth;
    Floats product;
    if constexpr (kDtype == ALBIREO_INT8) {
      const Floats scales = op.x.scales[row] * load<Floats>(op.weight.scales + lane);
      product = __builtin_convertvector(load<Ints>(sums + local_row * kPanel + v * kWidth), Floats) * scales;
    } else {
      product = load<Floats>(sums + local_row * kPanel + v * kWidth);
    }
    if (op.bias == nullptr) return product;
    const int64_t count = std::min<int64_t>(kWidth, op.weight.num_out - lane);
    if (count == kWidth) return product + load<Floats>(op.bias + lane);
    for (int64_t i = 0; i < count; i++) product[i] += op.bias[lane + i];
    return product;
  }
};

template <int kDtype>
inline void finish_panel(const AlbireoGemm &op, const Products<kDtype> &products, int64_t first_row, int num_rows,
                         int64_t panel) {
  alignas(64) float values[kPanel];
  const int64_t column = panel * kPanel, count = std::min<int64_t>(kPanel, op.weight.num_out - column);
  for (int row = 0; row < num_rows; row++) {
    for (int v = 0; v < kVectors; v++) {
      store(values + v * kWidth, products.value(op, first_row + row, row, panel, v));
    }
    const auto finish = op.epilogue == ALBIREO_ADD ? add_row : put_row;
    finish(op.out, first_row + row, column, values, count);
  }
}

template <int kDtype>
inline void finish_silu_mul(const AlbireoGemm &op, const Products<kDtype> &gate, const Products<kDtype> &up,
                            int64_t first_row, int num_rows, int64_t panel) {
  alignas(64) float values[kPanel];
  const int64_t column = panel / 2 * kPanel, count = std::min<int64_t>(kPanel, op.out.size - column);
  for (int row = 0; row < num_rows; row++) {
    for (int v = 0; v < kVectors; v++) {
      const Floats gated = silu(gate.value(op, first_row + row, row, panel, v));
      store(values + v * kWidth, gated * up.value(op, first_row + row, row, panel + 1, v));
    }
    put_row(op.out, first_row + row, column, values, count);
  }
}

template <int kDtype>
inline void multiply_part(const AlbireoGemm &op, int64_t first_row, int num_rows, int64_t panel) {
  Products<kDtype> products;
  products.make(op, first_row, num_rows, panel);
  if (op.epilogue != ALBIREO_SILU_MUL) return finish_panel(op, products, first_row, num_rows, panel);
  Products<kDtype> up;
  up.make(op, first_row, num_rows, panel + 1);
  finish_silu_mul(op, products, up, first_row, num_rows, panel);
}

template <int kDtype>
inline void gemm_of(const AlbireoGemm &op, int64_t num_rows, Worker &worker) {
#if ALBIREO_ISA == 3
  configure_tiles();
#endif
  const int64_t count = num_panels(op.weight.num_out), width = op.epilogue == ALBIREO_SILU_MUL ? 2 : 1;
  // Many rows come back to the panels: then no more than a core's cache holds. Few rows stream them once, and each new
  // start costs; but all threads shall end at about the same time.
  const int64_t fair = worker.num_threads == 1 ? count : count / (8 * worker.num_threads);
  const int64_t fitting = num_rows > kRowsAtOnce ? kBytesAtOnce / panel_bytes(kDtype, op.weight.num_in) : count;
  const int64_t at_once = std::max<int64_t>(1, std::min(fitting, fair) / width) * width;
  for (int64_t first; (first = worker.take(at_once)) < count;) {
    const int64_t last = std::min(first + at_once, count);
    for (int64_t row = 0; row < num_rows; row += kRowsAtOnce) {
      const int rows = (int)std::min<int64_t>(kRowsAtOnce, num_rows - row);
      for (int64_t panel = first; panel < last; panel += width) multiply_part<kDtype>(op, row, rows, panel);
    }
  }
}

inline void gemm(const AlbireoGemm &op, int32_t extent, const AlbireoStep &step, Worker &worker) {
  const int64_t num_rows = num_rows_of(step, extent);
  switch (op.weight.dtype) {
    case ALBIREO_FLOAT32: return gemm_of<ALBIREO_FLOAT32>(op, num_rows, worker);
    case ALBIREO_BFLOAT16: return gemm_of<ALBIREO_BFLOAT16>(op, num_rows, worker);
    default: return gemm_of<ALBIREO_INT8>(op, num_rows, worker);
  }
}

}  // namespace albireo
