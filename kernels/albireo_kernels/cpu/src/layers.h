// The operations of a decoder layer that work on single tokens: embedding, sums and norms, rotation, quantisation.
#pragma once

#include <algorithm>
#include <cmath>

#include "gemm.h"
#include "pack.h"
#include "worker.h"

namespace albireo {

inline constexpr int64_t kMaxHeadDim = 256;

inline void embed(const AlbireoEmbed &op, const AlbireoStep &step, Worker &worker) {
  const Share share(step.num_tokens, worker);
  for (int64_t token = share.begin; token < share.end; token++) {
    const int32_t id = step.from_last_token[token] ? step.last_tokens[step.token_slots[token]] : step.token_ids[token];
    const int64_t local = (int64_t)id - op.first_id;
    auto *to = (float *)op.out.data + token * op.out.stride;
    if (local < 0 || local >= op.table.num_out) {
      std::fill_n(to, op.out.size, 0.0f);
      continue;
    }
    const char *panel = panel_of(op.table, local / kPanel);
    const int lane = local % kPanel;
    for (int64_t k = 0; k < op.out.size; k++) {
      to[k] = element(panel + place_in_panel(op.table.dtype, lane, k), op.table.dtype, 0);
    }
  }
}

// 1 / sqrt(mean of squares + eps)
inline float inverse_rms(const float *x, int64_t size, float eps) {
  Floats squares = {};
  float rest = 0;
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) squares += load<Floats>(x + i) * load<Floats>(x + i);
  for (; i < size; i++) rest += x[i] * x[i];
  return 1.0f / std::sqrt((sum(squares) + rest) / size + eps);
}

// x * inverse * weight, the former product rounded where the model's own code rounds it.
template <class Value>
inline Value normed(Value x, float inverse, Value weight, bool rounds) {
  return weight * (rounds ? round_to_bfloat16(x * inverse) : x * inverse);
}

template <class Element>
inline void norm(const float *x, const float *weight, Element *to, int64_t size, float eps, bool rounds) {
  const float inverse = inverse_rms(x, size, eps);
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) {
    write(to + i, normed(load<Floats>(x + i), inverse, load<Floats>(weight + i), rounds));
  }
  for (; i < size; i++) write(to + i, normed(x[i], inverse, weight[i], rounds));
}

inline void norm_row(const AlbireoAddNorm &op, const float *x, int64_t row) {
  const int64_t start = row * op.out.stride, size = op.residual.size;
  if (op.out.dtype == ALBIREO_BFLOAT16) {
    norm(x, op.weight, (uint16_t *)op.out.data + start, size, op.eps, op.rounds);
  } else {
    norm(x, op.weight, (float *)op.out.data + start, size, op.eps, op.rounds);
  }
}

inline void add_partials(const AlbireoAddNorm &op, float *residual, int64_t row) {
  const int64_t size = op.residual.size, start = row * op.partial_stride;
  int first = 0;
  if (op.sets_residual) std::copy_n(op.partials[first++] + start, size, residual);
  for (int rank = first; rank < op.num_partials; rank++) {
    const float *partial = op.partials[rank] + start;
    for (int64_t i = 0; i < size; i++) residual[i] += partial[i];
  }
}

inline bool add_norm(const AlbireoAddNorm &op, int32_t extent, const AlbireoStep &step, Worker &worker) {
  if (op.num_partials > 0 && worker.num_ranks > 1 && !worker.meet()) return false;
  const Share share(num_rows_of(step, extent), worker);
  for (int64_t row = share.begin; row < share.end; row++) {
    const int64_t token = extent == ALBIREO_EACH_SAMPLE ? step.sample_tokens[row] : row;
    auto *residual = (float *)op.residual.data + token * op.residual.stride;
    if (op.num_partials > 0) add_partials(op, residual, token);
    norm_row(op, residual, row);
  }
  return true;
}

inline float largest_magnitude(const float *x, int64_t size) {
  Floats most = {};
  float rest = 0;
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) {
    const Floats value = load<Floats>(x + i);
    most = max(most, max(value, -value));
  }
  for (; i < size; i++) rest = std::max(rest, std::fabs(x[i]));
  return std::max(rest, largest(most));
}

inline void quantize(const AlbireoQuantize &op, int32_t extent, const AlbireoStep &step, Worker &worker) {
  typedef int8_t Bytes __attribute__((vector_size(kWidth)));
  constexpr float kRounding = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Share share(num_rows_of(step, extent), worker);
  for (int64_t row = share.begin; row < share.end; row++) {
    const auto *x = (const float *)op.x.data + row * op.x.stride;
    auto *to = (int8_t *)op.out.data + row * op.out.stride;
    const float scale = int8_scale(largest_magnitude(x, op.x.size)), inverse = 1.0f / scale;
    int64_t i = 0;
    for (; i + kWidth <= op.x.size; i += kWidth) {
      const Floats rounded = load<Floats>(x + i) * inverse + kRounding;
      store(to + i, __builtin_convertvector((Ints)rounded - (Ints)splat(kRounding), Bytes));
    }
    for (; i < op.x.size; i++) to[i] = (int8_t)(int32_t)((x[i] * inverse + kRounding) - kRounding);
    op.out.scales[row] = scale;
  }
}

