"""How a step's rows are sampled, as arrays that are read in place; what it means is in `albireo_kernels.reference`."""

from collections.abc import Mapping
from ctypes import pointer
from dataclasses import dataclass
from typing import Any

import numpy as np

from albireo.arrays import BoolArray, Float32Array, Int32Array, Int64Array, UInt64Array
from albireo_kernels.cpu.buffers import AnyArray, address, allocate
from albireo_kernels.cpu.structs import (
    MAX_TOP,
    NUM_RECENT,
    EditsStruct,
    HistoriesStruct,
    LogprobsStruct,
    SamplingStruct,
    SlotTokensStruct,
)


@dataclass(frozen=True, slots=True)
class Edits:
    """What is done to logits before temperature and filters; of S rows, with W bad words.

    Attributes:
        bias_starts: [S + 1], where each row's biases begin in ``bias_ids`` and ``biases``. -inf: never sampled.
        allowed: [S], the address of a row's bits, one for each token id, 1 where it may be sampled; 0: all may.
        word_starts: [S + 1], where each row's bad words begin.
        word_token_starts: [W + 1], where each word's tokens begin in ``word_tokens``: 2 .. NUM_RECENT of them.
        repetition_penalty, presence_penalty, frequency_penalty: [S]; 1, 0 and 0 mean none.
        has_history: [S], whether tokens of the row's slot matter; the sampled one is added to them.
        keeps: what must live as long as the addresses.
    """

    bias_starts: Int64Array
    bias_ids: Int32Array
    biases: Float32Array
    allowed: UInt64Array
    word_starts: Int64Array
    word_token_starts: Int64Array
    word_tokens: Int32Array
    repetition_penalty: Float32Array
    presence_penalty: Float32Array
    frequency_penalty: Float32Array
    has_history: BoolArray
    keeps: tuple[AnyArray, ...] = ()

    def struct(self, num_samples: int) -> EditsStruct:
        num_words = len(self.word_token_starts) - 1
        dtypes: dict[str, tuple[Any, int]] = {
            "bias_starts": (np.int64, num_samples + 1),
            "bias_ids": (np.int32, len(self.biases)),
            "biases": (np.float32, len(self.biases)),
            "allowed": (np.uint64, num_samples),
            "word_starts": (np.int64, num_samples + 1),
            "word_token_starts": (np.int64, num_words + 1),
            "word_tokens": (np.int32, len(self.word_tokens)),
            "repetition_penalty": (np.float32, num_samples),
            "presence_penalty": (np.float32, num_samples),
            "frequency_penalty": (np.float32, num_samples),
            "has_history": (np.bool_, num_samples),
        }
        return EditsStruct(**_addresses(self, dtypes))


@dataclass(frozen=True, slots=True)
class Histories:
    """The tokens so far of H sequences that begin, in slots where they matter.

    Attributes:
        slots: [H].
        starts: [H + 1], where each one's ids begin in ``ids`` and ``counts``.
        ids: none twice.
        counts: of each id, 2 * times in the output + whether it is in the prompt.
        recent: [H, NUM_RECENT], output token i at i % NUM_RECENT.
        num_output: [H].
    """

    slots: Int32Array
    starts: Int64Array
    ids: Int32Array
    counts: Int32Array
    recent: Int32Array
    num_output: Int32Array

    def struct(self) -> HistoriesStruct:
        count = len(self.slots)
        dtypes: dict[str, tuple[Any, int]] = {
            "slots": (np.int32, count),
            "starts": (np.int64, count + 1),
            "ids": (np.int32, len(self.counts)),
            "counts": (np.int32, len(self.counts)),
            "recent": (np.int32, count * NUM_RECENT),
            "num_output": (np.int32, count),
        }
        return HistoriesStruct(num_histories=count, **_addresses(self, dtypes))


