"""Which prompts the next step computes: those in progress and those that wait, in one order, under a token budget."""

from dataclasses import dataclass, field

import numpy as np

from scheduler_svc.planner.loads import begin_load
from scheduler_svc.planner.prefix import announce, find_prefix, is_coming
from scheduler_svc.planner.room import num_missing_blocks
from scheduler_svc.planner.sequence import Sequence
from scheduler_svc.planner.state import PlannerState, preempt

# So many sequences may be passed over in one plan because the beginning they share is being computed or loaded.
_MAX_PASSED_OVER = 64


@dataclass(slots=True)
class Prompts:
    """What was chosen: parallel lists of slots, numbers of tokens, and how many prompt tokens are scored with them; and
    who of them took a slot just now.

    Attributes:
        num_spare: so many more tokens can be sampled or scored, beside one of each running sequence.
    """

    num_spare: int
    slots: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    num_scored: list[int] = field(default_factory=list)
    started: list[Sequence] = field(default_factory=list)


def choose_prompts(state: PlannerState, budget: int, may_start: bool) -> Prompts:
    """Gives ``budget`` tokens to the prompts in progress and, if any ``may_start``, to those that wait.

    The order is that of the queue, so a tenant's long prompt does not hold up another's short one. Whoever is first
    and does not fit keeps those behind from starting: its room must come together.

    A group samples for ``max_num_seqs`` rows in a step, and each scored token is one. Every running sequence has its
    own, so a prompt that is scored always gets on; with those that nobody has, it gets on faster.
    """
    chosen = Prompts(num_spare=len(state.table.free_slots))
    in_progress = [state.table.owner(slot) for slot in state.table.prefilling]
    passed_over: list[Sequence] = []
    while budget > 0:
        first = min(in_progress, key=state.queue.order_of, default=None)
        waiting = state.queue.peek() if may_start else None
        if waiting is None and first is None:
            break
        if waiting is None or (first is not None and state.queue.order_of(first) < state.queue.order_of(waiting)):
            assert first is not None
            in_progress.remove(first)
            budget -= _give_tokens(state, first, budget, chosen)
            continue
        found = find_blocks(state, waiting)
        num_promised = state.transfers.num_promised_blocks if state.transfers is not None else 0
        fits = num_missing_blocks(state, waiting, found) + num_promised <= 0 and chosen.num_spare > 0
        is_computed = is_coming(state.coming, waiting, len(found), state.limits.block_size)
        if is_computed or (fits and begin_load(state, waiting, found)):
            state.queue.pop(waiting)
            passed_over.append(waiting)
            may_start = len(passed_over) < _MAX_PASSED_OVER
        elif fits:
            state.queue.pop(waiting)
            chosen.num_spare -= 1
            _start(state, waiting, found)
            chosen.started.append(waiting)
            budget -= _give_tokens(state, waiting, budget, chosen)
        else:
            may_start = False
    for sequence in passed_over:
        state.queue.push(sequence)
    return chosen


def find_blocks(state: PlannerState, sequence: Sequence) -> list[int]:
    """Blocks that hold the beginning of ``sequence`` already."""
    if not state.limits.caches_prefixes:
        return []
    return find_prefix(state.pool, sequence, state.limits.block_size)


def _give_tokens(state: PlannerState, sequence: Sequence, budget: int, chosen: Prompts) -> int:
    """Schedules as many tokens of a prompt as the budget allows; returns how many."""
    slot = sequence.slot
    start = int(state.table.num_computed_tokens[slot])
    count = min(len(sequence.token_ids) - start, budget)
    num_scored = 0
    num_before = sequence.num_scored - 1 - start  # whose successors were scored before it left its last slot
    if not sequence.is_scored and num_before > 0:
        count = min(count, num_before)
    elif not sequence.is_scored:
        count = min(count, 1 + chosen.num_spare)
        chosen.num_spare -= count - 1
        num_scored = min(count, max(0, sequence.num_prompt_tokens - 1 - start))
    chosen.slots.append(slot)
    chosen.counts.append(count)
    chosen.num_scored.append(num_scored)
    state.tenants.charge(sequence.tenant, count)
    return count


def _start(state: PlannerState, sequence: Sequence, found: list[int]) -> None:
    """Gives a slot to ``sequence``, and blocks for all its tokens: those that were found, and new ones."""
    num_blocks = -(-len(sequence.token_ids) // state.limits.block_size)
    state.pool.hold(found)
    blocks = found + state.pool.allocate(num_blocks - len(found))
    num_computed = len(found) * state.limits.block_size
    state.table.take(sequence, blocks, num_computed)
    if state.limits.caches_prefixes:
        announce(state.coming, sequence, len(found))
    if state.transfers is not None:
        state.transfers.leave_queue(sequence)
    if not sequence.has_begun:
        sequence.num_cached_tokens = min(num_computed, sequence.num_prompt_tokens)


def make_way(state: PlannerState) -> None:
    """Where a tenant with more than its share is in the way of the first that waits, some of its sequences are
    preempted."""
    while state.tenants.num_active > 1 and (waiting := state.queue.peek()) is not None:
        found = find_blocks(state, waiting)
        num_missing = num_missing_blocks(state, waiting, found)
        is_enough = num_missing <= state.pool.num_fenced and state.table.free_slots
        if is_enough or is_coming(state.coming, waiting, len(found), state.limits.block_size):
            break
        slot = _who_gives_way(state, waiting)
        if slot is None:
            break
        preempt(state, slot)


def _who_gives_way(state: PlannerState, sequence: Sequence) -> int | None:
    """The slot that a tenant with more than its fair share gives up for ``sequence``, whose tenant keeps to its own.

    A share is the larger one of slots and blocks. The fair one is the same for all tenants with work. A tenant's only
    running sequence never gives way, so everyone gets on; nor does one of a higher priority.

    Source: dominant resource fairness (Ghodsi et al., NSDI 2011).
    """
    table, limits = state.table, state.limits
    num_slots = np.bincount(table.tenant + 1, minlength=sequence.tenant + 2)[1:]
    num_held = np.bincount(table.tenant + 1, weights=table.num_blocks, minlength=sequence.tenant + 2)[1:]
    shares = np.maximum(num_slots / limits.max_num_seqs, num_held / limits.num_blocks)
    fair = 1 / state.tenants.num_active
    num_blocks = -(-len(sequence.token_ids) // limits.block_size)
    own_slots, own_blocks = num_slots[sequence.tenant] + 1, num_held[sequence.tenant] + num_blocks
    if max(own_slots / limits.max_num_seqs, own_blocks / limits.num_blocks) > fair:
        return None
    candidates = [
        owner
        for slot in [*table.decoding_slots.tolist(), *table.prefilling]
        if shares[(owner := table.owner(slot)).tenant] > fair
        and num_slots[owner.tenant] > 1
        and owner.place.negative_priority >= sequence.place.negative_priority
    ]
    if not candidates:
        return None
    return max(candidates, key=lambda each: (each.place.negative_priority, shares[each.tenant], each.place)).slot
