// Causal attention over paged blocks, for rows of any mix of prefill and decode.
//
// An item of work is one KV head of a few tokens of one row: all queries that read that head (at most kMaxQueries) against
// the row's blocks, with a softmax that is corrected as it goes (Milakov and Gimelshein 2018; Dao et al. 2022). A block's
// keys are a packed matrix of 32 outputs, its values one of 32 inputs, so both products are those of panel.h:
//
//     scores[query][32] = q . keys        out[query][head_dim] += weights . values
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "layers.h"
#include "panel.h"
#include "worker.h"

namespace albireo {

inline constexpr int64_t kMaxQueries = 32;
inline constexpr int64_t kBlocksAtOnce = 8;  // between corrections of the softmax; four for many queries
inline constexpr int64_t kScores = kBlocksAtOnce * kBlock;

// What an item works with; one for each thread, on its stack.
template <int kDtype>
struct AttentionScratch {
  using X = typename Types<kDtype>::X;
  alignas(64) X queries[kMaxQueries * kMaxHeadDim];
  alignas(64) float scores[kMaxQueries * kScores];
  alignas(64) X weights[kMaxQueries * kScores];  // of keys, after the softmax
  alignas(64) float out[kMaxQueries * kMaxHeadDim];
  alignas(64) char values[kMaxHeadDim * kBlock * 4];  // of a block that is not full
  float largest[kMaxQueries], total[kMaxQueries];
};

// The tokens [first, last) of a row; their positions begin at `position`.
struct Queries {
  int64_t row, first, last, position;
};

// Goes through the parts of a step's rows that are worked on together, in order.
class QueryParts {
 public:
  QueryParts(const AlbireoStep &step, int64_t tokens_at_once) : step_(step), at_once_(tokens_at_once) {}

  // The part with this index, which may only grow from call to call. False: there is none.
  bool find(int64_t index, Queries &queries) {
    for (; row_ < step_.num_rows; row_++) {
      const int64_t start = step_.query_starts[row_], count = step_.query_starts[row_ + 1] - start;
      const int64_t parts = (count + at_once_ - 1) / at_once_;
      if (index < num_before_ + parts) {
        const int64_t first = (index - num_before_) * at_once_;
        queries = {row_, start + first, start + std::min(first + at_once_, count), step_.context_lens[row_] - count + first};
        return true;
      }
      num_before_ += parts;
    }
    return false;
  }

 private:
  const AlbireoStep &step_;
  int64_t at_once_, row_ = 0, num_before_ = 0;
};

template <int kDtype>
class Attention {
  using T = Types<kDtype>;
  using X = typename T::X;

 public:
  Attention(const AlbireoAttention &op, const AlbireoStep &step, AttentionScratch<kDtype> &scratch)
      : op_(op), step_(step), scratch_(scratch), layout_{kDtype, op.num_kv_heads, op.head_dim},
        group_(op.num_heads / op.num_kv_heads), padded_dim_(padded_in(kDtype, op.head_dim)),
        out_stride_(num_panels(op.head_dim) * kPanel), scale_(1.0f / std::sqrt((float)op.head_dim)) {}

  void run(const Queries &queries, int64_t kv_head) {
    num_queries_ = (queries.last - queries.first) * group_;
    copy_queries(queries, kv_head);
    std::fill_n(scratch_.out, touched_rows(num_queries_) * out_stride_, 0.0f);
    std::fill_n(scratch_.largest, num_queries_, -std::numeric_limits<float>::infinity());
    std::fill_n(scratch_.total, num_queries_, 0.0f);
    const int64_t end = queries.position + queries.last - queries.first;  // of the keys that the last token sees
    const int64_t begin = op_.sliding_window ? std::max<int64_t>(0, queries.position - op_.sliding_window + 1) : 0;
    const int64_t at_once = (num_queries_ > 8 ? 4 : kBlocksAtOnce) * kBlock;
    for (int64_t key = begin / kBlock * kBlock; key < end; key += at_once) {
      attend(queries, kv_head, key, std::min(key + at_once, end));
    }
    put_out(queries, kv_head);
  }

 private:
  void copy_queries(const Queries &queries, int64_t kv_head) {
    X *to = scratch_.queries;
    for (int64_t token = queries.first; token < queries.last; token++) {
      const X *from = (const X *)op_.q.data + token * op_.q.stride + kv_head * group_ * op_.head_dim;
      for (int64_t head = 0; head < group_; head++, to += padded_dim_, from += op_.head_dim) {
        std::copy_n(from, op_.head_dim, to);
        std::fill(to + op_.head_dim, to + padded_dim_, X{});
      }
    }
  }

  int64_t block_at(const Queries &queries, int64_t key) const {
    return step_.block_tables[queries.row * step_.block_table_stride + key / kBlock];
  }

  // All queries against the keys [begin, end), which start on a block's edge.
  void attend(const Queries &queries, int64_t kv_head, int64_t begin, int64_t end) {
    const int64_t keys_bytes = panel_bytes(kDtype, op_.head_dim), width = round_up(end - begin, kBlock);
    for (int64_t key = begin; key < end; key += kBlock) {
      const char *keys = layout_.keys(op_.keys, block_at(queries, key), kv_head);
      for (int panel = 0; panel < kBlock / kPanel; panel++) {
        multiply<kDtype>(scratch_.queries, padded_dim_, (int)num_queries_, keys + panel * keys_bytes,
                         padded_dim_ / T::kGroup, nullptr, scratch_.scores + key - begin + panel * kPanel, kScores, false);
      }
    }
    for (int64_t query = 0; query < num_queries_; query++) {
      const int64_t position = queries.position + query / group_;
      const int64_t first = op_.sliding_window ? std::max(begin, position - op_.sliding_window + 1) : begin;
      weigh(query, first - begin, std::min(position + 1, end) - begin, width);
    }
    for (int64_t key = begin; key < end; key += kBlock) {
      add_values(layout_.values(op_.values, block_at(queries, key), kv_head), key - begin, std::min(kBlock + key, end) - key);
    }
  }

