"""The mirror of src/albireo_cpu.h: its numbers, structures and records."""

from ctypes import POINTER, Structure, Union, c_float, c_int32, c_int64, c_void_p
from enum import IntEnum

import ml_dtypes
import numpy as np
import numpy.typing as npt

from albireo.limits import MAX_LOGPROBS, MAX_WORD_TOKENS

ABI = 2
PANEL = 16  # outputs of a panel
BLOCK = 32  # tokens of a KV block
MAX_RANKS = 64
MAX_CANDIDATES = 256  # up to this top_k, a rank offers its best tokens to the others
MAX_TOP = MAX_LOGPROBS  # likeliest tokens that are named beside a sampled one
NUM_RECENT = MAX_WORD_TOKENS  # output tokens that bad words are looked for in


class Dtype(IntEnum):
    FLOAT32 = 0
    BFLOAT16 = 1
    INT8 = 2
    FLOAT16 = 3

    @property
    def numpy(self) -> np.dtype[np.generic]:
        return _NUMPY_DTYPES[self]

    @classmethod
    def of(cls, array: npt.NDArray[np.generic]) -> "Dtype":
        """The type of an array's elements; uint16 stands for bfloat16.

        Raises:
            TypeError: kernels do not know the type.
        """
        if array.dtype == np.uint16:
            return cls.BFLOAT16
        for dtype, of_numpy in _NUMPY_DTYPES.items():
            if array.dtype == of_numpy:
                return dtype
        raise TypeError(f"kernels have no type {array.dtype}")


_NUMPY_DTYPES: dict[Dtype, np.dtype[np.generic]] = {
    Dtype.FLOAT32: np.dtype(np.float32),
    Dtype.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    Dtype.INT8: np.dtype(np.int8),
    Dtype.FLOAT16: np.dtype(np.float16),
}


class Status(IntEnum):
    OK = 0
    PENDING = 1
    ABORTED = 2


class Extent(IntEnum):
    EACH_TOKEN = 0
    EACH_SAMPLE = 1


class OpKind(IntEnum):
    EMBED = 0
    ADD_NORM = 1
    GEMM = 2
    ROPE = 3
    ATTENTION = 4
    QUANTIZE = 5
    EXCHANGE = 6
    SELECT = 7
    DRAW = 8
    PUBLISH = 9


class RowsOf(IntEnum):
    ALL = 0
    OWN = 1


class Epilogue(IntEnum):
    STORE = 0
    ADD = 1
    SILU_MUL = 2


class MatrixStruct(Structure):
    _fields_ = (
        ("data", c_void_p),
        ("scales", c_void_p),
        ("sums", c_void_p),
        ("dtype", c_int32),
        ("num_out", c_int32),
        ("num_in", c_int32),
        ("padded_in", c_int32),
    )


class RowsStruct(Structure):
    _fields_ = (
        ("data", c_void_p),
        ("scales", c_void_p),
        ("stride", c_int64),
        ("dtype", c_int32),
        ("size", c_int32),
    )


class EditsStruct(Structure):
    _fields_ = (
        ("bias_starts", c_void_p),
        ("bias_ids", c_void_p),
        ("biases", c_void_p),
        ("allowed", c_void_p),
        ("word_starts", c_void_p),
        ("word_token_starts", c_void_p),
        ("word_tokens", c_void_p),
        ("repetition_penalty", c_void_p),
        ("presence_penalty", c_void_p),
        ("frequency_penalty", c_void_p),
        ("has_history", c_void_p),
    )


class HistoriesStruct(Structure):
    _fields_ = (
        ("num_histories", c_int32),
        ("reserved", c_int32),
        ("slots", c_void_p),
        ("starts", c_void_p),
        ("ids", c_void_p),
        ("counts", c_void_p),
        ("recent", c_void_p),
        ("num_output", c_void_p),
    )


class LogprobsStruct(Structure):
    _fields_ = (
        ("num_top", c_void_p),
        ("logprobs", c_void_p),
        ("ranks", c_void_p),
        ("top_ids", c_void_p),
        ("top_logprobs", c_void_p),
    )


class SamplingStruct(Structure):
    _fields_ = (
        ("temperature", c_void_p),
        ("top_p", c_void_p),
        ("min_p", c_void_p),
        ("top_k", c_void_p),
        ("noise_keys", c_void_p),
        ("edits", POINTER(EditsStruct)),
        ("histories", POINTER(HistoriesStruct)),
        ("logprobs", POINTER(LogprobsStruct)),
    )


class StepStruct(Structure):
    _fields_ = (
        ("num_tokens", c_int32),
        ("num_rows", c_int32),
        ("num_samples", c_int32),
        ("num_scored", c_int32),
        ("block_table_stride", c_int64),
        ("token_ids", c_void_p),
        ("from_last_token", c_void_p),
        ("token_slots", c_void_p),
        ("positions", c_void_p),
        ("slot_mapping", c_void_p),
        ("query_starts", c_void_p),
        ("context_lens", c_void_p),
        ("block_tables", c_void_p),
        ("sample_tokens", c_void_p),
        ("sample_slots", c_void_p),
        ("scored_token_ids", c_void_p),
        ("sampling", SamplingStruct),
        ("tokens", c_void_p),
        ("last_tokens", c_void_p),
        ("start_at_ns", c_int64),
        ("forward_end_at_ns", c_int64),
        ("end_at_ns", c_int64),
        ("collective_ns", c_int64),
        ("status", c_int32),
        ("reserved", c_int32),
    )


