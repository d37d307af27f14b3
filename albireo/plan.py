"""The plan codec: `StepPlan` and `StepResult` as arrays, and their form on the wire (plan.proto).

Made in every step, after a sleep, with cold caches: named tuples, and nothing done for what is not there.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from albireo import logprobs
from albireo.arrays import EMPTY_INT32, BoolArray, Int32Array, pack_int32, unpack_int32
from albireo.errors import GroupError
from albireo.logprobs import Logprobs
from albireo.transfers import (
    Transfer,
    TransferResult,
    decode_transfer,
    decode_transfer_result,
    encode_transfer,
    encode_transfer_result,
)
from albireo.v1 import plan_pb2

UInt8Array = npt.NDArray[np.uint8]

_SAMPLES, _SCORES = np.uint8(1), np.uint8(2)  # bits of a row


class NewSequence(NamedTuple):
    """A sequence that takes a slot: for the first time, or again after a preemption.

    Attributes:
        token_ids: [num_tokens], the prompt and, when the sequence resumes, its output so far.
        num_computed_tokens: leading tokens whose KV the blocks already hold.
        block_table: [ceil(num_tokens / block_size)] at least.
        num_prompt_logprobs: of the likeliest tokens at each position that its rows score; None: they score none.
        trace_parent: W3C trace context; empty: it is not traced.
    """

    slot: int
    token_ids: Int32Array
    num_prompt_tokens: int
    num_computed_tokens: int
    block_table: Int32Array
    sampling: plan_pb2.Sampling
    num_prompt_logprobs: int | None = None
    trace_parent: str = ""


class Rows(NamedTuple):
    """What one step computes, a row per scheduled sequence; arrays [num_rows].

    Attributes:
        samples: the rows after whose last position a token is sampled: decode rows and last chunks of prompts.
        scores: the rows that bring logprobs of the prompt's tokens that follow their positions; None: no row does.
    """

    slots: Int32Array
    num_scheduled_tokens: Int32Array
    samples: BoolArray
    scores: BoolArray | None = None

    def is_decode_of(self, slots: Int32Array) -> bool:
        """Whether these rows are one sampled token for each of ``slots``, in that order."""
        return (
            len(self.slots) == len(slots)
            and bool((self.num_scheduled_tokens == 1).all())
            and bool(self.samples.all())
            and bool((self.slots == slots).all())
        )


def decode_rows(slots: Int32Array) -> Rows:
    """Rows of a pure decode step: one sampled token for each of ``slots``."""
    return Rows(slots, np.ones(len(slots), dtype=np.int32), np.ones(len(slots), dtype=np.bool_))


class StepPlan(NamedTuple):
    """A diff against what the worker group holds, in the order in which it is applied: finished slots, new sequences,
    block appends, rows. ``rows`` is None when the last plan's rows decode again.

    With ``only_transfers`` it is no step: ``step_id`` is the next one's, and nothing else is set but ``transfers``.
    """

    epoch: int
    step_id: int
    rows: Rows | None
    finished_slots: Int32Array = EMPTY_INT32
    new_sequences: tuple[NewSequence, ...] = ()
    append_slots: Int32Array = EMPTY_INT32
    append_blocks: Int32Array = EMPTY_INT32
    transfers: tuple[Transfer, ...] = ()
    only_transfers: bool = False


class StepResult(NamedTuple):
    """What one step brought.

    Attributes:
        token_ids: [number of sampling rows], in row order.
        logprobs: of those of them that want any.
        prompt_logprobs: of all tokens that rows scored, in row order.
        transfers: that have ended meanwhile.
        only_transfers: this is no step's result; ``step_id`` says nothing.
    """

    epoch: int
    step_id: int
    token_ids: Int32Array
    timings: plan_pb2.StepTimings
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    transfers: tuple[TransferResult, ...] = ()
    only_transfers: bool = False


def transfers_result(epoch: int, transfers: tuple[TransferResult, ...]) -> StepResult:
    """What tells of transfers alone."""
    return StepResult(epoch, 0, EMPTY_INT32, plan_pb2.StepTimings(), transfers=transfers, only_transfers=True)


def encode_plan(plan: StepPlan) -> bytes:
    message = plan_pb2.StepPlan(epoch=plan.epoch, step_id=plan.step_id)
    if len(plan.finished_slots):
        message.finished_slots = pack_int32(plan.finished_slots)
    if plan.new_sequences:
        message.new_sequences.extend(map(_encode_new_sequence, plan.new_sequences))
    if len(plan.append_slots):
        message.append_slots = pack_int32(plan.append_slots)
        message.append_blocks = pack_int32(plan.append_blocks)
    if plan.rows is not None:
        message.row_slots = pack_int32(plan.rows.slots)
        message.row_num_scheduled_tokens = pack_int32(plan.rows.num_scheduled_tokens)
        message.row_samples = _row_bits(plan.rows).tobytes()
    if plan.transfers or plan.only_transfers:
        message.transfers.extend(map(encode_transfer, plan.transfers))
        message.only_transfers = plan.only_transfers
    return message.SerializeToString()


def decode_plan(data: bytes) -> StepPlan:
    """Raises GroupError when the message does not hold a plan: the stream can no longer be trusted."""
    try:
        message = plan_pb2.StepPlan.FromString(data)
        rows = None
        if message.HasField("row_slots"):
            bits = np.frombuffer(message.row_samples, dtype=np.uint8)
            rows = Rows(
                unpack_int32(message.row_slots),
                unpack_int32(message.row_num_scheduled_tokens),
                (bits & _SAMPLES).astype(np.bool_),
                (bits & _SCORES).astype(np.bool_) if bits.max(initial=0) >= _SCORES else None,
            )
        new_sequences, transfers = message.new_sequences, message.transfers
        plan = StepPlan(
            epoch=message.epoch,
            step_id=message.step_id,
            rows=rows,
            finished_slots=unpack_int32(message.finished_slots),
            new_sequences=tuple(map(_decode_new_sequence, new_sequences)) if new_sequences else (),
            append_slots=unpack_int32(message.append_slots),
            append_blocks=unpack_int32(message.append_blocks),
            transfers=tuple(map(decode_transfer, transfers)) if transfers else (),
            only_transfers=message.only_transfers,
        )
    except Exception as error:  # protobuf's DecodeError has no public base, numpy raises ValueError
        raise GroupError(f"not a step plan: {error}") from error
    lengths_agree = len(plan.append_slots) == len(plan.append_blocks) and (
        rows is None or len(rows.slots) == len(rows.num_scheduled_tokens) == len(rows.samples)
    )
    if not lengths_agree:
        raise GroupError(f"step {plan.step_id}: parallel arrays differ in length")
    changes_slots = len(plan.finished_slots) or len(plan.append_slots) or plan.new_sequences
    if plan.only_transfers and (changes_slots or plan.rows is not None):
        raise GroupError(f"step {plan.step_id}: a plan of transfers alone has more")
    return plan


def encode_result(result: StepResult) -> bytes:
    message = plan_pb2.StepResult(
        epoch=result.epoch, step_id=result.step_id, token_ids=pack_int32(result.token_ids), timings=result.timings
    )
    if result.logprobs is not None:
        message.logprobs.CopyFrom(logprobs.encode(result.logprobs))
    if result.prompt_logprobs is not None:
        message.prompt_logprobs.CopyFrom(logprobs.encode(result.prompt_logprobs))
    if result.transfers:
        message.transfers.extend(map(encode_transfer_result, result.transfers))
        message.only_transfers = result.only_transfers
    return message.SerializeToString()


def decode_result(data: bytes) -> StepResult:
    """Raises GroupError when the message does not hold a result."""
    try:
        message = plan_pb2.StepResult.FromString(data)
        token_ids = unpack_int32(message.token_ids)
        decoded = logprobs.decode(message.logprobs, len(token_ids)) if message.HasField("logprobs") else None
        scored = logprobs.decode_whole(message.prompt_logprobs) if message.HasField("prompt_logprobs") else None
        transfers = tuple(map(decode_transfer_result, message.transfers)) if message.transfers else ()
        only_transfers = message.only_transfers
        return StepResult(
            message.epoch, message.step_id, token_ids, message.timings, decoded, scored, transfers, only_transfers
        )
    except Exception as error:
        raise GroupError(f"not a step result: {error}") from error


def _row_bits(rows: Rows) -> UInt8Array:
    samples: UInt8Array = rows.samples.view(np.uint8)
    return samples if rows.scores is None else samples + rows.scores.view(np.uint8) * _SCORES


def _encode_new_sequence(new: NewSequence) -> plan_pb2.NewSequence:
    return plan_pb2.NewSequence(
        slot=new.slot,
        token_ids=pack_int32(new.token_ids),
        num_prompt_tokens=new.num_prompt_tokens,
        num_computed_tokens=new.num_computed_tokens,
        block_table=pack_int32(new.block_table),
        sampling=new.sampling,
        num_prompt_logprobs=new.num_prompt_logprobs,
        trace_parent=new.trace_parent,
    )


def _decode_new_sequence(message: plan_pb2.NewSequence) -> NewSequence:
    return NewSequence(
        slot=message.slot,
        token_ids=unpack_int32(message.token_ids),
        num_prompt_tokens=message.num_prompt_tokens,
        num_computed_tokens=message.num_computed_tokens,
        block_table=unpack_int32(message.block_table),
        sampling=message.sampling,
        num_prompt_logprobs=message.num_prompt_logprobs if message.HasField("num_prompt_logprobs") else None,
        trace_parent=message.trace_parent,
    )
