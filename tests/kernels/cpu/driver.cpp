// A tiny decoder on two ranks of two threads each, for sanitizers: every operation, in steps that are queued ahead, an
// abort while a rank waits, and a second life of the group. Prints "ok". Buffers are exactly as large as the interface
// asks for.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "albireo_cpu.h"

namespace {

constexpr int kRanks = 2, kThreads = 2, kLayers = 2;
constexpr int kVocab = 75, kHidden = 40, kInner = 24, kHeadDim = 16, kHeads = 2, kKvHeads = 1;  // of a rank, but for hidden
constexpr int kMaxTokens = 80, kRows = 3, kBlocks = 9, kSteps = 12, kAhead = 3;
constexpr int kFullVocab = kRanks * kVocab, kWidth = (kHeads + 2 * kKvHeads) * kHeadDim;
constexpr int64_t kSecond = 1'000'000'000;

#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::fprintf(stderr, "line %d: %s does not hold\n", __LINE__, #condition); \
      std::abort();                                                       \
    }                                                                     \
  } while (0)

struct Free {
  void operator()(void *memory) const { std::free(memory); }
};

// Zeros, aligned, which live as long as the owner.
class Arena {
 public:
  template <class T>
  T *make(int64_t count) {
    const int64_t bytes = (count * (int64_t)sizeof(T) + 63) / 64 * 64;
    void *memory = std::aligned_alloc(64, bytes);
    std::memset(memory, 0, bytes);
    owned_.emplace_back(memory);
    return (T *)memory;
  }

  float *random(int64_t count) {
    float *values = make<float>(count);
    for (int64_t i = 0; i < count; i++) {
      state_ = state_ * 6364136223846793005u + 1442695040888963407u;
      values[i] = (float)(state_ >> 40) / (1 << 23) - 1.0f;
    }
    return values;
  }

  AlbireoRows rows(int64_t count, int size, int dtype) {
    const int bytes = dtype == ALBIREO_FLOAT32 ? 4 : dtype == ALBIREO_INT8 ? 1 : 2;
    const int64_t stride = (size * bytes + 63) / 64 * 64 / bytes;
    float *scales = dtype == ALBIREO_INT8 ? make<float>(count) : nullptr;
    return {make<char>((count + 15) * stride * bytes), scales, stride, dtype, size};
  }

  AlbireoMatrix matrix(int dtype, int num_out, int num_in, int parts = 1) {
    AlbireoMatrix matrix = {nullptr, nullptr, nullptr, dtype, num_out, num_in, 0};
    matrix.data = make<char>(albireo_matrix_bytes(dtype, num_out, num_in, &matrix.padded_in));
    const int panels = (num_out + 15) / 16;
    if (dtype == ALBIREO_INT8) {
      matrix.scales = make<float>(panels * 16);
      matrix.sums = make<int32_t>(panels * 16);
    }
    for (int part = 0; part < parts; part++) {
      const int outputs = parts == 1 ? num_out : kInner;
      albireo_pack(&matrix, random(outputs * num_in), ALBIREO_FLOAT32, num_in, outputs, part, parts);
    }
    return matrix;
  }

  explicit Arena(uint64_t seed) : state_(seed) {}

 private:
  uint64_t state_;
  std::vector<std::unique_ptr<void, Free>> owned_;
};

// What the ranks share.
struct Shared {
  Arena arena{1};
  float *partials[2][kRanks];  // by turns
  float *logits = arena.make<float>(kRows * kFullVocab);
  float *raw = arena.make<float>(kRows * kFullVocab);
  AlbireoCandidates *candidates[kRanks];
  AlbireoTokenLogprobs *logprobs = arena.make<AlbireoTokenLogprobs>(kRows);
  int32_t *tokens = arena.make<int32_t>(kRows);
  Shared() {
    for (auto &of_rank : candidates) of_rank = arena.make<AlbireoCandidates>(kRows);
    for (auto &turn : partials) {
      for (float *&partial : turn) partial = arena.make<float>(kMaxTokens * kHidden);
    }
  }
};

