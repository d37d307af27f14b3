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
    beginners: list[Sequence]  # whose first output token is among them


def commit_step(state: PlannerState, step_id: int, token_ids: Int32Array) -> Committed:
    """Books the tokens of the oldest step in flight; ``token_ids`` [rows that sampled], in row order.

    The row of a slot that has changed hands since belongs to a preempted sequence, which gets its token, or to one that
    has ended, whose token is dropped. Raises GroupError when the result does not belong to that step.
    """
    record = _take_record(state, step_id, token_ids)
    beginners = [each for each in record.beginners if each.status is not Status.ENDED and not _has_output(state, each)]
    if record.left:
        is_left = np.zeros_like(state.table.active)
        is_left[list(record.left)] = True
        has_left = is_left[record.slots]
        committed = _commit_running(state, record.slots[~has_left], token_ids[~has_left], beginners)
        committed = _commit_draining(state, record, token_ids, has_left, committed)
    else:
        committed = _commit_running(state, record.slots, token_ids, beginners)
    state.pool.release(step_id)
    if state.draining:
        requeue_drained(state, step_id)
    return committed


def _take_record(state: PlannerState, step_id: int, token_ids: Int32Array) -> StepRecord:
    record = state.in_flight[0] if state.in_flight else None
    if record is None or record.step_id != step_id or len(token_ids) != len(record.slots):
        expected = "nothing" if record is None else f"step {record.step_id} with {len(record.slots)} tokens"
        raise GroupError(f"result of step {step_id} with {len(token_ids)} tokens where {expected} was expected")
    if int(token_ids.view(np.uint32).max(initial=0)) >= state.limits.vocab_size:  # as are negative ones
        raise GroupError(f"result of step {step_id} has tokens outside the vocabulary")
    return state.in_flight.popleft()


def _commit_running(
    state: PlannerState, slots: Int32Array, token_ids: Int32Array, beginners: list[Sequence]
) -> Committed:
    """Tokens of sequences that still own their slots: array operations, and a loop over those that end."""
    table = state.table
    num_tokens = table.num_known_tokens[slots]
    table.token_ids[slots, num_tokens] = token_ids
    num_tokens += 1
    table.num_known_tokens[slots] = num_tokens
    stops = _find_stops(state, slots, token_ids, num_tokens)
    committed = Committed(table.frontend[slots], table.sequence_id[slots], token_ids, [], beginners)
    for row in (stops | (num_tokens >= table.max_total_tokens[slots])).nonzero()[0]:
        _end(state, _owner(state, slots[row]), int(token_ids[row]), bool(stops[row]), committed)
    return committed


def _find_stops(state: PlannerState, slots: Int32Array, token_ids: Int32Array, num_tokens: Int32Array) -> BoolArray:
    """The rows whose token ends their sequence."""
    table = state.table
    stops: BoolArray = state.is_eos[token_ids] & table.checks_eos[slots]
    if table.num_with_stop_token_ids:
        stops |= (table.stop_token_ids[slots] == token_ids[:, None]).any(axis=1)
        for row in table.has_more_stop_token_ids[slots].nonzero()[0]:
            stops[row] |= int(token_ids[row]) in _owner(state, slots[row]).stop_token_ids
    return stops & (num_tokens > table.min_total_tokens[slots])


def _has_output(state: PlannerState, sequence: Sequence) -> bool:
    is_running = sequence.status is Status.RUNNING
    num_known = state.table.num_known_tokens[sequence.slot] if is_running else len(sequence.token_ids)
    return bool(num_known > sequence.num_prompt_tokens)


def _commit_draining(
    state: PlannerState, record: StepRecord, token_ids: Int32Array, has_left: BoolArray, committed: Committed
) -> Committed:
    """Tokens that steps in flight sampled for preempted sequences; one by one, since preemption is rare."""
    frontends, sequence_ids, tokens = [], [], []
    for row in has_left.nonzero()[0]:
        sequence = record.left[int(record.slots[row])]
        if sequence.status is not Status.DRAINING:
            continue
        token = int(token_ids[row])
        sequence.token_ids = np.append(sequence.token_ids, np.int32(token))
        num_tokens = len(sequence.token_ids)
        frontends.append(sequence.frontend)
        sequence_ids.append(sequence.sequence_id)
        tokens.append(token)
        stops = sequence.stops_at(token, bool(state.is_eos[token]), num_tokens)
        if stops or num_tokens >= sequence.max_total_tokens:
            _end(state, sequence, token, stops, committed)
    if not tokens:
        return committed
    return Committed(
        frontends=np.append(committed.frontends, np.array(frontends, dtype=np.int32)),
        sequence_ids=np.append(committed.sequence_ids, np.array(sequence_ids, dtype=np.int64)),
        token_ids=np.append(committed.token_ids, np.array(tokens, dtype=np.int32)),
        ended=committed.ended,
        beginners=committed.beginners,
    )


def _end(state: PlannerState, sequence: Sequence, token: int, stops: bool, committed: Committed) -> None:
    end(state, sequence)
    committed.ended.append(Ended(sequence, EndReason.STOP, token) if stops else Ended(sequence, EndReason.LENGTH))


def _owner(state: PlannerState, slot: int) -> Sequence:
    owner = state.table.owners[slot]
    assert owner is not None
    return owner
