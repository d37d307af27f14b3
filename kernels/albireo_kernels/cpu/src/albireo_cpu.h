/* The compiled CPU kernels: a plain C interface (pointers and sizes), called through ctypes.
 *
 * A *program* is a list of operations over preallocated buffers, captured once per model. A *step* is the data that one
 * replay works on: how many tokens and rows there are, where their inputs lie. A *device* is a team of pinned threads
 * that replays programs for step after step, in the order in which they were submitted, like a stream of a GPU.
 *
 * Matrices are packed. Sixteen outputs form a panel; within it, 4 bytes of consecutive inputs (1 float32, 2 bfloat16 or
 * 4 int8) lie together for each output, so that 64 bytes hold one group of inputs for all 16:
 *
 *     [ceil(num_out / 16), padded_in / group, 16, group]        padded_in: a whole number of 64 bytes
 *
 * which is what AMX tiles and AVX-512 dot products read, and what AVX2 widens with one shift and one mask. A block of the
 * KV cache is two such matrices per KV head: keys [32 outputs, head_dim inputs], values [head_dim outputs, 32 inputs].
 *
 * Every structure here has its mirror in ../structs.py.
 */
#ifndef ALBIREO_CPU_H
#define ALBIREO_CPU_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ALBIREO_ABI 2
#define ALBIREO_PANEL 16      /* outputs of a panel */
#define ALBIREO_BLOCK 32      /* tokens of a KV block */
#define ALBIREO_MAX_RANKS 64
#define ALBIREO_MAX_CANDIDATES 256 /* up to this top_k, a rank offers its best tokens to the others */
#define ALBIREO_MAX_TOP 20         /* likeliest tokens that are named beside a sampled one */
#define ALBIREO_NUM_RECENT 64      /* output tokens that bad words are looked for in: none is longer */

typedef enum { ALBIREO_FLOAT32 = 0, ALBIREO_BFLOAT16 = 1, ALBIREO_INT8 = 2, ALBIREO_FLOAT16 = 3 } AlbireoDtype;

typedef enum { ALBIREO_PORTABLE = 0, ALBIREO_AVX2 = 1, ALBIREO_AVX512 = 2, ALBIREO_AMX = 3 } AlbireoIsa;

typedef enum {
  ALBIREO_OK = 0,
  ALBIREO_PENDING = 1, /* submitted, not complete */
  ALBIREO_ABORTED = 2, /* the device was aborted, or a peer did not come in time */
} AlbireoStatus;

/* A packed matrix [num_out, num_in]. float16 is never packed. */
typedef struct {
  void *data;      /* 64-byte aligned */
  float *scales;   /* int8: [panels * 16], what an output's integers are multiplied by; else null */
  int32_t *sums;   /* int8: [panels * 16], the sum of an output's integers; else null */
  int32_t dtype;
  int32_t num_out;
  int32_t num_in;
  int32_t padded_in;
} AlbireoMatrix;

/* Activations: rows of float32, bfloat16 or int8. Rows are padded to 64 bytes, and the padding is zero. There are 15
 * more rows than are used, because tiles are read whole. */
typedef struct {
  void *data;
  float *scales;  /* int8: one per row; else null */
  int64_t stride; /* elements from one row to the next */
  int32_t dtype;
  int32_t size;   /* elements of a row, without padding */
} AlbireoRows;

/* What is done to the logits of S rows before temperature and filters; W bad words. */
typedef struct {
  const int64_t *bias_starts;       /* [S + 1], where each row's biases begin in the next two */
  const int32_t *bias_ids;
  const float *biases;              /* added; -inf: never sampled */
  const uint32_t *const *allowed;   /* [S], a bit per token id, 1 where it may be sampled; null: all may */
  const int64_t *word_starts;       /* [S + 1], where each row's bad words begin */
  const int64_t *word_token_starts; /* [W + 1], where each word's tokens begin in word_tokens */
  const int32_t *word_tokens;       /* two or more of a word; they never follow each other in the output */
  const float *repetition_penalty, *presence_penalty, *frequency_penalty; /* [S]; 1, 0, 0: none */
  const uint8_t *has_history;       /* [S], whether tokens of the row's slot matter; the sampled one is added to them */
} AlbireoEdits;

