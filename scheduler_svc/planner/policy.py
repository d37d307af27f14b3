"""What the next step computes: decodes first, then prompts in progress, then arrivals, under a token budget.

Plan n+1 is made while step n runs. It assumes that every running sequence emits one token in step n (a placeholder),
so it reads only lengths, never tokens. A sequence known to reach its length limit is left out.
"""

from dataclasses import dataclass

import numpy as np

from albireo.arrays import Int32Array
from albireo.plan import NewSequence, Rows, StepPlan
from scheduler_svc.planner.sequence import Sequence
from scheduler_svc.planner.state import PlannerState, StepRecord, peek_waiting, pop_waiting, preempt


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, and what happened on the way to it."""

    plan: StepPlan
    num_tokens: int
    started: list[Sequence]  # took a slot, for the first time or again
    preempted: list[Sequence]


def plan_step(state: PlannerState) -> Planned | None:
    """Plans one more step and books it in ``state``; None when the window is full or nothing can run."""
    if len(state.in_flight) >= state.limits.depth:
        return None
    decodes, prefills, growing = _runnable(state)
    preempted: list[Sequence] = []
    while len(growing) > state.pool.num_free and len(growing) > _num_coming_blocks(state):
        preempted.append(preempt(state, int(_in_order(state, np.concatenate([decodes, prefills]))[-1])))
        decodes, prefills, growing = _runnable(state)
    is_short = len(growing) > state.pool.num_free
    if is_short:
        sitting_out = _in_order(state, growing)[state.pool.num_free :]
        decodes, growing = decodes[~np.isin(decodes, sitting_out)], growing[~np.isin(growing, sitting_out)]
    append_blocks = _grow(state, growing)
    chunks, budget = _chunks(state, prefills, state.limits.max_num_batched_tokens - len(decodes))
    started = [] if is_short else _admit(state, chunks, budget)
    if not len(decodes) and not chunks:
        return None
    slots = np.concatenate([decodes, np.array([slot for slot, _ in chunks], dtype=np.int32)])
    counts = np.ones(len(slots), dtype=np.int32)
    counts[len(decodes) :] = [count for _, count in chunks]
    plan = _book(state, slots, counts, started, growing, append_blocks)
    return Planned(plan, int(counts.sum()), started, preempted)


def _runnable(state: PlannerState) -> tuple[Int32Array, Int32Array, Int32Array]:
    """Slots with one token to compute, slots with more, and those of the first whose token begins a block."""
    table = state.table
    slots = np.flatnonzero(table.active & (table.num_tokens < table.max_total_tokens)).astype(np.int32)
    num_computed = table.num_computed_tokens[slots]
    is_decode = table.num_tokens[slots] - num_computed == 1
    needs_block = is_decode & (num_computed == table.num_blocks[slots] * state.limits.block_size)
    return slots[is_decode], slots[~is_decode], slots[needs_block]


def _num_coming_blocks(state: PlannerState) -> int:
    """Blocks that are free, or will be without preempting anyone: behind fences, or of sequences whose last token is in
    flight. The first in order is never a victim of more: one sequence always fits."""
    table = state.table
    is_ending = table.active & (table.num_tokens >= table.max_total_tokens)
    return state.pool.num_free + state.pool.num_fenced + int(table.num_blocks[is_ending].sum())


def _grow(state: PlannerState, slots: Int32Array) -> Int32Array:
    """Gives each of ``slots`` one more block; returns the blocks."""
    table = state.table
    blocks = state.pool.allocate(len(slots))
    table.block_tables[slots, table.num_blocks[slots]] = blocks
    table.num_blocks[slots] += 1
    return blocks


def _chunks(state: PlannerState, prefills: Int32Array, budget: int) -> tuple[list[tuple[int, int]], int]:
    """(slot, number of tokens) of prompts in progress, and the budget that is left."""
    chunks = []
    for slot in _in_order(state, prefills):
        count = min(int(state.table.num_tokens[slot] - state.table.num_computed_tokens[slot]), budget)
        if count == 0:
            break
        chunks.append((int(slot), count))
        budget -= count
    return chunks, budget


def _admit(state: PlannerState, chunks: list[tuple[int, int]], budget: int) -> list[Sequence]:
    """Starts waiting sequences in order, while slots, blocks and budget last; adds their first chunks to ``chunks``.

    A sequence gets the blocks of all its tokens at once. One block per running sequence stays free, so that an
    arrival does not make the others preempt it at once.
    """
    started: list[Sequence] = []
    while budget > 0 and state.table.free_slots:
        sequence = peek_waiting(state)
        if sequence is None:
            break
        num_blocks = -(-len(sequence.token_ids) // state.limits.block_size)
        if num_blocks + state.num_running > state.pool.num_free:
            break
        slot = state.table.take(pop_waiting(state), state.pool.allocate(num_blocks))
        count = min(len(sequence.token_ids), budget)
        chunks.append((slot, count))
        budget -= count
        started.append(sequence)
    return started


def _book(
    state: PlannerState,
    slots: Int32Array,
    counts: Int32Array,
    started: list[Sequence],
    append_slots: Int32Array,
    append_blocks: Int32Array,
) -> StepPlan:
    """Makes the plan of these rows and moves the state past it."""
    table = state.table
    step_id = state.next_step_id
    state.next_step_id += 1
    table.num_computed_tokens[slots] += counts
    samples = table.num_computed_tokens[slots] == table.num_tokens[slots]
    sampling_slots = slots[samples]
    table.num_tokens[sampling_slots] += 1
    table.last_step[slots] = step_id
    state.in_flight.append(StepRecord(step_id, sampling_slots, table.generation[sampling_slots]))
    rows = Rows(slots, counts, samples)
    repeats = rows.is_decode_of(state.last_row_slots)
    state.last_row_slots = slots
    freed, state.freed_slots = state.freed_slots, []
    return StepPlan(
        epoch=state.epoch,
        step_id=step_id,
        rows=None if repeats else rows,
        finished_slots=np.array(freed, dtype=np.int32),
        new_sequences=tuple(_new_sequence(state, sequence) for sequence in started),
        append_slots=append_slots,
        append_blocks=append_blocks,
    )


def _new_sequence(state: PlannerState, sequence: Sequence) -> NewSequence:
    return NewSequence(
        slot=sequence.slot,
        token_ids=sequence.token_ids,
        num_prompt_tokens=sequence.num_prompt_tokens,
        num_computed_tokens=0,
        block_table=state.table.blocks_of(sequence.slot),
        sampling=sequence.sampling,
    )


def _in_order(state: PlannerState, slots: Int32Array) -> Int32Array:
    """``slots`` by the place of their sequences, first served first."""
    owners = state.table.owners
    return np.array(sorted(slots, key=lambda slot: owners[slot].place), dtype=np.int32)  # type: ignore[union-attr]
