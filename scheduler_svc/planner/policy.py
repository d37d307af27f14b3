"""What the next step computes: decodes first, then prompts, under a token budget.

Plan n+1 is made while step n runs. It assumes that every running sequence emits one token in step n (a placeholder),
so it reads only lengths, never tokens. A sequence known to reach its length limit is left out.
"""

from typing import NamedTuple

import numpy as np

from albireo.arrays import EMPTY_INT32, BoolArray, Int32Array, Int64Array
from albireo.plan import NewSequence, Rows, StepPlan
from scheduler_svc.planner.admission import Prompts, choose_prompts, make_way
from scheduler_svc.planner.prefix import publish_chunk
from scheduler_svc.planner.sequence import Sequence
from scheduler_svc.planner.state import PlannerState, Scored, StepRecord, preempt


class Planned(NamedTuple):
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
    _preempt_for_growth(state)
    table, pool = state.table, state.pool
    growing = table.full
    sitting_out: list[int] = []
    if len(growing) > pool.num_free:
        growing = sorted(growing, key=lambda slot: table.owner(slot).place)
        growing, sitting_out = growing[: pool.num_free], growing[pool.num_free :]
    blocks = pool.allocate(len(growing))
    table.append_blocks(growing, blocks)
    decodes, decode_slots = _decodes(state, sitting_out)
    prompts = choose_prompts(state, _prefill_budget(state, len(decode_slots)), may_start=not sitting_out)
    if not len(decode_slots) and not prompts.slots:
        return None
    step_id = state.next_step_id
    state.next_step_id += 1
    new_sequences = tuple(_new_sequence(state, sequence) for sequence in prompts.started)
    num_finishing = len(table.finishing)
    table.advance_decodes(decodes)
    state.tenants.charge_outputs(table.tenant, decode_slots)
    scored = _scored(state, prompts)
    beginners = tuple(_advance_prompts(state, prompts))
    finishers = tuple(table.owner(slot) for slot in table.finishing[num_finishing:])
    for sequence in finishers:
        sequence.last_step = step_id
    sampling_slots = _with_slots(decode_slots, [each.slot for each in beginners])
    state.in_flight.append(StepRecord(step_id, sampling_slots, beginners, finishers, scored))
    freed, state.freed_slots = state.freed_slots, []
    plan = StepPlan(
        epoch=state.epoch,
        step_id=step_id,
        rows=_rows(state, decode_slots, prompts, beginners),
        finished_slots=_int32(freed),
        new_sequences=new_sequences,
        append_slots=_int32(growing),
        append_blocks=_int32(blocks),
        transfers=state.transfers.take_outgoing() if state.transfers is not None else (),
    )
    num_prefill_tokens = sum(prompts.counts)
    num_rows = len(decode_slots) + len(prompts.slots)
    return Planned(plan, num_rows, len(decode_slots) + num_prefill_tokens, num_prefill_tokens, prompts.started)


def _preempt_for_growth(state: PlannerState) -> None:
    """Takes slots until the blocks that decoding sequences need are free, or will be without taking more: behind
    fences, or of sequences whose last token is in flight."""
    table, pool = state.table, state.pool
    while len(table.full) > pool.num_free:
        if len(table.full) <= pool.num_free + pool.num_fenced + table.num_blocks_of(table.finishing):
            return
        preempt(state, _victim(state))


def _victim(state: PlannerState) -> int:
    """Whose slot is taken when blocks run out: of the lowest priority, of the tenant that holds the most blocks, the
    newest. The first in order of priority and arrival never is the one, so there is always progress: one sequence
    always fits."""
    table = state.table
    held = np.bincount(table.tenant + 1, weights=table.num_blocks)[1:].tolist()
    candidates = [table.owner(slot) for slot in [*table.decoding_slots.tolist(), *table.prefilling]]
    candidates.remove(min(candidates, key=lambda each: each.place))
    victim = max(candidates, key=lambda each: (each.place.negative_priority, held[each.tenant], each.place))
    return victim.slot