class Logprobs:
    """Logarithms of the probabilities that the model gives, of S rows; valid once the step is complete.

    Attributes:
        num_top: [S], MAX_TOP at most; -1: nothing is told of the row.
        logprobs, ranks: [S], of the sampled tokens; ranks count from 1.
        top_ids, top_logprobs: [S, MAX_TOP], of the likeliest tokens, in order.
    """

    def __init__(self, num_top: Int32Array) -> None:
        count = len(num_top)
        self.num_top = num_top
        self.logprobs = np.zeros(count, dtype=np.float32)
        self.ranks = np.zeros(count, dtype=np.int32)
        self.top_ids = np.zeros((count, MAX_TOP), dtype=np.int32)
        self.top_logprobs = np.zeros((count, MAX_TOP), dtype=np.float32)

    def struct(self) -> LogprobsStruct:
        count = len(self.num_top)
        if count and int(self.num_top.max()) > MAX_TOP:
            raise ValueError(f"num_top: {self.num_top.max()}, {MAX_TOP} at most")
        dtypes: dict[str, tuple[Any, int]] = {
            "num_top": (np.int32, count),
            "logprobs": (np.float32, count),
            "ranks": (np.int32, count),
            "top_ids": (np.int32, count * MAX_TOP),
            "top_logprobs": (np.float32, count * MAX_TOP),
        }
        return LogprobsStruct(**_addresses(self, dtypes))


@dataclass(frozen=True, slots=True)
class Sampling:
    """How S rows are sampled.

    Attributes:
        temperature: [S]; below 1e-5: greedy.
        top_p: [S]; 1: all.
        min_p: [S]; 0: all.
        top_k: [S]; 0: all.
        noise_keys: [S], k0 in the low half, k1 in the high one.
        edits: None: no row has any.
        histories: None: none begins with this step.
        logprobs: None: of no row.
    """

    temperature: Float32Array
    top_p: Float32Array
    min_p: Float32Array
    top_k: Int32Array
    noise_keys: UInt64Array
    edits: Edits | None = None
    histories: Histories | None = None
    logprobs: Logprobs | None = None

    @classmethod
    def greedy(cls, num_rows: int) -> "Sampling":
        zeros, ones = np.zeros(num_rows, dtype=np.float32), np.ones(num_rows, dtype=np.float32)
        return cls(zeros, ones, zeros, np.zeros(num_rows, dtype=np.int32), np.zeros(num_rows, dtype=np.uint64))

    @property
    def draws(self) -> bool:
        """Whether any row needs noise."""
        return bool(self.temperature.any())

    def struct(self, num_samples: int) -> SamplingStruct:
        """Points into the arrays, which must live as long. ValueError: one has another type or shape."""
        dtypes: dict[str, tuple[Any, int]] = {
            "temperature": (np.float32, num_samples),
            "top_p": (np.float32, num_samples),
            "min_p": (np.float32, num_samples),
            "top_k": (np.int32, num_samples),
            "noise_keys": (np.uint64, num_samples),
        }
        struct = SamplingStruct(**_addresses(self, dtypes))
        if self.edits is not None:
            struct.edits = pointer(self.edits.struct(num_samples))
        if self.histories is not None:
            struct.histories = pointer(self.histories.struct())
        if self.logprobs is not None:
            struct.logprobs = pointer(self.logprobs.struct())
        return struct


class SlotTokens:
    """The tokens of each slot, as far as sampling depends on them; of one rank, which writes them as it samples."""

    def __init__(self, num_slots: int, capacity: int) -> None:
        """``capacity``: different tokens that a sequence can have."""
        shapes = [(num_slots, capacity), (num_slots, capacity), (num_slots,), (num_slots, NUM_RECENT), (num_slots,)]
        self._arrays = [allocate(shape, np.int32) for shape in shapes]
        ids, counts, num_ids, recent, num_output = map(address, self._arrays)
        self.c = SlotTokensStruct(ids, counts, num_ids, recent, num_output, capacity)


def _addresses(of: object, dtypes: Mapping[str, tuple[Any, int]]) -> dict[str, int]:
    """Where arrays lie, by name; each of a type and number of elements, in one piece."""
    found = {}
    for name, (dtype, size) in dtypes.items():
        array: AnyArray = getattr(of, name)
        if array.dtype != dtype or array.size != size or not array.flags.c_contiguous:
            raise ValueError(f"{name}: {array.dtype} {array.shape}, where {size} {np.dtype(dtype)} are needed")
        found[name] = address(array)
    return found