/* The tokens so far of H sequences that begin, in slots where they matter. */
typedef struct {
  int32_t num_histories;
  int32_t reserved;
  const int32_t *slots;      /* [H] */
  const int64_t *starts;     /* [H + 1], where each one's ids begin */
  const int32_t *ids;        /* none twice */
  const int32_t *counts;     /* of each id: 2 * times in the output + whether it is in the prompt */
  const int32_t *recent;     /* [H, ALBIREO_NUM_RECENT], output token i at i % ALBIREO_NUM_RECENT */
  const int32_t *num_output; /* [H] */
} AlbireoHistories;

/* Logarithms of the probabilities that the model gives, to be told of S rows. */
typedef struct {
  const int32_t *num_top; /* [S], ALBIREO_MAX_TOP at most; -1: nothing is told of the row */
  float *logprobs;        /* [S], out, of the sampled tokens */
  int32_t *ranks;         /* [S], out, their places in the order of all tokens, from 1 */
  int32_t *top_ids;       /* [S, ALBIREO_MAX_TOP], out, the likeliest tokens, and what they have */
  float *top_logprobs;
} AlbireoLogprobs;

/* How S rows are sampled. Of those that are scored, only the logprobs matter. */
typedef struct {
  const float *temperature;          /* [S]; below 1e-5: greedy */
  const float *top_p;                /* [S]; 1: all */
  const float *min_p;                /* [S]; 0: all */
  const int32_t *top_k;              /* [S]; 0: all */
  const uint64_t *noise_keys;        /* [S], k0 in the low half, k1 in the high one */
  const AlbireoEdits *edits;         /* null: none in this step */
  const AlbireoHistories *histories; /* null: none begins with this step */
  const AlbireoLogprobs *logprobs;   /* null: of no row */
} AlbireoSampling;

/* The inputs of one step: N tokens of R rows, and S samples; and what became of it. The last num_scored samples draw
 * nothing: their tokens are given, for the sake of their logprobs, and no slot learns of them. */
typedef struct {
  int32_t num_tokens;
  int32_t num_rows;
  int32_t num_samples;
  int32_t num_scored;
  int64_t block_table_stride;       /* elements */
  const int32_t *token_ids;         /* [N]; undefined where from_last_token */
  const uint8_t *from_last_token;   /* [N], whether the token is the last one of its slot */
  const int32_t *token_slots;       /* [N] */
  const int64_t *positions;         /* [N] */
  const int64_t *slot_mapping;      /* [N], block * 32 + offset */
  const int64_t *query_starts;      /* [R + 1] */
  const int32_t *context_lens;      /* [R] */
  const int32_t *block_tables;      /* [R, block_table_stride] */
  const int64_t *sample_tokens;     /* [S], after which tokens; none twice */
  const int32_t *sample_slots;      /* [S - num_scored] */
  const int32_t *scored_token_ids;  /* [num_scored] */
  AlbireoSampling sampling;
  int32_t *tokens;                  /* [S], out */
  int32_t *last_tokens;             /* [slots]; read by this step's tokens, written by its samples */
  int64_t start_at_ns, forward_end_at_ns, end_at_ns, collective_ns; /* out; CLOCK_MONOTONIC */
  int32_t status;                   /* out; AlbireoStatus */
  int32_t reserved;
} AlbireoStep;

typedef enum { ALBIREO_EACH_TOKEN = 0, ALBIREO_EACH_SAMPLE = 1 } AlbireoExtent; /* how many rows an operation has */

