// Sampling as a program of four operations: exchange, select, draw, publish. See albireo_cpu.h.
#pragma once

#include "choose.h"
#include "edit.h"
#include "logprobs.h"

namespace albireo {
namespace sampling {

inline Row row_of(const AlbireoColumns &columns, const AlbireoSampling &sampling, int64_t index) {
  return {
      .logits = columns.data + index * columns.stride,
      .first_id = columns.first_id,
      .num_ids = columns.num_ids,
      .temperature = sampling.temperature[index],
      .top_k = std::max(sampling.top_k[index], 0),
      .top_p = sampling.top_p[index],
      .min_p = sampling.min_p[index],
      .k0 = (uint32_t)sampling.noise_keys[index],
      .k1 = (uint32_t)(sampling.noise_keys[index] >> 32),
  };
}

// Samples before this one draw; the others are scored.
inline int32_t num_drawn(const AlbireoStep &step) { return step.num_samples - step.num_scored; }

inline bool wants_logprobs(const AlbireoSampling &sampling, int64_t index) {
  return sampling.logprobs != nullptr && sampling.logprobs->num_top[index] >= 0;
}

// Calls `work` with all rows or the rank's own, each on the thread that is first to claim it.
template <class Work>
inline void for_each_row(int32_t rows, int64_t num_rows, Worker &worker, Work work) {
  const bool takes_all = rows == ALBIREO_ALL_ROWS;
  for (;;) {
    const int64_t taken = worker.take(1);
    const int64_t index = takes_all ? taken : worker.rank + taken * worker.num_ranks;
    if (index >= num_rows) return;
    work(index);
  }
}

inline void select_row(const Row &row, const Scratch &scratch, AlbireoCandidates &out) {
  Best best = kNone;
  out.num_keys = 0;
  switch (route_of(row)) {
    case Route::kGreedy: best = best_of(row); break;
    case Route::kNoisy: best = noisy_best_of(row, kNoCut); break;
    case Route::kCandidates: {
      out.num_keys = (int32_t)find_top(row, row.top_k, scratch);
      std::copy_n(scratch.keys, out.num_keys, out.keys);
      break;
    }
    case Route::kWhole: break;
  }
  out.score = best.score;
  out.id = best.id;
}

inline int32_t draw_row(const AlbireoDraw &op, Row row, int64_t index, const Scratch &scratch) {
  Best best = kNone;
  switch (route_of(row)) {
    case Route::kGreedy:
    case Route::kNoisy:
      for (int i = 0; i < op.num_candidates; i++) {
        const AlbireoCandidates &candidates = op.candidates[i][index];
        best = better(best, {candidates.score, candidates.id});
      }
      break;
    case Route::kCandidates: {
      int64_t count = 0;
      for (int i = 0; i < op.num_candidates; i++) {
        const AlbireoCandidates &candidates = op.candidates[i][index];
        std::copy_n(candidates.keys, candidates.num_keys, scratch.keys + count);
        count += candidates.num_keys;
      }
      best = draw_from_candidates(row, scratch.keys, count);
      break;
    }
    case Route::kWhole:
      if (row.top_k >= row.num_ids) row.top_k = 0;
      best = draw_filtered(row, scratch);
      break;
  }
  return best.id == kNoToken ? 0 : best.id;  // a row without values
}

}  // namespace sampling

// Scratch of one thread, a whole number of cache lines.
inline int64_t sample_scratch_bytes(int32_t vocab_size) { return sampling::Layout(vocab_size).end; }

// Why ranks meet where they do. Candidates and logits are written by all ranks, and read by others after the meeting of
// `draw`; tokens are written after that, and read after the meeting of `publish`. Nothing is written again before its
// readers have come to a later meeting: candidates and logits of the next step after this step's `publish`, its tokens
// after the next step's `draw`, to which everyone comes only with the tokens of this step read. Copies of an `exchange`
// are each rank's own, and what they were copied from is written after the next step's forward pass, in which all meet.

// False, of all of these: aborted.
inline bool exchange(const AlbireoExchange &op, const AlbireoStep &step, Worker &worker) {
  if (!worker.meet()) return false;
  sampling::for_each_row(op.rows, step.num_samples, worker, [&](int64_t index) {
    std::copy_n(op.from + index * op.from_stride, op.vocab_size, op.to + index * op.to_stride);
  });
  return true;
}

inline void select_candidates(const AlbireoSelect &op, const AlbireoStep &step, Worker &worker) {
  const AlbireoSampling &by = step.sampling;
  if (by.histories != nullptr) {
    const Share share(by.histories->num_histories, worker);
    for (int64_t i = share.begin; i < share.end; i++) sampling::begin_history(op, *by.histories, (int32_t)i);
    worker.wait_for_team();
  }
  const sampling::Scratch scratch = sampling::scratch_of(op.scratch, worker);
  sampling::for_each_row(op.rows, sampling::num_drawn(step), worker, [&](int64_t index) {
    const sampling::Row row = sampling::row_of(op.logits, by, index);
    if (by.edits != nullptr) {
      if (sampling::wants_logprobs(by, index)) std::copy_n(row.logits, row.num_ids, op.raw + index * op.logits.stride);
      sampling::edit(row, *by.edits, index, sampling::History(op.slot_tokens, step.sample_slots[index]));
    }
    sampling::select_row(row, scratch, op.candidates[index]);
  });
}

inline bool draw_tokens(const AlbireoDraw &op, const AlbireoStep &step, Worker &worker) {
  if (op.meets && !worker.meet()) return false;
  const AlbireoSampling &by = step.sampling;
  const sampling::Scratch scratch = sampling::scratch_of(op.scratch, worker);
  sampling::for_each_row(op.rows, step.num_samples, worker, [&](int64_t index) {
    sampling::Row row = sampling::row_of(op.logits, by, index);
    const int64_t scored = index - sampling::num_drawn(step);
    op.tokens[index] = scored < 0 ? sampling::draw_row(op, row, index, scratch) : step.scored_token_ids[scored];
    if (!sampling::wants_logprobs(by, index)) return;
    if (by.edits != nullptr && scored < 0) row.logits = op.raw + index * op.logits.stride;
    sampling::tell_logprobs(row, op.tokens[index], by.logprobs->num_top[index], scratch, op.logprobs[index]);
  });
  return true;
}

inline void publish_logprobs(const AlbireoTokenLogprobs &of, const AlbireoLogprobs &to, int64_t index) {
  to.logprobs[index] = of.logprob;
  to.ranks[index] = of.rank;
  std::copy_n(of.top_ids, of.num_top, to.top_ids + index * ALBIREO_MAX_TOP);
  std::copy_n(of.top_logprobs, of.num_top, to.top_logprobs + index * ALBIREO_MAX_TOP);
}

inline bool publish(const AlbireoPublish &op, AlbireoStep &step, Worker &worker) {
  if (op.meets && !worker.meet()) return false;
  const AlbireoSampling &by = step.sampling;
  const Share share(step.num_samples, worker);
  for (int64_t i = share.begin; i < share.end; i++) {
    const int32_t token = op.tokens[i];
    step.tokens[i] = token;
    if (sampling::wants_logprobs(by, i)) publish_logprobs(op.logprobs[i], *by.logprobs, i);
    if (i >= sampling::num_drawn(step)) continue;
    const int32_t slot = step.sample_slots[i];
    step.last_tokens[slot] = token;
    if (by.edits != nullptr && by.edits->has_history[i]) {
      const bool counts_here = sampling::is_in(token, op.first_id, op.num_ids);
      sampling::remember(sampling::History(op.slot_tokens, slot), token, counts_here);
    }
  }
  return true;
}

}  // namespace albireo
