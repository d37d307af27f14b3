"""What the next step computes: decodes first, then prompts, under a token budget.

Plan n+1 is made while step n runs. It assumes that every running sequence emits one token in step n (a placeholder),
so it reads only lengths, never tokens. A sequence known to reach its length limit is left out.
"""

from dataclasses import dataclass

import numpy as np

from albireo.arrays import BoolArray, Int32Array
from albireo.plan import NewSequence, Rows, StepPlan
from scheduler_svc.planner.admission import Prompts, choose_prompts, make_way
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
    decodes, growing = _runnable(state)
    while len(growing) > state.pool.num_free and len(growing) > _num_coming_blocks(state):
        preempt(state, _victim(state, decodes))
        decodes, growing = _runnable(state)
    is_short = len(growing) > state.pool.num_free
    if is_short:
        sitting_out = _in_order(state, growing)[state.pool.num_free :]
        decodes[sitting_out], growing = False, growing[~np.isin(growing, sitting_out)]
    decode_slots = decodes.nonzero()[0].astype(np.int32)
    append_blocks = _grow(state, growing)
    prompts = choose_prompts(state, _prefill_budget(state, len(decode_slots)), may_start=not is_short)
    if not len(decode_slots) and not prompts.slots:
        return None
    step_id = state.next_step_id
    state.next_step_id += 1
    new_sequences = tuple(_new_sequence(state, sequence) for sequence in prompts.started)
    _advance_decodes(state, decodes, decode_slots, step_id)
    beginners = tuple(_advance_prompts(state, prompts, step_id))
    rows = _rows(state, decode_slots, prompts, beginners)
    sampling_slots = np.append(decode_slots, np.array([each.slot for each in beginners], dtype=np.int32))
    state.in_flight.append(StepRecord(step_id, sampling_slots if beginners else decode_slots, beginners))
    freed, state.freed_slots = state.freed_slots, []
    plan = StepPlan(
        epoch=state.epoch,
        step_id=step_id,
        rows=rows,
        finished_slots=np.array(freed, dtype=np.int32),
        new_sequences=new_sequences,
        append_slots=growing,
        append_blocks=append_blocks,
    )
    num_prefill_tokens = sum(prompts.counts)
    num_rows = len(decode_slots) + len(prompts.slots)
    return Planned(plan, num_rows, len(decode_slots) + num_prefill_tokens, num_prefill_tokens, prompts.started)


def _prefill_budget(state: PlannerState, num_decodes: int) -> int:
    """Prompt tokens of this step: what is left of the step's size, and no more than decoding sequences can wait for."""
    budget = state.limits.max_num_batched_tokens - num_decodes
    return min(budget, state.max_prefill_tokens) if num_decodes else budget


def _runnable(state: PlannerState) -> tuple[BoolArray, Int32Array]:
    """Which slots decode in this step, [max_num_seqs], and those of them whose token begins a block."""
    table = state.table
    decodes = table.is_decoding & (table.num_tokens < table.max_total_tokens)
    is_full = table.num_computed_tokens == table.num_blocks * state.limits.block_size
    return decodes, (decodes & is_full).nonzero()[0].astype(np.int32)


def _num_coming_blocks(state: PlannerState) -> int:
    """Blocks that are free, or will be without preempting anyone: behind fences, or of sequences whose last token is in
    flight. The first in order is never a victim of more: one sequence always fits."""
    table = state.table
    is_ending = table.active & (table.num_tokens >= table.max_total_tokens)
    return state.pool.num_free + state.pool.num_fenced + int(table.num_blocks[is_ending].sum())


def _grow(state: PlannerState, slots: Int32Array) -> Int32Array:
    """Gives each of ``slots`` one more block; returns the blocks."""
    if not len(slots):
        return slots
    table = state.table
    blocks = np.array(state.pool.allocate(len(slots)), dtype=np.int32)
    table.block_tables[slots, table.num_blocks[slots]] = blocks
    table.num_blocks[slots] += 1
    return blocks


def _advance_decodes(state: PlannerState, decodes: BoolArray, slots: Int32Array, step_id: int) -> None:
    """Each computes one token and is promised one more."""
    table = state.table
    table.num_computed_tokens += decodes
    table.num_tokens += decodes
    table.last_step[decodes] = step_id
    state.tenants.charge_outputs(table.tenant, slots)


def _advance_prompts(state: PlannerState, prompts: Prompts, step_id: int) -> list[Sequence]:
    """Chunks of prompts are computed, and their full blocks can be found from the next plan on. Returns the sequences
    whose prompts end here, and which are promised a token."""
    table, block_size = state.table, state.limits.block_size
    beginners = []
    for slot, count in zip(prompts.slots, prompts.counts, strict=True):
        sequence, start = table.owners[slot], int(table.num_computed_tokens[slot])
        assert sequence is not None
        stop = start + count
        table.num_computed_tokens[slot] = stop
        table.last_step[slot] = step_id
        if state.limits.caches_prefixes:
            blocks = table.block_tables[slot, start // block_size : stop // block_size].tolist()
            publish_chunk(state.pool, state.coming, sequence, blocks, start // block_size)
        if stop == table.num_tokens[slot]:
            table.num_tokens[slot] += 1
            table.is_decoding[slot] = True
            table.prefilling.remove(slot)
            beginners.append(sequence)
    return beginners


def _rows(
    state: PlannerState, decode_slots: Int32Array, prompts: Prompts, beginners: tuple[Sequence, ...]
) -> Rows | None:
    """The rows of this plan; None when the last plan's rows decode again."""
    num_decodes = len(decode_slots)
    slots = np.append(decode_slots, np.array(prompts.slots, dtype=np.int32)) if prompts.slots else decode_slots
    last_rows, state.last_rows = state.last_rows, slots.tobytes()
    if not prompts.slots and last_rows == state.last_rows:
        return None
    counts = np.ones(len(slots), dtype=np.int32)
    counts[num_decodes:] = prompts.counts
    samples = np.ones(len(slots), dtype=np.bool_)
    ends_here = {sequence.slot for sequence in beginners}
    samples[num_decodes:] = [slot in ends_here for slot in prompts.slots]
    return Rows(slots, counts, samples)


def _new_sequence(state: PlannerState, sequence: Sequence) -> NewSequence:
    return NewSequence(
        slot=sequence.slot,
        token_ids=sequence.token_ids,
        num_prompt_tokens=sequence.num_prompt_tokens,
        num_computed_tokens=int(state.table.num_computed_tokens[sequence.slot]),
        block_table=state.table.blocks_of(sequence.slot),
        sampling=sequence.sampling,
    )


def _victim(state: PlannerState, decodes: BoolArray) -> int:
    """Whose slot is taken when blocks run out: of the lowest priority, of the tenant that holds the most blocks, the
    newest. The first in order of priority and arrival never is the one, so there is always progress."""
    table = state.table
    slots = [*decodes.nonzero()[0].tolist(), *table.prefilling]
    held: list[float] = np.bincount(table.tenant[slots], weights=table.num_blocks[slots]).tolist()
    owners = [owner for slot in slots if (owner := table.owners[slot]) is not None]
    owners.remove(min(owners, key=lambda each: each.place))
    victim: Sequence = max(owners, key=lambda each: (each.place.negative_priority, held[each.tenant], each.place))
    return victim.slot


def _in_order(state: PlannerState, slots: Int32Array) -> Int32Array:
    """``slots`` by the place of their sequences, first served first."""
    owners = state.table.owners
    return np.array(sorted(slots, key=lambda slot: owners[slot].place), dtype=np.int32)  # type: ignore[union-attr]