typedef enum {
  ALBIREO_OP_EMBED = 0,
  ALBIREO_OP_ADD_NORM = 1,
  ALBIREO_OP_GEMM = 2,
  ALBIREO_OP_ROPE = 3,
  ALBIREO_OP_ATTENTION = 4,
  ALBIREO_OP_QUANTIZE = 5,
  ALBIREO_OP_EXCHANGE = 6,
  ALBIREO_OP_SELECT = 7,
  ALBIREO_OP_DRAW = 8,
  ALBIREO_OP_PUBLISH = 9,
  ALBIREO_NUM_OPS = 10,
} AlbireoOpKind;

/* out[token] = the row of its id, as float32; zeros where the id is another rank's. */
typedef struct {
  AlbireoMatrix table; /* [ids of this rank, hidden], float32 or bfloat16 */
  int32_t first_id;
  int32_t reserved;
  AlbireoRows out; /* float32 */
} AlbireoEmbed;

/* residual += partials, then out = rms_norm(residual) * weight. An extent of samples reads the sampled tokens' residuals.
 * With more than one rank the partials are complete only after all ranks have met, which this operation waits for. */
typedef struct {
  AlbireoRows residual;                        /* float32 */
  const float *partials[ALBIREO_MAX_RANKS];    /* [N, partial_stride] of each rank, summed in this order */
  int32_t num_partials;                        /* 0: nothing to add, nobody to meet */
  int32_t sets_residual;                       /* residual = sum of partials */
  int64_t partial_stride;
  const float *weight; /* [size] */
  float eps;
  int32_t rounds;   /* whether the normed value is rounded to bfloat16 before it is multiplied */
  AlbireoRows out;  /* float32 or bfloat16 */
} AlbireoAddNorm;

typedef enum {
  ALBIREO_STORE = 0,    /* out = product */
  ALBIREO_ADD = 1,      /* out += product */
  ALBIREO_SILU_MUL = 2, /* panels alternate between gate and up: out = silu(gate) * up, of half the width */
} AlbireoEpilogue;

typedef struct {
  AlbireoRows x; /* of the type that `albireo_input_dtype` asks for */
  AlbireoMatrix weight;
  const float *bias; /* [num_out in packed order], or null */
  AlbireoRows out;   /* float32 or bfloat16; ADD: float32 */
  int32_t epilogue;
  int32_t reserved;
} AlbireoGemm;

/* Norms (where the model does) and rotates queries and keys; writes keys and values to their blocks. */
typedef struct {
  AlbireoRows qkv; /* float32, [queries, keys, values] of a token */
  AlbireoRows q;   /* out, [num_heads * head_dim]; float32 or bfloat16 */
  const float *q_norm, *k_norm; /* [head_dim], or null */
  const float *cos, *sin;       /* [positions, head_dim / 2] */
  void *keys, *values;          /* packed blocks, [num_blocks, num_kv_heads, bytes of a block] */
  int32_t kv_dtype;             /* float32 or bfloat16 */
  int32_t num_heads, num_kv_heads, head_dim;
  float eps;
  int32_t rounds; /* as of AlbireoAddNorm */
} AlbireoRope;

typedef struct {
  AlbireoRows q;   /* of the type that `albireo_input_dtype(kv_dtype)` asks for */
  AlbireoRows out; /* [num_heads * head_dim], float32 or bfloat16 */
  const void *keys, *values;
  int32_t kv_dtype;
  int32_t num_heads, num_kv_heads, head_dim;
  int32_t sliding_window; /* a token sees itself and the sliding_window - 1 before it; 0: all before it */
  int32_t reserved;
} AlbireoAttention;

/* out = round(x / scale), scale = max |x| / 127 of the row. */
typedef struct {
  AlbireoRows x;   /* float32 */
  AlbireoRows out; /* int8 */
} AlbireoQuantize;

