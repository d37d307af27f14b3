"""The planner's state, and the changes to it that come from outside a step: arrivals, ends, preemption.

Everything here, in `policy` and in `commit` is a pure function of this state: no clock, no I/O.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from albireo.allowances import Allowances
from albireo.arrays import Int64Array
from albireo.errors import ConfigError
from scheduler_svc.planner.block_pool import BlockPool
from scheduler_svc.planner.buckets import TokenBuckets
from scheduler_svc.planner.prefix import ComingBlocks, forget_coming, publish_history
from scheduler_svc.planner.queue import WaitingQueue
from scheduler_svc.planner.sequence import Sequence, Status
from scheduler_svc.planner.slots import SlotTable
from scheduler_svc.planner.stores import store_history
from scheduler_svc.planner.tenants import Tenants
from scheduler_svc.planner.transfers import Transfers

_MAX_LOSSES = 5


@dataclass(frozen=True)
class Limits:
    """What the group can hold and how the planner may use it; counts of tokens, blocks, sequences, steps."""

    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_model_len: int
    max_num_batched_tokens: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    depth: int  # plans in flight at most
    max_waiting: int = 4096  # sequences in the queue; more are refused
    caches_prefixes: bool = True  # blocks are shared by sequences of a tenant that begin alike
    allowances: Allowances = field(default_factory=Allowances)  # of tenants
    kv_secret: bytes = field(default=b"", repr=False)  # keys the names of tenants' blocks; empty: nothing does

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is less than max_num_seqs {self.max_num_seqs}:"
                " a step could not decode every sequence"
            )
        if self.num_blocks * self.block_size < self.max_model_len:
            raise ConfigError(
                f"{self.num_blocks} blocks of {self.block_size} tokens do not hold one sequence of max_model_len"
                f" {self.max_model_len}: it could never finish"
            )
        if self.depth < 1:
            raise ConfigError(f"depth {self.depth}: at least 1")


class Scored(NamedTuple):
    """Consecutive tokens of a sequence's prompt whose logprobs a step brings; positions are those in the prompt."""

    sequence: Sequence
    first_position: int
    num_tokens: int


@dataclass(slots=True)
class StepRecord:
    """A step in flight.

    Attributes:
        slots: of the rows that sample.
        scored: of the rows that score, in their order.
        beginners: sequences whose prompts end in this step.
        finishers: sequences whose last token this step samples.
        left: who owned a slot when this step was planned and has left it since; the row is theirs.
    """

    step_id: int
    slots: Int64Array
    beginners: tuple[Sequence, ...]
    finishers: tuple[Sequence, ...]
    scored: tuple[Scored, ...] = ()
    left: dict[int, Sequence] = field(default_factory=dict)


@dataclass(slots=True)
class PlannerState:
    """Everything the planner knows.

    Attributes:
        queue: sequences that wait.
        buckets: what tenants with a rate may still be served.
        coming: prompt blocks that running sequences are about to compute, or that are loaded for waiting ones.
        max_prefill_tokens: prompt tokens of a step in which sequences decode; what their latency allows.
        deadlines: heap of (when, frontend, sequence_id); sequences may have ended meanwhile.
        draining: preempted sequences that steps in flight still sample for.
        sequences: all that have not ended, by (frontend, sequence_id).
        freed_slots: given up since the last plan; the next one tells the group.
        last_rows: slots of the last plan's rows; decoding them again needs no rows on the wire.
        traced_ends: traced sequences that have ended, for whoever records their spans; None: nobody does.
        transfers: blocks on their way to and from the KV store; None: there is no store.
    """

    limits: Limits
    epoch: int
    pool: BlockPool
    table: SlotTable
    tenants: Tenants
    queue: WaitingQueue
    buckets: TokenBuckets
    coming: ComingBlocks = field(default_factory=dict)
    max_prefill_tokens: int = 1 << 30
    deadlines: list[tuple[int, int, int]] = field(default_factory=list)
    draining: list[Sequence] = field(default_factory=list)
    sequences: dict[tuple[int, int], Sequence] = field(default_factory=dict)
    in_flight: deque[StepRecord] = field(default_factory=deque)
    freed_slots: list[int] = field(default_factory=list)
    last_rows: Int64Array | None = None
    next_step_id: int = 0
    num_preemptions: int = 0
    traced_ends: list[Sequence] | None = None
    transfers: Transfers | None = None

    @classmethod
    def make(cls, limits: Limits, epoch: int) -> "PlannerState":
        tenants = Tenants(counts_tokens=limits.allowances.have_rates)
        table = _make_table(limits)
        buckets = TokenBuckets(limits.allowances)
        return cls(limits, epoch, BlockPool(limits.num_blocks), table, tenants, WaitingQueue(tenants), buckets)

    @property
    def is_idle(self) -> bool:
        """No sequence and no step in flight: every block is free."""
        return not self.sequences and not self.in_flight


