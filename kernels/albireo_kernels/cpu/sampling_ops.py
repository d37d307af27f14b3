"""Sampling as a program: the operations, and how each scheme puts them together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from albireo.arrays import Float32Array, Int32Array
from albireo_kernels.cpu.buffers import AnyArray, Bytes, address, allocate
from albireo_kernels.cpu.program import Op
from albireo_kernels.cpu.sampling import SlotTokens
from albireo_kernels.cpu.structs import (
    CANDIDATES,
    MAX_RANKS,
    TOKEN_LOGPROBS,
    ColumnsStruct,
    DrawStruct,
    ExchangeStruct,
    Extent,
    OpKind,
    OpStruct,
    OpUnion,
    PublishStruct,
    RowsOf,
    ScratchStruct,
    SelectStruct,
)

SCHEMES = ("merge", "batch-sharded", "gather")

Records = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True)
class SharedSampling:
    """What the ranks of a group write for each other; S rows.

    Attributes:
        logits: [S, vocab_size] of any row stride; each rank writes its columns.
        raw: the same, for logits of edited rows as they were.
        candidates: [S] `CANDIDATES` of each rank.
        tokens: [S].
        logprobs: [S] `TOKEN_LOGPROBS`.
    """

    logits: Float32Array
    raw: Float32Array
    candidates: Sequence[Records]
    tokens: Int32Array
    logprobs: Records

    @classmethod
    def alone(cls, logits: Float32Array) -> "SharedSampling":
        """Of a rank without others: of its own memory."""
        num_rows, vocab_size = logits.shape
        raw = allocate((num_rows, logits.strides[0] // 4), np.float32)[:, :vocab_size]
        candidates, logprobs = np.zeros(num_rows, CANDIDATES), np.zeros(num_rows, TOKEN_LOGPROBS)
        return cls(logits, raw, [candidates], np.zeros(num_rows, dtype=np.int32), logprobs)


@dataclass(frozen=True, slots=True)
class RankSampling:
    """What a rank has for itself.

    Attributes:
        rank: of ``len(SharedSampling.candidates)``.
        ids: its columns of the logits.
        slot_tokens: with room for the tokens that its scheme makes it count: of its columns, or of all.
        scratch: [threads, at least Library.sample_scratch_bytes(vocab_size)], aligned to 64 bytes.
    """

    rank: int
    ids: range
    slot_tokens: SlotTokens
    scratch: Bytes


def sampling_ops(scheme: str, shared: SharedSampling, own: RankSampling) -> list[Op]:
    """The sampling program of one rank.

    - merge: each rank selects from its columns; one meeting; each merges every t-th row's candidates; one meeting.
    - batch-sharded: one meeting, each rank copies every t-th row whole and samples from it, one meeting.
    - gather: one meeting, each rank copies all rows and samples from them.

    Copies stand for the collectives of engines whose ranks share no memory. A rank alone copies nothing.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme {scheme}: one of {', '.join(SCHEMES)}")
    if len(shared.candidates) == 1:
        return _sample_whole(shared, own, RowsOf.ALL, meets=False)
    if scheme == "merge":
        return _merge(shared, own)
    rows = RowsOf.ALL if scheme == "gather" else RowsOf.OWN
    copies = _copies(shared, is_private=scheme == "gather")
    exchanged = [exchange(shared.logits, copies.logits, rows)]
    return exchanged + _sample_whole(copies, own, rows, meets=scheme == "batch-sharded")


def _merge(shared: SharedSampling, own: RankSampling) -> list[Op]:
    mine = slice(own.ids.start, own.ids.stop)
    return [
        select(
            shared.logits[:, mine],
            shared.raw[:, mine],
            shared.candidates[own.rank],
            own.ids.start,
            own.slot_tokens,
            own.scratch,
            RowsOf.ALL,
        ),
        draw(shared, shared.candidates, own.scratch, RowsOf.OWN, meets=True),
        publish(shared, own.slot_tokens, own.ids, meets=True),
    ]


def _sample_whole(shared: SharedSampling, own: RankSampling, rows: RowsOf, *, meets: bool) -> list[Op]:
    vocab_size = shared.logits.shape[1]
    candidates = shared.candidates[own.rank % len(shared.candidates)]
    return [
        select(shared.logits, shared.raw, candidates, 0, own.slot_tokens, own.scratch, rows),
        draw(shared, [candidates], own.scratch, rows, meets=False),
        publish(shared, own.slot_tokens, range(vocab_size), meets=meets),
    ]