class Model {
 public:
  Model(Shared &shared, int rank) : shared_(shared), rank_(rank), arena_(100 + rank) {
    const AlbireoRows embedded = over(shared.partials[0][rank], kHidden);
    add(ALBIREO_OP_EMBED).of.embed = {arena_.matrix(ALBIREO_BFLOAT16, kVocab, kHidden), rank * kVocab, 0, embedded};
    for (int layer = 0; layer < kLayers; layer++) add_layer(layer);
    const int dtype = ALBIREO_BFLOAT16;
    const AlbireoRows last = arena_.rows(kRows, kHidden, albireo_input_dtype(dtype));
    add_norm(0, false, last, ALBIREO_EACH_SAMPLE);
    AlbireoRows logits = {shared.logits + rank * kVocab, nullptr, kFullVocab, ALBIREO_FLOAT32, kVocab};
    add_gemm(last, arena_.matrix(dtype, kVocab, kHidden), logits, ALBIREO_STORE, ALBIREO_EACH_SAMPLE);
    add_sampling();
  }

  AlbireoProgram forward() const { return {ops_.data(), (int32_t)ops_.size(), 0}; }
  AlbireoProgram sample() const { return {sample_ops_.data(), (int32_t)sample_ops_.size(), 0}; }

 private:
  AlbireoOp &add(AlbireoOpKind kind, AlbireoExtent extent = ALBIREO_EACH_TOKEN) {
    ops_.push_back({});
    ops_.back().kind = kind;
    ops_.back().extent = extent;
    return ops_.back();
  }

  AlbireoRows over(float *data, int size) const { return {data, nullptr, size, ALBIREO_FLOAT32, size}; }

  void add_norm(int turn, bool sets, const AlbireoRows &out, AlbireoExtent extent = ALBIREO_EACH_TOKEN) {
    AlbireoAddNorm &op = add(ALBIREO_OP_ADD_NORM, extent).of.add_norm;
    op = {residual_, {}, kRanks, sets, kHidden, arena_.random(kHidden), 1e-5f, out.dtype == ALBIREO_BFLOAT16, out};
    for (int rank = 0; rank < kRanks; rank++) op.partials[rank] = shared_.partials[turn][rank];
  }

  void add_gemm(const AlbireoRows &x, const AlbireoMatrix &weight, const AlbireoRows &out, AlbireoEpilogue epilogue,
                AlbireoExtent extent = ALBIREO_EACH_TOKEN) {
    const float *bias = epilogue == ALBIREO_STORE ? arena_.random(weight.num_out) : nullptr;
    add(ALBIREO_OP_GEMM, extent).of.gemm = {x, weight, bias, out, epilogue, 0};
  }

  void add_layer(int layer) {
    const int dtype = layer % 2 ? ALBIREO_BFLOAT16 : ALBIREO_FLOAT32, input = albireo_input_dtype(dtype);
    const AlbireoRows normed = arena_.rows(kMaxTokens, kHidden, input), qkv = arena_.rows(kMaxTokens, kWidth, ALBIREO_FLOAT32);
    add_norm(0, layer == 0, normed);
    add_gemm(normed, arena_.matrix(dtype, kWidth, kHidden), qkv, ALBIREO_STORE);
    const AlbireoRows attended = add_attention(qkv, dtype, layer);
    add_gemm(attended, arena_.matrix(dtype, kHidden, kHeads * kHeadDim), over(shared_.partials[1][rank_], kHidden), ALBIREO_STORE);
    add_norm(1, false, normed);
    const AlbireoRows gated = arena_.rows(kMaxTokens, kInner, ALBIREO_FLOAT32), integers = arena_.rows(kMaxTokens, kInner, ALBIREO_INT8);
    add_gemm(normed, arena_.matrix(dtype, 64, kHidden, 2), gated, ALBIREO_SILU_MUL);
    add(ALBIREO_OP_QUANTIZE).of.quantize = {gated, integers};
    add_gemm(integers, arena_.matrix(ALBIREO_INT8, kHidden, kInner), over(shared_.partials[0][rank_], kHidden), ALBIREO_STORE);
  }