/* Sampling (what it means is defined in reference/sampling.py) is a program of the four operations that follow, and the
 * scheme is how they are put together: each rank selects from its own columns and the ranks exchange candidates; or rows
 * are exchanged, and each rank selects from whole ones, all of them or every t-th. */

typedef enum { ALBIREO_ALL_ROWS = 0, ALBIREO_OWN_ROWS = 1 } AlbireoRowsOf; /* own: r % size == rank */

/* Columns of the sampling rows' logits. */
typedef struct {
  float *data;    /* of row 0 and first_id */
  int64_t stride; /* elements from one row to the next */
  int32_t first_id, num_ids;
} AlbireoColumns;

typedef struct {
  void *data;    /* [threads, bytes], 64-byte aligned */
  int64_t bytes; /* at least albireo_sample_scratch_bytes(vocab_size) */
  int32_t vocab_size;
  int32_t reserved;
} AlbireoScratch;

/* What a row's columns have to offer. */
typedef struct {
  float score; /* of the best token: its value, with the noise where there is any; -inf: none */
  int32_t id;
  int32_t num_keys;
  int32_t reserved;
  uint64_t keys[ALBIREO_MAX_CANDIDATES]; /* with a small top_k: the best tokens, in any order */
} AlbireoCandidates;

typedef struct {
  float logprob;
  int32_t rank, num_top;
  int32_t top_ids[ALBIREO_MAX_TOP];
  float top_logprobs[ALBIREO_MAX_TOP];
} AlbireoTokenLogprobs;

/* The tokens of each slot, as far as sampling depends on them; of one rank. */
typedef struct {
  int32_t *ids, *counts; /* [slots, capacity], as of AlbireoHistories; of the rank's columns */
  int32_t *num_ids;      /* [slots] */
  int32_t *recent;       /* [slots, ALBIREO_NUM_RECENT] */
  int32_t *num_output;   /* [slots] */
  int32_t capacity;
  int32_t reserved;
} AlbireoSlotTokens;

/* All ranks meet; then whole rows are copied from memory that they share to memory of this rank. */
typedef struct {
  const float *from;
  float *to;
  int64_t from_stride, to_stride;
  int32_t vocab_size;
  int32_t rows; /* AlbireoRowsOf */
} AlbireoExchange;

/* Begins histories; edits logits in place, and selects what goes into the draw. */
typedef struct {
  AlbireoColumns logits;
  float *raw; /* like the logits: where those of edited rows are kept for logprobs */
  AlbireoCandidates *candidates; /* [S], out */
  AlbireoSlotTokens slot_tokens;
  AlbireoScratch scratch;
  int32_t rows;
  int32_t reserved;
} AlbireoSelect;

/* Draws from all candidates of a row, or where they are not enough from its logits. */
typedef struct {
  AlbireoColumns logits; /* whole rows, edited */
  float *raw;            /* as of AlbireoSelect */
  const AlbireoCandidates *candidates[ALBIREO_MAX_RANKS]; /* [S] each, of adjacent columns, in order */
  int32_t num_candidates;
  int32_t meets; /* whether to wait first until all ranks have selected */
  int32_t *tokens;                /* [S], out */
  AlbireoTokenLogprobs *logprobs; /* [S], out */
  AlbireoScratch scratch;
  int32_t rows;
  int32_t reserved;
} AlbireoDraw;

/* The tokens become the step's and their slots' last ones. */
typedef struct {
  const int32_t *tokens;
  const AlbireoTokenLogprobs *logprobs;
  AlbireoSlotTokens slot_tokens;
  int32_t first_id, num_ids; /* the rank's columns, as of AlbireoSelect */
  int32_t meets;             /* whether to wait first until all ranks have drawn */
  int32_t reserved;
} AlbireoPublish;