  // Scores of a query to the weights of its keys; only [first, last) of [0, width) are seen. Corrects what was added up
  // before to the new largest score.
  void weigh(int64_t query, int64_t first, int64_t last, int64_t width) {
    constexpr float kNone = -std::numeric_limits<float>::infinity();
    float *scores = scratch_.scores + query * kScores;
    X *weights = scratch_.weights + query * kScores;
    if (first >= last) {
      std::fill_n(weights, width, X{});
      return;
    }
    std::fill(scores, scores + first, kNone);
    std::fill(scores + last, scores + width, kNone);
    Floats most = splat(kNone);
    for (int64_t i = 0; i < width; i += kWidth) most = max(most, load<Floats>(scores + i));
    const float before = scratch_.largest[query], largest = std::max(before, albireo::largest(most) * scale_);
    Floats total = {};
    for (int64_t i = 0; i < width; i += kWidth) {
      const Floats weight = exp(load<Floats>(scores + i) * scale_ - largest);
      total += weight;
      write(weights + i, weight);
    }
    const float kept = before == kNone ? 0.0f : std::exp(before - largest);
    if (kept != 1.0f) {
      float *out = scratch_.out + query * out_stride_;
      for (int64_t d = 0; d < out_stride_; d += kWidth) store(out + d, load<Floats>(out + d) * kept);
    }
    scratch_.total[query] = scratch_.total[query] * kept + sum(total);
    scratch_.largest[query] = largest;
  }

  void add_values(const char *values, int64_t first, int64_t count) {
    const int64_t bytes = panel_bytes(kDtype, kBlock);
    // Vectors stop at the last key; tiles take whole blocks.
    const bool is_whole = count == kBlock || (kIsa < ALBIREO_AMX && count % T::kGroup == 0);
    const int64_t num_groups = kIsa < ALBIREO_AMX ? (count + T::kGroup - 1) / T::kGroup : kBlock / T::kGroup;
    if (!is_whole) values = copy_block(values, count, num_groups);
    for (int64_t panel = 0; panel < num_panels(op_.head_dim); panel++) {
      multiply<kDtype>(scratch_.weights + first, kScores, (int)num_queries_, values + panel * bytes, num_groups, nullptr,
                       scratch_.out + panel * kPanel, out_stride_, true);
    }
  }

  // The values of a block that is not full, with zeros for what lies past its end: that may be anything, and weights of 0
  // do not make 0 of everything.
  const char *copy_block(const char *values, int64_t count, int64_t num_groups) {
    const int64_t bytes = panel_bytes(kDtype, kBlock), whole = count / T::kGroup;
    for (int64_t panel = 0; panel < num_panels(op_.head_dim); panel++) {
      char *to = scratch_.values + panel * bytes;
      std::memcpy(to, values + panel * bytes, num_groups * kGroupBytes);
      std::memset(to + (whole + (count % T::kGroup != 0)) * kGroupBytes, 0,
                  (num_groups - whole - (count % T::kGroup != 0)) * kGroupBytes);
      if (count % T::kGroup == 0) continue;
      for (int lane = 0; lane < kPanel; lane++) {
        const int64_t used = count % T::kGroup * bytes_of(kDtype);
        std::memset(to + whole * kGroupBytes + lane * 4 + used, 0, 4 - used);
      }
    }
    return scratch_.values;
  }

  void put_out(const Queries &queries, int64_t kv_head) {
    for (int64_t query = 0; query < num_queries_; query++) {
      float *out = scratch_.out + query * out_stride_;
      const float inverse = 1.0f / scratch_.total[query];
      for (int64_t d = 0; d < out_stride_; d += kWidth) store(out + d, load<Floats>(out + d) * inverse);
      const int64_t head = kv_head * group_ + query % group_;
      put_row(op_.out, queries.first + query / group_, head * op_.head_dim, out, op_.head_dim);
    }
  }

  const AlbireoAttention &op_;
  const AlbireoStep &step_;
  AttentionScratch<kDtype> &scratch_;
  const KvLayout layout_;
  const int64_t group_, padded_dim_, out_stride_;
  const float scale_;
  int64_t num_queries_ = 0;
};

template <int kDtype>
inline void attention_of(const AlbireoAttention &op, const AlbireoStep &step, Worker &worker) {
#if ALBIREO_ISA == 3
  configure_tiles();
#endif
  static thread_local AttentionScratch<kDtype> scratch;
  Attention<kDtype> attention(op, step, scratch);
  const int64_t group = op.num_heads / op.num_kv_heads;
  QueryParts parts(step, std::max<int64_t>(1, kMaxQueries / group));
  Queries queries;
  for (int64_t item; item = worker.take(1), parts.find(item / op.num_kv_heads, queries);) {
    attention.run(queries, item % op.num_kv_heads);
  }
}

inline void attention(const AlbireoAttention &op, const AlbireoStep &step, Worker &worker) {
  if (op.kv_dtype == ALBIREO_FLOAT32) return attention_of<ALBIREO_FLOAT32>(op, step, worker);
  attention_of<ALBIREO_BFLOAT16>(op, step, worker);
}

}  // namespace albireo