  AlbireoRows add_attention(const AlbireoRows &qkv, int dtype, int layer) {
    int32_t unused;
    char *keys = arena_.make<char>(kBlocks * kKvHeads * albireo_matrix_bytes(dtype, ALBIREO_BLOCK, kHeadDim, &unused));
    char *values = arena_.make<char>(kBlocks * kKvHeads * albireo_matrix_bytes(dtype, kHeadDim, ALBIREO_BLOCK, &unused));
    const int input = albireo_input_dtype(dtype);
    const AlbireoRows q = arena_.rows(kMaxTokens, kHeads * kHeadDim, input), out = arena_.rows(kMaxTokens, kHeads * kHeadDim, input);
    const float *norm = layer ? arena_.random(kHeadDim) : nullptr;
    const float *cos = arena_.random(kBlocks * 32 * kHeadDim / 2), *sin = arena_.random(kBlocks * 32 * kHeadDim / 2);
    add(ALBIREO_OP_ROPE).of.rope = {qkv, q, norm, norm, cos, sin, keys, values, dtype, kHeads, kKvHeads, kHeadDim, 1e-5f, 0};
    add(ALBIREO_OP_ATTENTION).of.attention = {q, out, keys, values, dtype, kHeads, kKvHeads, kHeadDim, layer ? 20 : 0, 0};
    return out;
  }

  // Candidates of each rank's own columns are merged.
  void add_sampling() {
    const int64_t bytes = (albireo_sample_scratch_bytes(kFullVocab) + 63) / 64 * 64;
    const AlbireoScratch scratch = {arena_.make<char>(kThreads * bytes), bytes, kFullVocab, 0};
    const AlbireoSlotTokens slot_tokens = {arena_.make<int32_t>(kRows * kFullVocab), arena_.make<int32_t>(kRows * kFullVocab),
                                           arena_.make<int32_t>(kRows), arena_.make<int32_t>(kRows * ALBIREO_NUM_RECENT),
                                           arena_.make<int32_t>(kRows), kFullVocab, 0};
    sample_ops_.resize(3);
    const int32_t first = rank_ * kVocab;
    sample_ops_[0].kind = ALBIREO_OP_SELECT;
    sample_ops_[0].of.select = {{shared_.logits + first, kFullVocab, first, kVocab}, shared_.raw + first,
                                shared_.candidates[rank_], slot_tokens, scratch, ALBIREO_ALL_ROWS, 0};
    sample_ops_[1].kind = ALBIREO_OP_DRAW;
    AlbireoDraw &draw = sample_ops_[1].of.draw;
    draw = {{shared_.logits, kFullVocab, 0, kFullVocab}, shared_.raw, {}, kRanks, 1, shared_.tokens, shared_.logprobs,
            scratch, ALBIREO_OWN_ROWS, 0};
    for (int rank = 0; rank < kRanks; rank++) draw.candidates[rank] = shared_.candidates[rank];
    sample_ops_[2].kind = ALBIREO_OP_PUBLISH;
    sample_ops_[2].of.publish = {shared_.tokens, shared_.logprobs, slot_tokens, first, kVocab, 1, 0};
  }

  Shared &shared_;
  int rank_;
  Arena arena_;
  AlbireoRows residual_ = arena_.rows(kMaxTokens, kHidden, ALBIREO_FLOAT32);
  std::vector<AlbireoOp> ops_;
  std::vector<AlbireoOp> sample_ops_;
};