typedef struct {
  int32_t kind;   /* AlbireoOpKind */
  int32_t extent; /* AlbireoExtent; of those that have a choice */
  union {
    AlbireoEmbed embed;
    AlbireoAddNorm add_norm;
    AlbireoGemm gemm;
    AlbireoRope rope;
    AlbireoAttention attention;
    AlbireoQuantize quantize;
    AlbireoExchange exchange;
    AlbireoSelect select;
    AlbireoDraw draw;
    AlbireoPublish publish;
  } of;
} AlbireoOp;

typedef struct {
  const AlbireoOp *ops;
  int32_t num_ops;
  int32_t reserved;
} AlbireoProgram;

typedef struct AlbireoDevice AlbireoDevice;

/* What a mirror must agree in, ALBIREO_NUM_SIZES numbers; see albireo.cpp. One that differs must not be used. */
#define ALBIREO_NUM_SIZES 16
int albireo_abi(int64_t sizes[ALBIREO_NUM_SIZES]);
/* The AlbireoIsa that this library was built for. The processor must have it: there is one library for each. */
int albireo_isa(void);
/* Asks the system for what the level needs (AMX tiles); 0 when it refuses. Once per process, before a device opens. */
int albireo_allow_isa(void);
/* The type of activations that a product with weights of this type reads. */
int albireo_input_dtype(int weight_dtype);

/* Bytes of a packed matrix, and its padded_in. */
int64_t albireo_matrix_bytes(int dtype, int32_t num_out, int32_t num_in, int32_t *padded_in);
/* Packs rows of a row-major matrix (float32, float16 or bfloat16; to_dtype as in target; int8 quantises row by row) as
 * outputs first_panel * 16 ... of target; panel_step 2 leaves every other panel to a second matrix. The outputs that fill
 * up the last panel are zero. */
void albireo_pack(const AlbireoMatrix *target, const void *rows, int from_dtype, int64_t stride, int32_t num_rows,
                  int32_t first_panel, int32_t panel_step);
/* The opposite, to float32; for tests, and for blocks on their way to other layouts. */
void albireo_unpack(const AlbireoMatrix *source, float *rows, int64_t stride);
int64_t albireo_sample_scratch_bytes(int32_t vocab_size);

/* A team of num_threads threads, each pinned to its core; a negative core pins nothing. Null when they cannot start. */
AlbireoDevice *albireo_device_open(const int32_t *cores, int32_t num_threads);
/* Ends the threads; waits for the step that runs, which `albireo_abort` shortens. */
void albireo_device_close(AlbireoDevice *device);
/* Bytes of the memory that ranks meet in, which is zero before the first of them comes. */
int64_t albireo_group_bytes(void);
/* This device is rank `rank` of `size`, which meet in shared memory; size 1: alone, and memory is null. Waits for all
 * ranks, timeout_ns at most. Returns a status. The device must be idle. */
int albireo_join(AlbireoDevice *device, void *memory, int32_t rank, int32_t size, int64_t timeout_ns);
/* Leaves the group: steps that still wait are aborted. Returns when the device is idle. */
void albireo_leave(AlbireoDevice *device);
/* Queues a step; never waits. Programs and step must live until it is complete. */
void albireo_submit(AlbireoDevice *device, const AlbireoProgram *forward, const AlbireoProgram *sample, AlbireoStep *step);
/* Waits until the step is complete, timeout_ns at most; returns its status. */
int albireo_wait(AlbireoDevice *device, AlbireoStep *step, int64_t timeout_ns);
/* Gets the device out of its waits for other ranks, now and later, until `albireo_leave`. Any thread may call. */
void albireo_abort(AlbireoDevice *device);

/* For benchmarks, on the calling thread. Reads memory as fast as it can; the result says nothing. */
uint64_t albireo_read_memory(const void *from, int64_t num_bytes);
/* Multiplies weights of a type in the first-level cache, over and over; returns the number of multiplications. */
int64_t albireo_multiply_in_cache(int weight_dtype, int64_t num_rounds);

#ifdef __cplusplus
}
#endif
#endif