def _decodes(state: PlannerState, sitting_out: list[int]) -> tuple[BoolArray, Int64Array]:
    """Which slots decode in this step: as a mask [max_num_seqs], and as slots, ascending."""
    table = state.table
    if not sitting_out:
        return table.is_decoding, table.decoding_slots
    decodes = table.is_decoding.copy()
    decodes[sitting_out] = False
    return decodes, decodes.nonzero()[0]


def _prefill_budget(state: PlannerState, num_decodes: int) -> int:
    """Prompt tokens of this step: what is left of the step's size, and no more than decoding sequences can wait for."""
    budget = state.limits.max_num_batched_tokens - num_decodes
    return min(budget, state.max_prefill_tokens) if num_decodes else budget


def _scored(state: PlannerState, prompts: Prompts) -> tuple[Scored, ...]:
    """What these chunks, which have not been booked yet, score: from the token on that follows their first."""
    starts = state.table.num_computed_tokens
    return tuple(
        Scored(state.table.owner(slot), int(starts[slot]) + 1, num)
        for slot, num in zip(prompts.slots, prompts.num_scored, strict=True)
        if num
    )


def _advance_prompts(state: PlannerState, prompts: Prompts) -> list[Sequence]:
    """Chunks of prompts are planned, and their full blocks can be found from the next plan on. Returns the sequences
    whose prompts end here, and which are promised a token."""
    table, block_size = state.table, state.limits.block_size
    beginners = []
    for slot, count in zip(prompts.slots, prompts.counts, strict=True):
        sequence, start = table.owner(slot), int(table.num_computed_tokens[slot])
        if state.limits.caches_prefixes:
            first, last = start // block_size, (start + count) // block_size
            blocks = table.block_tables[slot, first:last].tolist()
            publish_chunk(state.pool, state.coming, sequence, blocks, first, block_size)
        if table.advance_prompt(slot, count):
            beginners.append(sequence)
    return beginners


def _rows(
    state: PlannerState, decode_slots: Int64Array, prompts: Prompts, beginners: tuple[Sequence, ...]
) -> Rows | None:
    """The rows of this plan; None when the last plan's rows decode again."""
    num_decodes = len(decode_slots)
    slots = _with_slots(decode_slots, prompts.slots)
    last_rows, state.last_rows = state.last_rows, slots
    if not prompts.slots and last_rows is not None and (slots is last_rows or np.array_equal(slots, last_rows)):
        return None
    counts = np.ones(len(slots), dtype=np.int32)
    samples = np.ones(len(slots), dtype=np.bool_)
    if prompts.slots:
        counts[num_decodes:] = prompts.counts
        samples[num_decodes:] = [state.table.owner(slot) in beginners for slot in prompts.slots]
    scores = None
    if any(prompts.num_scored):
        scores = np.zeros(len(slots), dtype=np.bool_)
        scores[num_decodes:] = np.array(prompts.num_scored) > 0
    return Rows(slots.astype(np.int32), counts, samples, scores)


def _with_slots(slots: Int64Array, more: list[int]) -> Int64Array:
    return np.concatenate((slots, np.array(more, dtype=np.int64))) if more else slots


def _int32(values: list[int]) -> Int32Array:
    return np.array(values, dtype=np.int32) if values else EMPTY_INT32


def _new_sequence(state: PlannerState, sequence: Sequence) -> NewSequence:
    return NewSequence(
        slot=sequence.slot,
        token_ids=sequence.token_ids,
        num_prompt_tokens=sequence.num_prompt_tokens,
        num_computed_tokens=int(state.table.num_computed_tokens[sequence.slot]),
        block_table=state.table.block_tables[sequence.slot, : state.table.num_blocks[sequence.slot]].copy(),
        sampling=sequence.sampling,
        num_prompt_logprobs=sequence.num_prompt_logprobs,
        trace_parent=sequence.trace_parent,
    )