// Step 0 computes prompts of several lengths; each further one, a token of each row.
struct Step {
  static constexpr int kPrompts[kRows] = {5, 31, 44};
  std::vector<int32_t> ids, slots, contexts, tables, sample_slots, top_k, bias_ids, tokens;
  std::vector<uint8_t> from_last;
  std::vector<int64_t> positions, mapping, starts{0}, sample_tokens, bias_starts{0};
  std::vector<float> temperature, top_p, min_p, biases;
  std::vector<uint64_t> keys;
  // Of the middle row: penalties, a bad word of two tokens, and an odd bit field; of the last one: logprobs.
  std::vector<uint32_t> odd_ids = std::vector<uint32_t>(kFullVocab / 32 + 1, 0xAAAAAAAAu);
  std::vector<const uint32_t *> allowed{nullptr, odd_ids.data(), nullptr};
  std::vector<int64_t> word_starts{0, 0, 1, 1}, word_token_starts{0, 2};
  std::vector<int32_t> word_tokens{5, 7}, num_top{-1, -1, 20}, ranks = std::vector<int32_t>(kRows);
  std::vector<float> repetition{1, 1.2f, 1}, presence{0, 0.5f, 0}, frequency{0, 0.1f, 0};
  std::vector<uint8_t> has_history{0, 1, 0};
  std::vector<float> logprobs = std::vector<float>(kRows), top_logprobs = std::vector<float>(kRows * ALBIREO_MAX_TOP);
  std::vector<int32_t> top_ids = std::vector<int32_t>(kRows * ALBIREO_MAX_TOP);
  std::vector<int32_t> history_slots{kRows - 2}, history_ids{3, 9, 40}, history_counts{1, 3, 2}, num_output{1};
  std::vector<int32_t> recent = std::vector<int32_t>(ALBIREO_NUM_RECENT, 5);
  std::vector<int64_t> history_starts{0, 3};
  AlbireoEdits edits{};
  AlbireoHistories histories{};
  AlbireoLogprobs told{};
  AlbireoStep c{};

  Step(int index, int32_t *last_tokens) {
    for (int row = 0; row < kRows; row++) add_row(row, index);
    tokens.resize(kRows);
    c.num_tokens = (int32_t)ids.size();
    c.num_rows = c.num_samples = kRows;
    c.block_table_stride = kBlocks / kRows;
    c.token_ids = ids.data(), c.from_last_token = from_last.data(), c.token_slots = slots.data();
    c.positions = positions.data(), c.slot_mapping = mapping.data(), c.query_starts = starts.data();
    c.context_lens = contexts.data(), c.block_tables = tables.data();
    c.sample_tokens = sample_tokens.data(), c.sample_slots = sample_slots.data();
    edits = {bias_starts.data(),       bias_ids.data(),    biases.data(),     allowed.data(),  word_starts.data(),
             word_token_starts.data(), word_tokens.data(), repetition.data(), presence.data(), frequency.data(),
             has_history.data()};
    histories = {1, 0, history_slots.data(), history_starts.data(), history_ids.data(), history_counts.data(), recent.data(),
                 num_output.data()};
    told = {num_top.data(), logprobs.data(), ranks.data(), top_ids.data(), top_logprobs.data()};
    c.sampling = {temperature.data(), top_p.data(), min_p.data(),  top_k.data(),
                  keys.data(),        &edits,       index == 0 ? &histories : nullptr, &told};
    c.tokens = tokens.data(), c.last_tokens = last_tokens;
  }