// One head of one token, in place: norms it where the model does, and rotates it by the token's position.
inline void rotate_head(float *head, const AlbireoRope &op, const float *weight, int64_t position) {
  const int64_t half = op.head_dim / 2;
  const float *cos = op.cos + position * half, *sin = op.sin + position * half;
  if (weight != nullptr) norm(head, weight, head, op.head_dim, op.eps, op.rounds);
  for (int64_t i = 0; i < half; i++) {
    const float first = head[i], second = head[half + i];
    head[i] = first * cos[i] - second * sin[i];
    head[half + i] = second * cos[i] + first * sin[i];
  }
}

struct KvLayout {
  int32_t dtype, num_kv_heads, head_dim;

  int64_t key_bytes() const { return num_panels(kBlock) * panel_bytes(dtype, head_dim); }  // of one head in one block
  int64_t value_bytes() const { return num_panels(head_dim) * panel_bytes(dtype, kBlock); }
  char *keys(const void *cache, int64_t block, int64_t head) const {
    return (char *)cache + (block * num_kv_heads + head) * key_bytes();
  }
  char *values(const void *cache, int64_t block, int64_t head) const {
    return (char *)cache + (block * num_kv_heads + head) * value_bytes();
  }
};

// A head's elements in the cache's type.
struct HeadBytes {
  alignas(64) char bytes[4 * kMaxHeadDim];

  HeadBytes(int32_t dtype, const float *head, int64_t dim) {
    std::memset(bytes + dim / 2 * 4, 0, 4);  // the second half of an odd head's last pair
    const AlbireoRows row{bytes, nullptr, dim, dtype, (int32_t)dim};
    put_row(row, 0, 0, head, dim);
  }
};

// A key is one output of its block's matrix: 4 bytes of each group.
inline void write_key(const KvLayout &layout, char *block, int64_t offset, const HeadBytes &head) {
  char *to = block + offset / kPanel * panel_bytes(layout.dtype, layout.head_dim) + offset % kPanel * 4;
  const int64_t num_groups = round_up(layout.head_dim * bytes_of(layout.dtype), 4) / 4;
  for (int64_t group = 0; group < num_groups; group++) std::memcpy(to + group * kGroupBytes, head.bytes + 4 * group, 4);
}

// A value is one input of its block's matrix: an element of each output.
template <class Element>
inline void write_value(const KvLayout &layout, char *block, int64_t offset, const HeadBytes &head) {
  const int64_t bytes = panel_bytes(layout.dtype, kBlock), place = place_in_panel(layout.dtype, 0, offset);
  for (int64_t d = 0; d < layout.head_dim; d++) {
    std::memcpy(block + d / kPanel * bytes + d % kPanel * 4 + place, head.bytes + d * sizeof(Element), sizeof(Element));
  }
}

// An item is one KV head of one token, with the queries that read it.
inline void rope(const AlbireoRope &op, const AlbireoStep &step, Worker &worker) {
  const KvLayout layout{op.kv_dtype, op.num_kv_heads, op.head_dim};
  const int64_t group = op.num_heads / op.num_kv_heads, dim = op.head_dim;
  const Share share((int64_t)step.num_tokens * op.num_kv_heads, worker);
  for (int64_t item = share.begin; item < share.end; item++) {
    const int64_t token = item / op.num_kv_heads, kv_head = item % op.num_kv_heads;
    const int64_t position = step.positions[token], slot = step.slot_mapping[token];
    auto *qkv = (float *)op.qkv.data + token * op.qkv.stride;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
      rotate_head(qkv + head * dim, op, op.q_norm, position);
      put_row(op.q, token, head * dim, qkv + head * dim, dim);
    }
    float *key = qkv + (op.num_heads + kv_head) * dim, *value = key + op.num_kv_heads * dim;
    rotate_head(key, op, op.k_norm, position);
    const HeadBytes key_bytes(op.kv_dtype, key, dim), value_bytes(op.kv_dtype, value, dim);
    char *keys = layout.keys(op.keys, slot / kBlock, kv_head), *values = layout.values(op.values, slot / kBlock, kv_head);
    write_key(layout, keys, slot % kBlock, key_bytes);
    if (op.kv_dtype == ALBIREO_FLOAT32) {
      write_value<float>(layout, values, slot % kBlock, value_bytes);
    } else {
      write_value<uint16_t>(layout, values, slot % kBlock, value_bytes);
    }
  }
}

}  // namespace albireo