class EmbedStruct(Structure):
    _fields_ = (("table", MatrixStruct), ("first_id", c_int32), ("reserved", c_int32), ("out", RowsStruct))


class AddNormStruct(Structure):
    _fields_ = (
        ("residual", RowsStruct),
        ("partials", c_void_p * MAX_RANKS),
        ("num_partials", c_int32),
        ("sets_residual", c_int32),
        ("partial_stride", c_int64),
        ("weight", c_void_p),
        ("eps", c_float),
        ("rounds", c_int32),
        ("out", RowsStruct),
    )


class GemmStruct(Structure):
    _fields_ = (
        ("x", RowsStruct),
        ("weight", MatrixStruct),
        ("bias", c_void_p),
        ("out", RowsStruct),
        ("epilogue", c_int32),
        ("reserved", c_int32),
    )


class RopeStruct(Structure):
    _fields_ = (
        ("qkv", RowsStruct),
        ("q", RowsStruct),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("kv_dtype", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("eps", c_float),
        ("rounds", c_int32),
    )


class AttentionStruct(Structure):
    _fields_ = (
        ("q", RowsStruct),
        ("out", RowsStruct),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("kv_dtype", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("sliding_window", c_int32),
        ("reserved", c_int32),
    )


class QuantizeStruct(Structure):
    _fields_ = (("x", RowsStruct), ("out", RowsStruct))


class ColumnsStruct(Structure):
    _fields_ = (("data", c_void_p), ("stride", c_int64), ("first_id", c_int32), ("num_ids", c_int32))


class ScratchStruct(Structure):
    _fields_ = (("data", c_void_p), ("bytes", c_int64), ("vocab_size", c_int32), ("reserved", c_int32))


class SlotTokensStruct(Structure):
    _fields_ = (
        ("ids", c_void_p),
        ("counts", c_void_p),
        ("num_ids", c_void_p),
        ("recent", c_void_p),
        ("num_output", c_void_p),
        ("capacity", c_int32),
        ("reserved", c_int32),
    )


class ExchangeStruct(Structure):
    _fields_ = (
        ("source", c_void_p),
        ("to", c_void_p),
        ("source_stride", c_int64),
        ("to_stride", c_int64),
        ("vocab_size", c_int32),
        ("rows", c_int32),
    )


class SelectStruct(Structure):
    _fields_ = (
        ("logits", ColumnsStruct),
        ("raw", c_void_p),
        ("candidates", c_void_p),
        ("slot_tokens", SlotTokensStruct),
        ("scratch", ScratchStruct),
        ("rows", c_int32),
        ("reserved", c_int32),
    )


class DrawStruct(Structure):
    _fields_ = (
        ("logits", ColumnsStruct),
        ("raw", c_void_p),
        ("candidates", c_void_p * MAX_RANKS),
        ("num_candidates", c_int32),
        ("meets", c_int32),
        ("tokens", c_void_p),
        ("logprobs", c_void_p),
        ("scratch", ScratchStruct),
        ("rows", c_int32),
        ("reserved", c_int32),
    )


class PublishStruct(Structure):
    _fields_ = (
        ("tokens", c_void_p),
        ("logprobs", c_void_p),
        ("slot_tokens", SlotTokensStruct),
        ("first_id", c_int32),
        ("num_ids", c_int32),
        ("meets", c_int32),
        ("reserved", c_int32),
    )


# What ranks write for each other, [S] each; AlbireoCandidates and AlbireoTokenLogprobs in C.
CANDIDATES = np.dtype(
    [("score", "f4"), ("id", "i4"), ("num_keys", "i4"), ("reserved", "i4"), ("keys", "u8", MAX_CANDIDATES)]
)
TOKEN_LOGPROBS = np.dtype(
    [("logprob", "f4"), ("rank", "i4"), ("num_top", "i4"), ("top_ids", "i4", MAX_TOP), ("top_logprobs", "f4", MAX_TOP)]
)


class OpUnion(Union):
    _fields_ = (
        ("embed", EmbedStruct),
        ("add_norm", AddNormStruct),
        ("gemm", GemmStruct),
        ("rope", RopeStruct),
        ("attention", AttentionStruct),
        ("quantize", QuantizeStruct),
        ("exchange", ExchangeStruct),
        ("select", SelectStruct),
        ("draw", DrawStruct),
        ("publish", PublishStruct),
    )


class OpStruct(Structure):
    _fields_ = (("kind", c_int32), ("extent", c_int32), ("of", OpUnion))


class ProgramStruct(Structure):
    _fields_ = (("ops", POINTER(OpStruct)), ("num_ops", c_int32), ("reserved", c_int32))