 private:
  void add_row(int row, int index) {
    const int before = index == 0 ? 0 : kPrompts[row] + index - 1, count = index == 0 ? kPrompts[row] : 1;
    const int slot = kRows - 1 - row;
    for (int i = 0; i < kBlocks / kRows; i++) tables.push_back(i * kRows + row);
    for (int position = before; position < before + count; position++) {
      ids.push_back(index == 0 ? (position * 7 + row) % kFullVocab : -1);
      from_last.push_back(index > 0);
      slots.push_back(slot);
      positions.push_back(position);
      mapping.push_back((int64_t)(position / 32 * kRows + row) * 32 + position % 32);
    }
    starts.push_back((int64_t)ids.size());
    contexts.push_back(before + count);
    sample_tokens.push_back((int64_t)ids.size() - 1), sample_slots.push_back(slot);
    temperature.push_back(row == 0 ? 0.0f : 0.8f);
    top_p.push_back(row == 1 ? 0.9f : 1.0f), top_k.push_back(row == 2 ? 20 : 0);
    keys.push_back(0x123456789ABCDEFu * (index * kRows + row + 1));
    min_p.push_back(row == 2 ? 0.01f : 0.0f);
    if (row == 1) bias_ids.push_back(3), biases.push_back(-1.0f), bias_ids.push_back(kFullVocab - 2), biases.push_back(2.0f);
    bias_starts.push_back((int64_t)bias_ids.size());
  }
};

// All steps of one life of the group, kAhead of them queued; the sampled tokens.
std::vector<int32_t> generate(AlbireoDevice *device, const AlbireoProgram &forward, const AlbireoProgram &sample) {
  std::vector<int32_t> last_tokens(kRows), sampled;
  std::vector<std::unique_ptr<Step>> steps;
  for (int index = 0; index < kSteps + kAhead; index++) {
    if (index < kSteps) {
      steps.push_back(std::make_unique<Step>(index, last_tokens.data()));
      albireo_submit(device, &forward, &sample, &steps.back()->c);
    }
    if (index < kAhead) continue;
    Step &oldest = *steps[index - kAhead];
    CHECK(albireo_wait(device, &oldest.c, 60 * kSecond) == ALBIREO_OK);
    sampled.insert(sampled.end(), oldest.tokens.begin(), oldest.tokens.end());
  }
  return sampled;
}

// The others never come to this step.
void wait_in_vain(AlbireoDevice *device, const AlbireoProgram &forward, const AlbireoProgram &sample) {
  std::vector<int32_t> last_tokens(kRows);
  Step first(0, last_tokens.data()), second(1, last_tokens.data());
  albireo_submit(device, &forward, &sample, &first.c);
  albireo_submit(device, &forward, &sample, &second.c);
  CHECK(albireo_wait(device, &first.c, kSecond / 20) == ALBIREO_PENDING);
  std::thread aborting(albireo_abort, device);
  CHECK(albireo_wait(device, &first.c, 60 * kSecond) == ALBIREO_ABORTED);
  CHECK(albireo_wait(device, &second.c, 60 * kSecond) == ALBIREO_ABORTED);
  aborting.join();
}

using Lives = std::vector<std::vector<int32_t>>;

void run_rank(Shared &shared, const std::vector<void *> &memories, int rank, Lives &lives) {
  const Model model(shared, rank);
  const AlbireoProgram forward = model.forward(), sample = model.sample();
  const std::vector<int32_t> unpinned(kThreads, -1);
  AlbireoDevice *device = albireo_device_open(unpinned.data(), kThreads);
  CHECK(device != nullptr);
  for (void *memory : memories) {
    CHECK(albireo_join(device, memory, rank, kRanks, 60 * kSecond) == ALBIREO_OK);
    lives.push_back(generate(device, forward, sample));
    if (rank == 0) wait_in_vain(device, forward, sample);
    albireo_leave(device);
  }
  albireo_device_close(device);
}

}  // namespace

int main() {
  CHECK(albireo_allow_isa());
  Shared shared;
  const std::vector<void *> memories = {shared.arena.make<char>(albireo_group_bytes()),
                                        shared.arena.make<char>(albireo_group_bytes())};
  Lives lives[kRanks];
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < kRanks; rank++) {
    ranks.emplace_back([&, rank] { run_rank(shared, memories, rank, lives[rank]); });
  }
  for (auto &rank : ranks) rank.join();
  CHECK(lives[0] == lives[1]);
  CHECK(lives[0][0] == lives[0][1]);
  for (const int32_t token : lives[0][0]) CHECK(0 <= token && token < kFullVocab);
  std::puts("ok");
}
