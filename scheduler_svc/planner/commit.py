"""A step's result is in: tokens are known, sequences end, fences fall."""

from dataclasses import dataclass

import numpy as np

from albireo.arrays import BoolArray, Int32Array, Int64Array
from albireo.errors import GroupError
from scheduler_svc.planner.sequence import EndReason, Sequence, Status
from scheduler_svc.planner.state import PlannerState, StepRecord, end, requeue_drained


@dataclass(frozen=True, slots=True)
class Ended:
    """A sequence that ended in this step. ``matched_token_id``: the token that stopped it."""

    sequence: Sequence
    reason: EndReason
    matched_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class Committed:
    """What a step brought: parallel arrays [number of tokens that count], and the sequences that ended with it."""

    frontends: Int32Array
    sequence_ids: Int64Array
    token_ids: Int32Array
    ended: list[Ended]
    first_tokens: list[Sequence]  # sequences whose first output token is among them


def commit_step(state: PlannerState, step_id: int, token_ids: Int32Array) -> Committed:
    """Books the tokens of the oldest step in flight; ``token_ids`` [rows that sampled], in row order.

    A row whose slot has changed hands since belongs to a preempted sequence, which gets its token, or to one that has
    ended, whose token is dropped. Raises GroupError when the result does not belong to that step.
    """
    record = _take_record(state, step_id, token_ids)
    is_current = state.table.generation[record.slots] == record.generations
    committed = _commit_running(state, record.slots[is_current], token_ids[is_current])
    if not is_current.all():
        committed = _commit_draining(state, record, token_ids, ~is_current, committed)
    state.pool.release(step_id)
    requeue_drained(state, step_id)
    return committed


def _take_record(state: PlannerState, step_id: int, token_ids: Int32Array) -> StepRecord:
    record = state.in_flight[0] if state.in_flight else None
    if record is None or record.step_id != step_id or len(token_ids) != len(record.slots):
        expected = "nothing" if record is None else f"step {record.step_id} with {len(record.slots)} tokens"
        raise GroupError(f"result of step {step_id} with {len(token_ids)} tokens where {expected} was expected")
    if ((token_ids < 0) | (token_ids >= state.limits.vocab_size)).any():
        raise GroupError(f"result of step {step_id} has tokens outside the vocabulary")
    return state.in_flight.popleft()


def _commit_running(state: PlannerState, slots: Int32Array, token_ids: Int32Array) -> Committed:
    """Tokens of sequences that still own their slots: array operations, and a loop over those that end."""
    table = state.table
    num_tokens = table.num_known_tokens[slots] + 1
    table.token_ids[slots, num_tokens - 1] = token_ids
    table.num_known_tokens[slots] = num_tokens
    stops = state.is_eos[token_ids] & table.checks_eos[slots]
    stops |= (table.stop_token_ids[slots] == token_ids[:, None]).any(axis=1)
    for row in np.flatnonzero(table.has_more_stop_token_ids[slots]):
        stops[row] |= int(token_ids[row]) in _owner(state, slots[row]).stop_token_ids
    stops &= num_tokens > table.min_total_tokens[slots]
    is_first = num_tokens == table.num_prompt_tokens[slots] + 1
    committed = Committed(
        frontends=table.frontend[slots],
        sequence_ids=table.sequence_id[slots],
        token_ids=token_ids,
        ended=[],
        first_tokens=[_owner(state, slot) for slot in slots[is_first]],
    )
    for row in np.flatnonzero(stops | (num_tokens >= table.max_total_tokens[slots])):
        _end(state, _owner(state, slots[row]), int(token_ids[row]), bool(stops[row]), committed)
    return committed


def _commit_draining(
    state: PlannerState, record: StepRecord, token_ids: Int32Array, is_stale: BoolArray, committed: Committed
) -> Committed:
    """Tokens that steps in flight sampled for preempted sequences; one by one, since preemption is rare."""
    frontends, sequence_ids, tokens = [], [], []
    for row in np.flatnonzero(is_stale):
        sequence = state.draining.get((int(record.slots[row]), int(record.generations[row])))
        if sequence is None or sequence.status is not Status.DRAINING:
            continue
        token = int(token_ids[row])
        sequence.token_ids = np.append(sequence.token_ids, np.int32(token))
        num_tokens = len(sequence.token_ids)
        if num_tokens == sequence.num_prompt_tokens + 1:
            committed.first_tokens.append(sequence)
        frontends.append(sequence.frontend)
        sequence_ids.append(sequence.sequence_id)
        tokens.append(token)
        stops = sequence.stops_at(token, bool(state.is_eos[token]), num_tokens)
        if stops or num_tokens >= sequence.max_total_tokens:
            _end(state, sequence, token, stops, committed)
    return Committed(
        frontends=np.append(committed.frontends, np.array(frontends, dtype=np.int32)),
        sequence_ids=np.append(committed.sequence_ids, np.array(sequence_ids, dtype=np.int64)),
        token_ids=np.append(committed.token_ids, np.array(tokens, dtype=np.int32)),
        ended=committed.ended,
        first_tokens=committed.first_tokens,
    )


def _end(state: PlannerState, sequence: Sequence, token: int, stops: bool, committed: Committed) -> None:
    end(state, sequence)
    committed.ended.append(Ended(sequence, EndReason.STOP, token) if stops else Ended(sequence, EndReason.LENGTH))


def _owner(state: PlannerState, slot: int) -> Sequence:
    owner = state.table.owners[slot]
    assert owner is not None
    return owner
