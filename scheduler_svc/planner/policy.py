"""What the next step computes: decodes first, then prompts, under a token budget.

Plan n+1 is made while step n runs. It assumes that every running sequence emits one token in step n (a placeholder),
so it reads only lengths, never tokens. A sequence known to reach its length limit is left out.
"""

from dataclasses import dataclass

import numpy as np

from albireo.arrays import Int32Array
from albireo.plan import NewSequence, Rows, StepPlan
from scheduler_svc.planner.admission import choose_prompts, make_way
from scheduler_svc.planner.prefix import publish_chunk
from scheduler_svc.planner.sequence import Sequence
from scheduler_svc.planner.state import PlannerState, StepRecord, preempt


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, and what it computes."""

    plan: StepPlan
    num_rows: int
    num_tokens: int
    num_prefill_tokens: int  # of them, those of prompts
    started: list[Sequence]  # took a slot, for the first time or again


def plan_step(state: PlannerState) -> Planned | None:
    """Plans one more step and books it in ``state``; None when the window is full or nothing can run."""
    if len(state.in_flight) >= state.limits.depth:
        return None
    make_way(state)
    decodes, prefills, growing = _runnable(state)
    while len(growing) > state.pool.num_free and len(growing) > _num_coming_blocks(state):
        preempt(state, _victim(state, np.concatenate([decodes, prefills])))
        decodes, prefills, growing = _runnable(state)
    is_short = len(growing) > state.pool.num_free
    if is_short:
        sitting_out = _in_order(state, growing)[state.pool.num_free :]
        decodes, growing = decodes[~np.isin(decodes, sitting_out)], growing[~np.isin(growing, sitting_out)]
    append_blocks = _grow(state, growing)
    prompts = choose_prompts(state, prefills, _prefill_budget(state, len(decodes)), may_start=not is_short)
    if not len(decodes) and not prompts.slots:
        return None
    slots = np.concatenate([decodes, np.array(prompts.slots, dtype=np.int32)])
    counts = np.ones(len(slots), dtype=np.int32)
    counts[len(decodes) :] = prompts.counts
    state.tenants.charge_outputs(state.table.tenant[decodes])
    plan = _book(state, slots, counts, prompts.started, growing, append_blocks)
    _publish(state, prompts.slots, prompts.counts)
    num_prefill_tokens = sum(prompts.counts)
    return Planned(
        plan,
        len(slots),
        len(decodes) + num_prefill_tokens,
        num_prefill_tokens,
        prompts.started,
    )


def _prefill_budget(state: PlannerState, num_decodes: int) -> int:
    """Prompt tokens of this step: what is left of the step's size, and no more than decoding sequences can wait for."""
    budget = state.limits.max_num_batched_tokens - num_decodes
    return min(budget, state.max_prefill_tokens) if num_decodes else budget


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
    new_sequences = tuple(_new_sequence(state, sequence) for sequence in started)  # before their first tokens count
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
        new_sequences=new_sequences,
        append_slots=append_slots,
        append_blocks=append_blocks,
    )


def _new_sequence(state: PlannerState, sequence: Sequence) -> NewSequence:
    return NewSequence(
        slot=sequence.slot,
        token_ids=sequence.token_ids,
        num_prompt_tokens=sequence.num_prompt_tokens,
        num_computed_tokens=int(state.table.num_computed_tokens[sequence.slot]),
        block_table=state.table.blocks_of(sequence.slot),
        sampling=sequence.sampling,
    )


def _publish(state: PlannerState, slots: list[int], counts: list[int]) -> None:
    """The blocks of prompts that this plan completes can be found from the next plan on."""
    if not state.limits.caches_prefixes:
        return
    table, block_size = state.table, state.limits.block_size
    for slot, count in zip(slots, counts, strict=True):
        sequence, stop = table.owners[slot], int(table.num_computed_tokens[slot])
        assert sequence is not None
        start_block, stop_block = (stop - count) // block_size, stop // block_size
        publish_chunk(state.pool, state.coming, sequence, table.block_tables[slot], start_block, stop_block)


def _victim(state: PlannerState, slots: Int32Array) -> int:
    """Which of ``slots`` is preempted when blocks run out: of the lowest priority, of the tenant that holds the most
    blocks, the newest. The first in order of priority and arrival never is, so there is always progress."""
    table = state.table
    held: list[float] = np.bincount(table.tenant[slots], weights=table.num_blocks[slots]).tolist()
    owners = [owner for slot in slots if (owner := table.owners[slot]) is not None]
    owners.remove(min(owners, key=lambda each: each.place))
    victim: Sequence = max(owners, key=lambda each: (each.place.negative_priority, held[each.tenant], each.place))
    return victim.slot


def _in_order(state: PlannerState, slots: Int32Array) -> Int32Array:
    """``slots`` by the place of their sequences, first served first."""
    owners = state.table.owners
    return np.array(sorted(slots, key=lambda slot: owners[slot].place), dtype=np.int32)  # type: ignore[union-attr]
