"""KV transfers of one rank: a thread that copies blocks between the cache and the KV store's arena, beside the steps.

    plan -> check -> put ... its step completes ... copy, block by block -> report

Nothing here raises for what the store does or loses: a block that was not copied whole, or not verified, is reported.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import structlog

from albireo.arrays import BoolArray
from albireo.errors import GroupError, StoreUnavailable
from albireo.kv.arena import Arena, PartCopy
from albireo.kv.part import PartName
from albireo.plan import StepPlan
from albireo.transfers import KvLease, Transfer, TransferKind, TransferResult
from worker_svc.kv_parts import KvCopies, KvShape

MAX_TRANSFERS_QUEUED = 1024
_ATTACH_AGAIN_S = 1.0

log = structlog.get_logger()

Attach = Callable[[KvLease], Arena]


@dataclass(frozen=True, slots=True)
class KvStore:
    """The KV store, as a rank knows it.

    Attributes:
        attach: raises StoreUnavailable.
        share: of a core's time, what copies may take while steps run; the device may be these very cores.
    """

    fingerprint: bytes
    shape: KvShape
    attach: Attach
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class _Job:
    """A transfer that may begin when so many of the group's steps have completed."""

    transfer: Transfer
    number: int
    num_steps: int


class Transfers:
    """The transfers of one group on one rank, done in the order in which they come.

    The I/O thread checks, puts and abandons; the compute thread tells of steps, and waits for the end; any may end.

    Args:
        report: called from the copying thread, once for each transfer, also those abandoned; not after `end`.
        fail: called when that thread cannot go on.
    """

    def __init__(
        self,
        store: KvStore,
        copies: KvCopies,
        num_blocks: int,
        report: Callable[[TransferResult], None],
        fail: Callable[[str], None],
    ) -> None:
        self._store = store
        self._copies = copies
        self._num_blocks = num_blocks
        self._report = report
        self._fail = fail
        self._changed = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._num_jobs = self._num_abandoned = 0  # ever put; of those, the first so many are void
        self._epoch = -1
        self._first_step = self._num_steps_before = 0  # of the epoch; of all epochs before
        self._num_steps = self._num_completed = 0
        self._last_id = -1
        self._is_working = self._has_ended = False
        self._attachment = _Attachment(store.attach)
        self._copied_ns = self._told_ns = 0
        threading.Thread(target=self._run, name="kv-copies", daemon=True).start()

    def check(self, plan: StepPlan) -> None:
        """Raises GroupError when a plan's transfers do not fit."""
        next_step = plan.step_id + (not plan.only_transfers)
        last_id = self._last_id if plan.epoch == self._epoch else -1
        if len(self._jobs) + len(plan.transfers) > MAX_TRANSFERS_QUEUED:
            raise GroupError(f"{len(self._jobs)} transfers are queued already; {MAX_TRANSFERS_QUEUED} at most")
        for transfer in plan.transfers:
            if transfer.transfer_id <= last_id:
                raise GroupError(f"transfer {transfer.transfer_id} after transfer {last_id}")
            last_id = transfer.transfer_id
            if transfer.after_step >= next_step:
                raise GroupError(f"transfer {last_id}: after step {transfer.after_step} where step {next_step} follows")
            self._check_blocks(transfer)

    def put(self, plan: StepPlan) -> None:
        """A plan, checked, whose step is put into the step queue."""
        with self._changed:
            if plan.epoch != self._epoch:
                self._epoch, self._first_step, self._last_id = plan.epoch, plan.step_id, -1
                self._num_steps_before = self._num_steps
            self._num_steps += not plan.only_transfers
            for transfer in plan.transfers:
                self._num_jobs += 1
                num_steps = self._num_steps_before + max(0, transfer.after_step + 1 - self._first_step)
                self._jobs.append(_Job(transfer, self._num_jobs, num_steps))
                self._last_id = transfer.transfer_id
            if plan.transfers:
                self._changed.notify_all()

    def step_completed(self) -> int:
        """The next of the steps that were put has completed. Returns for how long copies ran since the last one, ns."""
        with self._changed:
            self._num_completed += 1
            if self._jobs and not self._is_working:
                self._changed.notify_all()
        copied_ns = self._copied_ns
        since, self._told_ns = copied_ns - self._told_ns, copied_ns
        return since

    def abandon(self) -> None:
        """What is not done yet fails, one copy under way after its block."""
        with self._changed:
            self._num_abandoned = self._num_jobs
            self._changed.notify_all()

    def end(self) -> None:
        """No further copy begins."""
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def wait_until_ended(self) -> None:
        """Returns when, after `end`, no copy runs any more and nothing will be reported."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_working)

    def _check_blocks(self, transfer: Transfer) -> None:
        blocks, num_parts = transfer.blocks, self._store.shape.num_parts
        if blocks.min() < 0 or blocks.max() >= self._num_blocks or len(np.unique(blocks)) < len(blocks):
            raise GroupError(
                f"transfer {transfer.transfer_id}: {len(blocks)} blocks, one twice or not of the {self._num_blocks}"
            )
        if transfer.offsets.shape[1] != num_parts:
            raise GroupError(
                f"transfer {transfer.transfer_id}: {transfer.offsets.shape[1]} parts of a block, which has {num_parts}"
            )

    def _run(self) -> None:
        try:
            while (job := self._next()) is not None:
                arena = self._arena_for(job)
                if self._begin():
                    result = self._do(job, arena)
                    if not self._has_ended:
                        self._report(result)
                    self._finish()
        except Exception as error:
            log.exception("KV transfers cannot go on")
            self._finish()
            self._fail(f"KV transfers cannot go on: {error!r}")
        finally:
            self._attachment.close()

    def _next(self) -> _Job | None:
        """Waits for a job that may begin; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._has_ended or (self._jobs and self._may_begin(self._jobs[0])))
            return None if self._has_ended else self._jobs.popleft()

    def _arena_for(self, job: _Job) -> Arena | None:
        """May take seconds, where the store is there and does not answer."""
        if self._is_void(job) or not self._parts(job.transfer):
            return None
        return self._attachment.to(job.transfer.lease)

    def _begin(self) -> bool:
        """Whether there may be copies, for whose end `wait_until_ended` waits."""
        with self._changed:
            self._is_working = not self._has_ended
            return self._is_working

    def _finish(self) -> None:
        with self._changed:
            self._is_working = False
            self._changed.notify_all()

    def _may_begin(self, job: _Job) -> bool:
        return self._num_completed >= job.num_steps or self._is_void(job)

    def _is_void(self, job: _Job) -> bool:
        return self._has_ended or job.number <= self._num_abandoned

    def _parts(self, transfer: Transfer) -> range:
        """What this rank has to copy; none where another one stores the blocks."""
        shape = self._store.shape
        return shape.writes if transfer.kind is TransferKind.STORE else shape.reads

    def _do(self, job: _Job, arena: Arena | None) -> TransferResult:
        start_ns = time.monotonic_ns()
        transfer, parts = job.transfer, self._parts(job.transfer)
        succeeded: BoolArray = np.full(len(transfer.blocks), not parts)
        if arena is not None:
            self._copy_blocks(arena, job, parts, succeeded)
        num_bytes = int(succeeded.sum()) * len(parts) * self._store.shape.part_bytes
        return TransferResult(transfer.transfer_id, succeeded, num_bytes, time.monotonic_ns() - start_ns)

    def _copy_blocks(self, arena: Arena, job: _Job, parts: Sequence[int], succeeded: BoolArray) -> None:
        for index in range(len(succeeded)):
            if self._is_void(job):
                self._attachment.close()
                return
            if arena.is_lost:
                return
            # While it waits for a core or the interpreter, a copy takes nothing from the steps: no rest for that.
            start_ns, start_cpu_ns = time.monotonic_ns(), time.thread_time_ns()
            succeeded[index] = self._copy(arena, job.transfer, index, parts)
            used_ns = time.thread_time_ns() - start_cpu_ns
            self._copied_ns += time.monotonic_ns() - start_ns
            self._rest(job, used_ns / 1e9 * (1 / self._store.share - 1))

    def _rest(self, job: _Job, seconds: float) -> None:
        """Leaves cores and interpreter to the steps; where none is under way, nobody minds."""
        if not seconds or self._num_completed == self._num_steps:
            time.sleep(0)  # who waits for the interpreter gets it, not only after its switch interval
            return
        with self._changed:
            self._changed.wait_for(lambda: self._is_void(job), seconds)

    def _copy(self, arena: Arena, transfer: Transfer, index: int, parts: Sequence[int]) -> bool:
        """Copies the rank's parts of a block; whether all of them are whole."""
        block, block_hash = int(transfer.blocks[index]), transfer.hashes[index]
        offsets = transfer.offsets[index].tolist()
        copies = [
            PartCopy(
                offsets[part],
                PartName(self._store.fingerprint, block_hash, part),
                self._copies.pieces(block, part),
            )
            for part in parts
        ]
        try:
            if transfer.kind is TransferKind.STORE:
                self._copies.fetch(block)
                return all(arena.write(copies))
            is_whole = all(arena.read(copies))
        except ValueError as error:
            log.error("a transfer does not fit the arena", transfer_id=transfer.transfer_id, error=str(error))
            return False
        if is_whole:
            self._copies.put(block)
        return is_whole


class _Attachment:
    """The copying thread's way to the arena of the session that the last transfer belonged to."""

    def __init__(self, attach: Attach) -> None:
        self._attach = attach
        self._lease: KvLease | None = None
        self._arena: Arena | None = None
        self._not_before = 0.0

    def to(self, lease: KvLease) -> Arena | None:
        """The session's arena; None: it is not there, which is asked once a second."""
        if self._arena is not None and lease == self._lease and not self._arena.is_lost:
            return self._arena
        self.close()
        if lease == self._lease and time.monotonic() < self._not_before:
            return None
        self._lease = lease
        try:
            self._arena = self._attach(lease)
        except StoreUnavailable as error:
            log.warning("the KV store's arena is out of reach", error=str(error))
            self._not_before = time.monotonic() + _ATTACH_AGAIN_S
        return self._arena

    def close(self) -> None:
        if self._arena is not None:
            self._arena.close()
            self._arena = None