def submit(state: PlannerState, sequence: Sequence, tenant: str) -> None:
    """A sequence arrives. The caller has checked it against the limits."""
    sequence.tenant = state.tenants.enter(tenant)
    state.sequences[sequence.frontend, sequence.sequence_id] = sequence
    state.queue.push(sequence)


def end(state: PlannerState, sequence: Sequence, num_kept: int | None = None) -> None:
    """A sequence is over, whatever its status: slot and blocks are given back, tokens in flight will not count.

    ``num_kept``: so many of its output tokens count, where its front end found a stop string.
    """
    if sequence.status is Status.RUNNING:
        _leave_slot(state, sequence.slot, num_kept)
    elif sequence.status is Status.WAITING:
        state.queue.forget(sequence)
    if state.transfers is not None:
        state.transfers.leave_queue(sequence)
        forget_coming(state.coming, sequence)
    sequence.status = Status.ENDED
    state.tenants.leave(sequence.tenant)
    del state.sequences[sequence.frontend, sequence.sequence_id]
    if sequence.trace_parent and state.traced_ends is not None:
        state.traced_ends.append(sequence)


def preempt(state: PlannerState, slot: int) -> Sequence:
    """Takes the slot and the blocks of a running sequence; when it resumes, its tokens are computed again, or loaded.

    Steps in flight still sample for it, and those tokens count: it waits again once the last of them is committed.
    """
    sequence = _leave_slot(state, slot, is_preempted=True)
    sequence.num_preemptions += 1
    state.num_preemptions += 1
    if state.in_flight:
        sequence.status = Status.DRAINING
        state.draining.append(sequence)
    else:
        state.queue.push(sequence)
    return sequence


def requeue_drained(state: PlannerState, completed_step: int) -> None:
    """Preempted sequences whose last step in flight has completed wait again."""
    drained = [sequence for sequence in state.draining if sequence.last_step <= completed_step]
    if drained:
        state.draining = [sequence for sequence in state.draining if sequence.last_step > completed_step]
    for sequence in drained:
        if sequence.status is Status.DRAINING:
            state.queue.push(sequence)


def lose_group(state: PlannerState) -> list[Sequence]:
    """The group has forgotten everything: all sequences wait again, with the tokens known so far.

    Returns those that are not tried again, and have ended: running when the group was lost for the fifth time without
    a token in between, they are likely the reason.
    """
    running = state.table.running
    draining = [each for each in state.draining if each.status is Status.DRAINING]
    for sequence in running:
        state.table.give_up(sequence.slot)
    state.draining.clear()
    suspects = []
    for sequence in [*running, *draining]:
        made_progress = len(sequence.token_ids) > sequence.num_tokens_at_loss
        sequence.num_losses = 1 if made_progress else sequence.num_losses + 1
        sequence.num_tokens_at_loss = len(sequence.token_ids)
        state.queue.push(sequence)
        if sequence.num_losses >= _MAX_LOSSES:
            suspects.append(sequence)
    for sequence in suspects:
        end(state, sequence)
    _forget_group(state)
    return suspects


def regain_group(state: PlannerState, limits: Limits, epoch: int) -> None:
    """The group is back, empty, and maybe with other limits; plans begin again in a new epoch."""
    assert not state.table.num_running
    state.limits, state.epoch = limits, epoch
    _forget_group(state)


def _forget_group(state: PlannerState) -> None:
    limits = state.limits
    if state.transfers is not None:
        state.transfers.lose_group()
    state.pool = BlockPool(limits.num_blocks, state.pool.followers)
    state.table = _make_table(limits)
    state.coming.clear()
    state.in_flight.clear()
    state.freed_slots.clear()
    state.last_rows = None


def _make_table(limits: Limits) -> SlotTable:
    return SlotTable.make(limits.max_num_seqs, limits.max_model_len, limits.block_size, limits.vocab_size)


def _leave_slot(state: PlannerState, slot: int, num_kept: int | None = None, is_preempted: bool = False) -> Sequence:
    sequence, blocks = state.table.owner(slot), state.table.blocks_of(slot)
    if slot not in state.table.finishing:
        sequence.last_step = state.next_step_id - 1  # at the latest
    num_computed = int(state.table.num_computed_tokens[slot])
    state.table.give_up(slot)
    if state.limits.caches_prefixes:
        forget_coming(state.coming, sequence)
        num_final = len(sequence.token_ids) if num_kept is None else sequence.num_prompt_tokens + num_kept
        block_size = state.limits.block_size
        num_full = publish_history(state.pool, sequence, blocks, min(num_computed, num_final), block_size)
        if state.transfers is not None:
            tenant = state.tenants.name_of(sequence.tenant)
            store_history(state.transfers, state.pool, sequence, num_full, block_size, tenant, keeps=is_preempted)
    state.pool.give_back(blocks, sequence.last_step)
    state.freed_slots.append(slot)
    for record in state.in_flight:
        if record.step_id <= sequence.last_step:
            record.left.setdefault(slot, sequence)
    return sequence