def _copies(shared: SharedSampling, *, is_private: bool) -> SharedSampling:
    """Memory of this rank for whole rows; private: nothing of the result is shared, either."""
    num_rows, vocab_size = shared.logits.shape
    copies = SharedSampling.alone(allocate((num_rows, shared.logits.strides[0] // 4), np.float32)[:, :vocab_size])
    if is_private:
        return copies
    return replace(copies, candidates=shared.candidates, tokens=shared.tokens, logprobs=shared.logprobs)


def exchange(source: Float32Array, to: Float32Array, rows: RowsOf) -> Op:
    """All ranks meet; then rows [S, vocab_size] of a share are copied from memory that they share."""
    _require(source.shape[1:] == to.shape[1:], f"exchange: rows of {source.shape[1]} and of {to.shape[1]} logits")
    struct = ExchangeStruct(
        source=_rows(source),
        to=_rows(to),
        source_stride=source.strides[0] // 4,
        to_stride=to.strides[0] // 4,
        vocab_size=source.shape[1],
        rows=rows,
    )
    return _op(OpKind.EXCHANGE, OpUnion(exchange=struct), source, to)


def select(
    logits: Float32Array,
    raw: Float32Array,
    candidates: Records,
    first_id: int,
    slot_tokens: SlotTokens,
    scratch: Bytes,
    rows: RowsOf,
) -> Op:
    """Begins histories, edits logits in place, and selects what goes into the draw.

    Args:
        logits: [S, num_ids], columns from ``first_id`` on; consumed.
        raw: like the logits; where those of edited rows are kept as they were, if logprobs are wanted.
        candidates: [S] `CANDIDATES`; written.
    """
    _require(raw.shape == logits.shape and raw.strides == logits.strides, "select: raw is not like the logits")
    struct = SelectStruct(
        logits=_columns(logits, first_id),
        raw=_rows(raw),
        candidates=_records(candidates, CANDIDATES),
        slot_tokens=slot_tokens.c,
        scratch=_scratch(scratch, logits.shape[1]),
        rows=rows,
    )
    return _op(OpKind.SELECT, OpUnion(select=struct), logits, raw, candidates, slot_tokens, scratch)


def draw(shared: SharedSampling, candidates: Sequence[Records], scratch: Bytes, rows: RowsOf, *, meets: bool) -> Op:
    """Draws tokens from all candidates of a row; where they are not enough, from its logits.

    Args:
        candidates: [S] `CANDIDATES` each, of adjacent columns, in order.
        meets: waits first until all ranks have selected.
    """
    _require(0 < len(candidates) <= MAX_RANKS, f"draw: candidates of {len(candidates)} ranks, {MAX_RANKS} at most")
    struct = DrawStruct(
        logits=_columns(shared.logits, 0),
        raw=_rows(shared.raw),
        num_candidates=len(candidates),
        meets=meets,
        tokens=_tokens(shared.tokens),
        logprobs=_records(shared.logprobs, TOKEN_LOGPROBS),
        scratch=_scratch(scratch, shared.logits.shape[1]),
        rows=rows,
    )
    for index, of_rank in enumerate(candidates):
        struct.candidates[index] = _records(of_rank, CANDIDATES)
    return _op(OpKind.DRAW, OpUnion(draw=struct), shared, tuple(candidates), scratch)


def publish(shared: SharedSampling, slot_tokens: SlotTokens, ids: range, *, meets: bool) -> Op:
    """Tokens become the step's, and their slots' last ones.

    Args:
        ids: the columns whose tokens ``slot_tokens`` counts.
        meets: waits first until all ranks have drawn.
    """
    struct = PublishStruct(
        tokens=_tokens(shared.tokens),
        logprobs=_records(shared.logprobs, TOKEN_LOGPROBS),
        slot_tokens=slot_tokens.c,
        first_id=ids.start,
        num_ids=len(ids),
        meets=meets,
    )
    return _op(OpKind.PUBLISH, OpUnion(publish=struct), shared, slot_tokens)


def _op(kind: OpKind, of: OpUnion, *buffers: object) -> Op:
    return Op(OpStruct(kind=kind, extent=Extent.EACH_SAMPLE, of=of), buffers)


def _columns(logits: Float32Array, first_id: int) -> ColumnsStruct:
    return ColumnsStruct(_rows(logits), logits.strides[0] // 4, first_id, logits.shape[1])


def _rows(array: Float32Array) -> int:
    _require(array.dtype == np.float32 and (array.strides[1] == 4 or not array.size), "logits are not rows of float32")
    return address(array)


def _tokens(array: Int32Array) -> int:
    _require(array.dtype == np.int32 and array.flags.c_contiguous, "tokens are not int32 in one piece")
    return address(array)


def _records(array: Records, dtype: np.dtype[Any]) -> int:
    _require(array.dtype == dtype and array.flags.c_contiguous, f"records are not {dtype.itemsize} bytes, in one piece")
    return address(array)


def _scratch(scratch: AnyArray, num_ids: int) -> ScratchStruct:
    return ScratchStruct(address(scratch), scratch.shape[1], num_ids)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
