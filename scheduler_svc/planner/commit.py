"""A step's result is in: tokens are known, sequences end, fences fall."""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from albireo.arrays import Int32Array, Int64Array
from albireo.errors import GroupError
from albireo.logprobs import Logprobs, join, places_where
from scheduler_svc.planner.sequence import EndReason, Sequence, Status
from scheduler_svc.planner.state import PlannerState, StepRecord, end, requeue_drained


class Ended(NamedTuple):
    """A sequence that ended in this step. ``matched_token_id``: the token that stopped it."""

    sequence: Sequence
    reason: EndReason
    matched_token_id: int | None = None


class ScoredPart(NamedTuple):
    """Logprobs of consecutive tokens of a sequence's prompt, from ``first_position`` on."""

    sequence: Sequence
    first_position: int
    logprobs: Logprobs


class Committed(NamedTuple):
    """What a step brought: parallel arrays [number of tokens that count], and the sequences that ended with it.

    Attributes:
        beginners: whose first output token is among them.
        logprobs: of those of the tokens whose sequences want them; None where none does.
        scored: of prompts; all of a sequence come before its first token, or with it.
    """

    frontends: Int32Array
    sequence_ids: Int64Array
    token_ids: Int32Array
    ended: list[Ended]
    beginners: list[Sequence]
    logprobs: Logprobs | None = None
    scored: Collection[ScoredPart] = ()


def commit_step(
    state: PlannerState,
    step_id: int,
    token_ids: Int32Array,
    logprobs: Logprobs | None = None,
    prompt_logprobs: Logprobs | None = None,
) -> Committed:
    """Books the tokens of the oldest step in flight.

    Args:
        token_ids: [rows that sampled], in row order.
        logprobs: of some of them.
        prompt_logprobs: of all tokens that rows scored, in row order.

    The row of a slot that has changed hands since belongs to a preempted sequence, which gets its token, or to one that
    has ended, whose token is dropped. Raises GroupError when the result does not belong to that step.
    """
    record = _take_record(state, step_id, token_ids, prompt_logprobs)
    scored = _commit_scored(record, prompt_logprobs)
    beginners = [each for each in record.beginners if each.status is not Status.ENDED and not each.has_output]
    slots, tokens = record.slots, token_ids
    if record.left:
        is_left = np.zeros_like(state.table.is_decoding)
        is_left[list(record.left)] = True
        has_left = is_left[slots]
        slots, tokens = slots[~has_left], tokens[~has_left]
    committed = _commit_running(state, record, slots, tokens, beginners)
    drained_rows: list[int] = []
    if state.draining:
        committed, drained_rows = _commit_draining(state, record, token_ids, committed)
        requeue_drained(state, step_id)
    if logprobs is not None:
        committed = committed._replace(logprobs=_kept(logprobs, record, drained_rows))
    if scored:
        committed = committed._replace(scored=scored)
    state.pool.release(step_id)
    return committed


def _take_record(
    state: PlannerState, step_id: int, token_ids: Int32Array, prompt_logprobs: Logprobs | None
) -> StepRecord:
    record = state.in_flight[0] if state.in_flight else None
    if record is None or record.step_id != step_id or len(token_ids) != len(record.slots):
        expected = "nothing" if record is None else f"step {record.step_id} with {len(record.slots)} tokens"
        raise GroupError(f"result of step {step_id} with {len(token_ids)} tokens where {expected} was expected")
    if int(token_ids.view(np.uint32).max(initial=0)) >= state.limits.vocab_size:  # as are negative ones
        raise GroupError(f"result of step {step_id} has tokens outside the vocabulary")
    num_scored = 0 if prompt_logprobs is None else len(prompt_logprobs.indices)
    if num_scored != sum(each.num_tokens for each in record.scored):
        raise GroupError(f"result of step {step_id} has {num_scored} prompt logprobs; others were expected")
    return state.in_flight.popleft()


def _commit_scored(record: StepRecord, prompt_logprobs: Logprobs | None) -> list[ScoredPart]:
    """Of sequences that have not ended, also of those that were preempted: they wait until this step is committed."""
    if prompt_logprobs is None:
        return []
    owners = np.repeat(np.arange(len(record.scored)), [each.num_tokens for each in record.scored])
    parts = []
    for index, (sequence, first_position, num_tokens) in enumerate(record.scored):
        if sequence.status is not Status.ENDED:
            sequence.num_scored = first_position + num_tokens
            logprobs = prompt_logprobs.of_tokens(places_where(owners == index))
            parts.append(ScoredPart(sequence, first_position, logprobs))
    return parts


def _commit_running(
    state: PlannerState, record: StepRecord, slots: Int64Array, token_ids: Int32Array, beginners: list[Sequence]
) -> Committed:
    """Tokens of sequences that still own their slots: array operations, and a loop over those that end."""
    table = state.table
    table.outputs.add(slots, token_ids)
    committed = Committed(table.frontend[slots], table.sequence_id[slots], token_ids, [], beginners)
    is_stop = table.is_stop[token_ids]
    if is_stop.any():
        for row in is_stop.nonzero()[0].tolist():
            slot, token = int(slots[row]), int(token_ids[row])
            sequence = table.owner(slot)
            if sequence.stops_at(token, len(sequence.token_ids) + table.outputs.num_tokens(slot)):
                end(state, sequence)
                committed.ended.append(Ended(sequence, EndReason.STOP, token))
    for sequence in record.finishers:
        if sequence.status is Status.RUNNING:
            end(state, sequence)
            committed.ended.append(Ended(sequence, EndReason.LENGTH))
    return committed


def _commit_draining(
    state: PlannerState, record: StepRecord, token_ids: Int32Array, committed: Committed
) -> tuple[Committed, list[int]]:
    """Tokens that steps in flight sampled for preempted sequences, one by one, since preemption is rare; and their
    rows, ascending."""
    rows = {slot: row for row, slot in enumerate(record.slots.tolist()) if slot in record.left}
    taken = [(record.left[slot], row) for slot, row in rows.items()]
    taken = [(sequence, row) for sequence, row in taken if sequence.status is Status.DRAINING]
    if not taken:
        return committed, []
    for sequence, row in taken:
        sequence.token_ids = np.append(sequence.token_ids, token_ids[row])
        token, num_tokens = int(token_ids[row]), len(sequence.token_ids)
        if sequence.stops_at(token, num_tokens):
            end(state, sequence)
            committed.ended.append(Ended(sequence, EndReason.STOP, token))
        elif num_tokens >= sequence.max_total_tokens:
            end(state, sequence)
            committed.ended.append(Ended(sequence, EndReason.LENGTH))
    sequences, taken_rows = [sequence for sequence, _ in taken], [row for _, row in taken]
    return (
        committed._replace(
            frontends=np.append(committed.frontends, np.array([each.frontend for each in sequences], dtype=np.int32)),
            sequence_ids=np.append(committed.sequence_ids, np.array([each.sequence_id for each in sequences])),
            token_ids=np.append(committed.token_ids, token_ids[taken_rows]),
        ),
        taken_rows,
    )


def _kept(logprobs: Logprobs, record: StepRecord, drained_rows: list[int]) -> Logprobs | None:
    """Logprobs beside a step's rows -> beside the tokens that count: those of running sequences, then the drained."""
    running = np.array([slot not in record.left for slot in record.slots.tolist()], dtype=np.bool_)
    drained = np.full(len(running), -1, dtype=np.int32)
    drained[drained_rows] = np.arange(len(drained_rows)) + running.sum()
    kept = join([logprobs.of_tokens(places_where(running)), logprobs.of_tokens(drained)])
    return kept if len(kept.indices) else None
