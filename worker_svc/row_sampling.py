"""Sampling parameters, by slot and by the rows of a step."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from albireo.arrays import (
    EMPTY_INT32,
    BoolArray,
    Float32Array,
    Int32Array,
    Int64Array,
    UInt32Array,
    UInt64Array,
    unpack_float32,
    unpack_int32,
)
from albireo.errors import GroupError
from albireo.limits import MAX_LOGPROBS, MAX_WORD_TOKENS
from albireo.v1 import plan_pb2

_INT32_MAX = 2**31 - 1

# All of a slot lies together: a step gathers it for its rows with one call.
_SAMPLING = np.dtype(
    [
        ("temperature", "f4"),
        ("top_p", "f4"),
        ("min_p", "f4"),
        ("top_k", "i4"),
        ("repetition_penalty", "f4"),
        ("presence_penalty", "f4"),
        ("frequency_penalty", "f4"),
        ("min_tokens", "i4"),
        ("num_logprobs", "i4"),
        ("has_edits", "?"),
        ("has_penalties", "?"),
        ("seed", "u8"),
    ],
    align=True,
)


@dataclass(frozen=True, slots=True)
class RowEdits:
    """What is done to one row's logits before penalties, temperature and filters.

    Attributes:
        row: of the sampling rows.
        ids, biases: parallel; a token's bias is added to its logit. -inf: it is never sampled. No id comes twice.
        allowed: [ceil(vocab_size / 32)], a bit for each token that may be sampled, the lowest first; None: all may.
        bad_words: token ids, two or more, that never follow each other in the output.
    """

    row: int
    ids: Int32Array
    biases: Float32Array
    allowed: UInt32Array | None = None
    bad_words: tuple[Int32Array, ...] = ()


@dataclass(frozen=True, slots=True)
class RowSampling:
    """Sampling parameters of a step's sampling rows; arrays [S], S rows. Rows that score have none but num_logprobs.

    Attributes:
        temperature: 0 means greedy.
        top_p: 1 means all.
        min_p: 0 means all.
        top_k: 0 means all.
        repetition_penalty: 1 means none.
        presence_penalty, frequency_penalty: 0 means none.
        num_logprobs: of the likeliest tokens, beside the sampled one's; -1: no logprobs at all.
        edits: of the rows that have any, ascending.
        is_penalised: [S], whether a row has any penalty.
        has_penalties, wants_logprobs: whether any row does.
        lasts: whether the same holds when these rows sample their next tokens.
    """

    temperature: Float32Array
    top_p: Float32Array
    min_p: Float32Array
    top_k: Int32Array
    repetition_penalty: Float32Array
    presence_penalty: Float32Array
    frequency_penalty: Float32Array
    num_logprobs: Int32Array
    seed: UInt64Array
    edits: tuple[RowEdits, ...]
    is_penalised: BoolArray
    has_penalties: bool
    wants_logprobs: bool
    lasts: bool

    @classmethod
    def greedy(cls, num_rows: int) -> "RowSampling":
        zeros, ones = np.zeros(num_rows, dtype=np.float32), np.ones(num_rows, dtype=np.float32)
        no_seed = np.zeros(num_rows, dtype=np.uint64)
        none = np.zeros(num_rows, dtype=np.int32)
        return cls(zeros, ones, zeros, none, ones, zeros, zeros, none - 1, no_seed, (), none > 0, False, False, True)


@dataclass(frozen=True, slots=True)
class _SlotEdits:
    """Edits of a slot: always, and below its min_tokens."""

    always: RowEdits
    below_min_tokens: RowEdits


class SlotSampling:
    """Sampling parameters by slot."""

    def __init__(self, max_num_seqs: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._of_slot = np.zeros(max_num_seqs, dtype=_SAMPLING)
        self._edits: list[_SlotEdits | None] = [None] * max_num_seqs

    def set(self, slot: int, sampling: plan_pb2.Sampling) -> bool:
        """Returns whether sampling in this slot depends on the sequence's tokens, and not on its logits alone."""
        if sampling.num_logprobs > MAX_LOGPROBS:
            raise GroupError(f"{sampling.num_logprobs} logprobs; {MAX_LOGPROBS} at most")
        edits = self._slot_edits(sampling)
        has_penalties = bool(
            sampling.repetition_penalty not in (0, 1) or sampling.presence_penalty or sampling.frequency_penalty
        )
        has_edits = len(edits.always.ids) > 0 or edits.always.allowed is not None or bool(edits.always.bad_words)
        self._of_slot[slot] = (
            sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            min(sampling.top_k, _INT32_MAX),
            sampling.repetition_penalty or 1.0,
            sampling.presence_penalty,
            sampling.frequency_penalty,
            min(sampling.min_tokens, _INT32_MAX),
            min(sampling.num_logprobs, self._vocab_size) if sampling.HasField("num_logprobs") else -1,
            has_edits,
            has_penalties,
            sampling.seed,
        )
        self._edits[slot] = edits if has_edits or len(edits.below_min_tokens.ids) else None
        return has_penalties or bool(edits.always.bad_words)

    def rows(
        self, slots: Int32Array, output_positions: Int64Array, scored_num_logprobs: Int32Array = EMPTY_INT32
    ) -> RowSampling:
        """The parameters of a step's sampling rows; a copy, since slots change hands while the step waits.

        Args:
            slots, output_positions: of the rows that draw a token.
            scored_num_logprobs: of the rows that follow them, and score.
        """
        of_row = self._of_slot[slots]
        is_below = output_positions < of_row["min_tokens"]
        edits = self._row_edits(slots, is_below, np.flatnonzero(is_below | of_row["has_edits"]))
        if len(scored_num_logprobs):
            of_row = np.concatenate((of_row, _scored_rows(scored_num_logprobs)))
        return RowSampling(
            temperature=of_row["temperature"],
            top_p=of_row["top_p"],
            min_p=of_row["min_p"],
            top_k=of_row["top_k"],
            repetition_penalty=of_row["repetition_penalty"],
            presence_penalty=of_row["presence_penalty"],
            frequency_penalty=of_row["frequency_penalty"],
            num_logprobs=of_row["num_logprobs"],
            seed=of_row["seed"],
            edits=edits,
            is_penalised=of_row["has_penalties"],
            has_penalties=bool(of_row["has_penalties"].any()),
            wants_logprobs=bool((of_row["num_logprobs"] >= 0).any()),
            lasts=not is_below.any(),
        )

    def _row_edits(self, slots: Int32Array, is_below: BoolArray, rows: Int64Array) -> tuple[RowEdits, ...]:
        of_rows = []
        for row in rows.tolist():
            edits = self._edits[slots[row]]
            if edits is not None:
                of_rows.append(replace(edits.below_min_tokens if is_below[row] else edits.always, row=row))
        return tuple(of_rows)

    def _slot_edits(self, sampling: plan_pb2.Sampling) -> _SlotEdits:
        ids, biases = unpack_int32(sampling.bias_token_ids), unpack_float32(sampling.biases)
        if len(ids) != len(biases):
            raise GroupError(f"{len(ids)} tokens have {len(biases)} biases")
        words = [unpack_int32(word) for word in sampling.bad_words]
        single = [word for word in words if len(word) == 1]
        if single:
            ids, biases = _with_suppressed(ids, biases, np.concatenate(single))
        for word in words:
            check_range("token of a bad word", word, 0, self._vocab_size)
            if not 0 < len(word) <= MAX_WORD_TOKENS:
                raise GroupError(f"a bad word has {len(word)} tokens; 1 to {MAX_WORD_TOKENS} are possible")
        suppressed = unpack_int32(sampling.suppressed_token_ids)
        check_range("suppressed token", suppressed, 0, self._vocab_size)
        check_range("token with a bias", ids, 0, self._vocab_size)
        always = RowEdits(
            row=-1,
            ids=ids,
            biases=biases,
            allowed=self._bits(sampling),
            bad_words=tuple(word for word in words if len(word) > 1),
        )
        ids, biases = _with_suppressed(ids, biases, suppressed)
        return _SlotEdits(always, replace(always, ids=ids, biases=biases))

    def _bits(self, sampling: plan_pb2.Sampling) -> UInt32Array | None:
        """The tokens that are allowed, which are told as a mask or as ids; None: all."""
        is_allowed = np.zeros(-(-self._vocab_size // 32) * 32, dtype=np.bool_)
        if sampling.allowed_mask:
            given = np.unpackbits(np.frombuffer(sampling.allowed_mask, dtype=np.uint8), bitorder="little")
            if len(given) != -(-self._vocab_size // 8) * 8 or given[self._vocab_size :].any():
                raise GroupError(f"the mask of allowed tokens is not of {self._vocab_size} bits")
            is_allowed[: len(given)] = given
        elif sampling.allowed_token_ids:
            ids = unpack_int32(sampling.allowed_token_ids)
            check_range("allowed token", ids, 0, self._vocab_size)
            is_allowed[ids] = True
        else:
            return None
        return np.packbits(is_allowed, bitorder="little").view("<u4")


def _scored_rows(num_logprobs: Int32Array) -> npt.NDArray[np.void]:
    """Parameters that do nothing."""
    rows = np.zeros(len(num_logprobs), dtype=_SAMPLING)
    rows["top_p"] = rows["repetition_penalty"] = 1
    rows["num_logprobs"] = num_logprobs
    return rows


def _with_suppressed(ids: Int32Array, biases: Float32Array, suppressed: Int32Array) -> tuple[Int32Array, Float32Array]:
    if not len(suppressed):
        return ids, biases
    suppressed = np.unique(suppressed)
    stays = ~np.isin(ids, suppressed)
    never = np.full(len(suppressed), -np.inf, dtype=np.float32)
    return np.concatenate((ids[stays], suppressed)), np.concatenate((biases[stays], never))


def check_range(what: str, values: Int32Array, start: int, stop: int) -> None:
    """Raises GroupError where a value is not in ``start`` .. ``stop`` - 1."""
    if len(values) and (values - start if start else values).view(np.uint32).max() >= stop - start:  # negative: huge
        raise GroupError(f"{what} {values.min()} .. {values.max()}: not in {start} .. {stop - 1}")
