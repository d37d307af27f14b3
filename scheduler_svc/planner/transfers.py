"""Blocks on their way between the KV cache and the KV store: what is asked of either, and what waits for an answer.

Swap and the prefix tier are one mechanism, for blocks are named by what they hold. Blocks of a sequence that leaves its
slot are stored under their names (`stores`); a sequence that could start asks for those that the pool does not have
(`loads`), and they are published in the pool's cache, where admission finds them like any others. Whatever gets lost on
the way is a miss: it is computed.

No clock, no I/O: requests and transfers lie here until they are fetched. Each request that has an answer gets exactly
one; `kv_link` sees to it that it comes in time.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from albireo.arrays import UInt64Array
from albireo.transfers import KvLease, Transfer, TransferKind
from scheduler_svc.planner.rates import StepRates
from scheduler_svc.planner.sequence import Sequence
from scheduler_svc.planner.store_messages import Abort, Release, Request
from scheduler_svc.planner.swap_policy import SwapMode, TransferRates

_MAX_KNOWN = 1 << 18
_MAX_SETBACKS = 2  # for a sequence, each time that it waits; then it computes


@dataclass(slots=True, eq=False)
class Store:
    """Blocks that go to the store.

    Attributes:
        hashes, blocks: parallel. The blocks of a preempted sequence are fenced from the moment that it leaves its slot;
            those of an ended one from the moment that the store has room, if they can still be found then: until
            then there are none.
        after_step: they are complete when it is.
        keeps_for: the preempted sequence; None when nobody waits for them, or not any more.
        num_new: blocks that the store has not, as far as we know, and then as it says.
        written: of the new blocks, the places of those that are being written.
    """

    request_id: int
    lease: KvLease
    hashes: list[bytes]
    blocks: list[int]
    after_step: int
    keeps: bool
    keeps_for: Sequence | None
    num_new: int
    written: list[int] = field(default_factory=list)
    is_void: bool = False  # the group was lost


@dataclass(slots=True, eq=False)
class Load:
    """Blocks that come from the store for a sequence that waits for them.

    Attributes:
        start: the sequence's first block of them; ``num_asked``: how many were asked for.
        num_needed: free blocks that the sequence takes when it starts, those that are loaded included.
        blocks: of the pool, parallel to the leading ones of ``hashes``; nobody's, and fenced, until they have come.
        is_void: the sequence has ended, or the group or the store was lost: nobody waits for them.
    """

    request_id: int
    lease: KvLease
    sequence: Sequence
    start: int
    num_asked: int
    num_needed: int
    hashes: list[bytes]
    blocks: list[int] = field(default_factory=list)
    is_void: bool = False


class Tried(NamedTuple):
    """What came of asking for a sequence's blocks.

    Attributes:
        num_blocks: so many of its first were there then.
        has_more: all came that were asked for, and there may be more.
        num_setbacks: so often some were gone again before it could start.
    """

    num_blocks: int
    has_more: bool
    num_setbacks: int


@dataclass(slots=True)
class Counts:
    """What has happened since the start; blocks and bytes."""

    num_blocks_out: int = 0
    num_bytes_out: int = 0
    num_blocks_in: int = 0
    num_bytes_in: int = 0
    num_blocks_not_stored: int = 0  # too much was under way, or the store refused
    loads: Counter[str] = field(default_factory=Counter)  # by outcome


@dataclass(frozen=True)
class TransferLimits:
    """How much may be under way.

    Attributes:
        block_bytes: in the store.
        max_bytes, max_jobs: under way at most, both ways together.
        max_queue_s: so long may the last of the blocks that ended sequences leave take, by the measured bandwidth.
        max_wait_s: so long may a load wait for the store's answer.
    """

    mode: SwapMode
    block_bytes: int
    max_bytes: int = 256 << 20
    max_jobs: int = 256
    max_queue_s: float = 0.5
    max_wait_s: float = 1.0


class Transfers:
    """The planner's side of the KV store.

    Attributes:
        lease: with the store; None while there is none: then nothing is asked.
        max_blocks: of one request.
        requests, outgoing: for the store, and for the group; whoever sends them takes them.
        asked: by request, what waits for the store's answer.
        moving: by transfer, what waits for the group's result.
        loading: loads by the sequence that waits for them.
        kept: reservations that the store keeps for a preempted sequence.
        voided: requests whose places ranks of a lost group may still use.
    """

    def __init__(self, limits: TransferLimits, step_rates: StepRates) -> None:
        self.limits = limits
        self.rates = TransferRates()
        self.counts = Counts()
        self.lease: KvLease | None = None
        self.max_blocks = 1
        self.requests: list[Request] = []
        self.outgoing: list[Transfer] = []
        self.asked: dict[int, Store | Load] = {}
        self.moving: dict[int, Store | Load] = {}
        self.loading: dict[Sequence, Load] = {}
        self.kept: dict[Sequence, list[int]] = {}
        self.voided: list[Request] = []
        self._tried: dict[Sequence, Tried] = {}
        self._known: OrderedDict[bytes, None] = OrderedDict()  # what the store is thought to hold
        self._step_rates = step_rates
        self._last_id = 0

    @property
    def num_queued_bytes(self) -> int:
        """Under way, both ways; of what the store has not answered yet, as much as it is thought not to have."""
        num_expected = sum(job.num_new for job in self.asked.values() if isinstance(job, Store))
        return (num_expected + sum(len(job.hashes) for job in self.moving.values())) * self.limits.block_bytes

    @property
    def is_busy(self) -> bool:
        """Nothing more is begun."""
        return len(self.asked) + len(self.moving) >= self.limits.max_jobs

    @property
    def num_promised_blocks(self) -> int:
        """Free ones that sequences which wait for their loads will need: nobody behind them may start with these."""
        return sum(load.num_needed - len(load.blocks) for load in self.loading.values())

    def next_id(self) -> int:
        """Of requests and transfers."""
        self._last_id += 1
        return self._last_id

    def compute_s(self, num_tokens: int) -> float | None:
        """How long computing them takes; None: nothing is measured."""
        return num_tokens * self._step_rates.s_per_prefill_token if self._step_rates.knows_prefill else None

    def take_outgoing(self) -> tuple[Transfer, ...]:
        outgoing, self.outgoing = self.outgoing, []
        return tuple(outgoing)

    def take_requests(self) -> list[Request]:
        requests, self.requests = self.requests, []
        return requests

    def request(self, request: Request, lease: KvLease) -> None:
        """Asks the store, if the lease that this is about lives."""
        if lease is self.lease:
            self.requests.append(request)

    def move(self, job: Store | Load, kind: TransferKind, offsets: UInt64Array, after_step: int) -> None:
        """The group shall copy the blocks of ``job``. ``offsets``: theirs, [num_blocks, parts of a block]."""
        transfer_id, blocks = self.next_id(), np.array(job.blocks, dtype=np.int32)
        self.moving[transfer_id] = job
        self.outgoing.append(Transfer(transfer_id, kind, blocks, tuple(job.hashes), offsets, after_step, job.lease))

    # What the store is thought to hold. It may forget anything at any time.

    def knows(self, block_hash: bytes) -> bool:
        return block_hash in self._known

    def remember(self, hashes: Iterable[bytes]) -> None:
        for block_hash in hashes:
            self._known[block_hash] = None
            self._known.move_to_end(block_hash)
        while len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)

    def forget(self, hashes: Iterable[bytes]) -> None:
        for block_hash in hashes:
            self._known.pop(block_hash, None)

    # Sequences.

    def may_try(self, sequence: Sequence, num_found: int) -> bool:
        """Whether asking for more than the ``num_found`` blocks that the pool has may bring anything new."""
        tried = self._tried.get(sequence)
        if tried is None or num_found >= tried.num_blocks:
            return tried is None or tried.has_more
        return tried.num_setbacks < _MAX_SETBACKS

    def tried(self, sequence: Sequence, num_found: int, num_loaded: int, has_more: bool) -> None:
        """Beside the ``num_found`` blocks that the pool had, ``num_loaded`` have come."""
        before = self._tried.get(sequence, Tried(0, True, 0))
        num_setbacks = before.num_setbacks + (num_found < before.num_blocks)
        self._tried[sequence] = Tried(num_found + num_loaded, has_more, num_setbacks)

    def leave_queue(self, sequence: Sequence) -> None:
        """``sequence`` starts, or has ended: nothing is kept or loaded for it any more."""
        self._tried.pop(sequence, None)
        load = self.loading.pop(sequence, None)
        if load is not None:
            load.is_void = True
        for request_id in self.kept.pop(sequence, ()):
            under_way = self._store(request_id)
            if under_way is None:
                self.requests.append(Release(request_id))
            else:
                under_way.keeps_for = None  # released when it is complete

    def _store(self, request_id: int) -> Store | None:
        for job in (*self.asked.values(), *self.moving.values()):
            if isinstance(job, Store) and job.request_id == request_id:
                return job
        return None

    # Losses.

    def lose_group(self) -> None:
        """No result will come; ranks of the lost group may be in the middle of a copy."""
        for job in (*self.asked.values(), *self.moving.values()):
            job.is_void = True
            if isinstance(job, Store) and job.keeps_for is not None:
                self.kept[job.keeps_for].remove(job.request_id)
                job.keeps_for = None
        for job in self.moving.values():
            if job.lease is self.lease:
                self.voided.append(Abort(job.request_id) if isinstance(job, Store) else Release(job.request_id))
        self.moving.clear()
        self.outgoing.clear()
        self.loading.clear()
        self._tried.clear()

    def begin_epoch(self) -> None:
        """No rank of the lost group copies any more."""
        self.requests += self.voided
        self.voided.clear()

    def meet_store(self, lease: KvLease, max_blocks: int) -> None:
        """There is a store, which knows nothing of us."""
        self.lease, self.max_blocks = lease, max_blocks

    def lose_store(self) -> None:
        """All that the store offered is void. What it was asked is denied; of what moves the group tells the result."""
        self.lease = None
        self.requests.clear()
        self.voided.clear()
        for job in (*self.asked.values(), *self.moving.values()):
            if isinstance(job, Store):
                job.keeps_for = None
        self.kept.clear()
        self._known.clear()
