// What is done to logits before temperature and filters, and the tokens that it depends on.
#pragma once

#include "row.h"

namespace albireo {
namespace sampling {

// The tokens of one slot; see AlbireoSlotTokens.
struct History {
  int32_t *ids, *counts, *num_ids, *recent, *num_output;
  int32_t capacity;

  History(const AlbireoSlotTokens &of, int32_t slot)
      : ids(of.ids + (int64_t)slot * of.capacity),
        counts(of.counts + (int64_t)slot * of.capacity),
        num_ids(of.num_ids + slot),
        recent(of.recent + (int64_t)slot * ALBIREO_NUM_RECENT),
        num_output(of.num_output + slot),
        capacity(of.capacity) {}

  // The output's token `back` places before its next one.
  int32_t token_before(int64_t back) const { return recent[(*num_output - back) % ALBIREO_NUM_RECENT]; }
};

inline bool is_in(int32_t id, int32_t first_id, int32_t num_ids) { return id >= first_id && id - first_id < num_ids; }

inline void begin_history(const AlbireoSelect &op, const AlbireoHistories &from, int32_t index) {
  const History history(op.slot_tokens, from.slots[index]);
  int32_t count = 0;
  for (int64_t i = from.starts[index]; i < from.starts[index + 1]; i++) {
    if (!is_in(from.ids[i], op.logits.first_id, op.logits.num_ids)) continue;
    history.ids[count] = from.ids[i];
    history.counts[count++] = from.counts[i];
  }
  *history.num_ids = count;
  *history.num_output = from.num_output[index];
  std::copy_n(from.recent + (int64_t)index * ALBIREO_NUM_RECENT, ALBIREO_NUM_RECENT, history.recent);
}

inline void remember(const History &history, int32_t token, bool counts_here) {
  history.recent[*history.num_output % ALBIREO_NUM_RECENT] = token;
  ++*history.num_output;
  if (!counts_here) return;
  const int32_t *end = history.ids + *history.num_ids, *found = std::find(history.ids, (int32_t *)end, token);
  const int64_t place = found - history.ids;
  if (found == end) {
    if (*history.num_ids == history.capacity) return;  // no sequence has so many tokens
    history.ids[place] = token;
    history.counts[place] = 0;
    ++*history.num_ids;
  }
  history.counts[place] += 2;
}

inline void forbid(const Row &row, int32_t id) {
  if (is_in(id, row.first_id, row.num_ids)) row.logits[id - row.first_id] = -kInfinity;
}

inline void allow_only(const Row &row, const uint32_t *allowed) {
  for (int32_t place = 0; place < row.num_ids;) {
    const int32_t id = row.first_id + place;
    const int32_t count = std::min(32 - id % 32, row.num_ids - place);  // of ids whose bits lie in one word
    const uint32_t bits = allowed[id / 32] >> (id % 32);
    for (int32_t i = 0; i < count && bits != 0xFFFFFFFFu; i++) {
      if (!(bits >> i & 1)) row.logits[place + i] = -kInfinity;
    }
    place += count;
  }
}

// Whether a word's tokens but the last are the latest of the output.
inline bool precedes(const History &history, const int32_t *word, int64_t num_tokens) {
  const int64_t num_before = num_tokens - 1;
  if (*history.num_output < num_before) return false;
  for (int64_t i = 0; i < num_before; i++) {
    if (history.token_before(num_before - i) != word[i]) return false;
  }
  return true;
}

// A product that is rounded to float32 before anything is added to it, whatever the compiler would like to fuse.
inline float product(float a, float b) { return (float)((double)a * b); }

inline void penalise(const Row &row, const History &history, float repetition, float presence, float frequency) {
  for (int32_t i = 0; i < *history.num_ids; i++) {
    float &logit = row.logits[history.ids[i] - row.first_id];
    const int32_t num_output = history.counts[i] / 2;
    logit = logit > 0 ? logit / repetition : product(logit, repetition);
    logit -= product(frequency, (float)num_output);
    if (num_output) logit -= presence;
  }
}

// Edits row `index` of the step.
inline void edit(const Row &row, const AlbireoEdits &edits, int64_t index, const History &history) {
  for (int64_t i = edits.bias_starts[index]; i < edits.bias_starts[index + 1]; i++) {
    const int32_t id = edits.bias_ids[i];
    if (is_in(id, row.first_id, row.num_ids)) row.logits[id - row.first_id] += edits.biases[i];
  }
  if (edits.allowed[index] != nullptr) allow_only(row, edits.allowed[index]);
  for (int64_t i = edits.word_starts[index]; i < edits.word_starts[index + 1]; i++) {
    const int32_t *word = edits.word_tokens + edits.word_token_starts[i];
    const int64_t num_tokens = edits.word_token_starts[i + 1] - edits.word_token_starts[i];
    if (precedes(history, word, num_tokens)) forbid(row, word[num_tokens - 1]);
  }
  const float repetition = edits.repetition_penalty[index], presence = edits.presence_penalty[index],
              frequency = edits.frequency_penalty[index];
  if (repetition != 1 || presence != 0 || frequency != 0) penalise(row, history, repetition, presence, frequency);
}

}  // namespace sampling
}  // namespace albireo
