"""Redis as the index's loop sees it: jobs for worker processes, ordered, bounded, and answered whatever dies."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import structlog

from albireo.arrays import pack_uint64
from albireo.v1 import kvtier_pb2 as pb
from kvstore_svc.blocks import Block, Shelf
from kvstore_svc.counts import Counts
from kvstore_svc.index import Index
from kvstore_svc.redis_metrics import RedisMetrics
from kvstore_svc.redis_process import RedisProcess, WorkerLost

_MAX_JOB_BYTES = 8 << 20
_MAX_PINNED_PART = 4  # what waits for Redis pins no more than a quarter of the arena
_JOBS_PER_WORKER = 2  # one moves bytes while the next one waits for Redis
_RESTART_AFTER_S = (0.2, 5.0)
_FIRST_RATE = 200e6  # bytes per second, until something is measured
_SMOOTHING = 0.2
_STORES_COME_LAST = 1 << 40

log = structlog.get_logger()


@dataclass(order=True)
class _Queued:
    """A job that waits for a worker; lower ones go first."""

    rank: int
    serial: int
    job: pb.TierJob = field(compare=False)
    blocks: Sequence[Block] = field(compare=False)

    @property
    def num_bytes(self) -> int:
        return sum(block.shelf.namespace.frame_bytes for block in self.blocks)


class Tier:
    """Blocks in Redis. Nothing here waits but `probe`.

    Args:
        start: starts the worker with that number.
        queue_s: so many seconds of writing may wait.
        ttl_s: of what is written; 0: for ever.
        on_change: called when blocks have come or failed to.
    """

    def __init__(
        self,
        index: Index,
        start: Callable[[int], Awaitable[RedisProcess]],
        num_workers: int,
        queue_s: float,
        ttl_s: float,
        counts: Counts,
        on_change: Callable[[], None],
    ) -> None:
        self._index = index
        self._start = start
        self._num_workers = num_workers
        self._queue_s = queue_s
        self._ttl_s = ttl_s
        self._counts = counts
        self._on_change = on_change
        self._workers: dict[int, RedisProcess] = {}
        self._queue: asyncio.PriorityQueue[_Queued] = asyncio.PriorityQueue()
        self._serial = itertools.count(1)
        self._store_rate = self._load_rate = 0.0  # bytes per second
        self._metrics = RedisMetrics()
        self.queued_bytes = 0  # to be written

    @property
    def num_alive(self) -> int:
        return len(self._workers)

    def eta_s(self, num_bytes: int) -> float:
        """How long fetching takes; 0: nothing has been fetched yet."""
        return num_bytes / self._load_rate if self._load_rate else 0.0

    async def run(self) -> None:
        """Keeps the workers running until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            for number in range(self._num_workers):
                group.create_task(self._keep(number))

    async def probe(self, shelf: Shelf, hashes: Sequence[bytes], anchors: Sequence[bytes]) -> int:
        """How many blocks of this prefix Redis has; none when it does not answer."""
        if not self._workers:
            return 0
        worker = min(self._workers.values(), key=lambda worker: worker.num_waiting)
        job = self._job(pb.TierJob.KIND_PROBE, shelf, hashes, anchors)
        try:
            report = await self._ask(worker, job)
        except WorkerLost:
            return 0
        return next((i for i, found in enumerate(report.succeeded) if not found), len(hashes))

    def load(self, blocks: Sequence[Block], priority: int) -> None:
        """Fetches blocks that `Index.begin_load` has made room for."""
        for some in _batches(blocks, _MAX_JOB_BYTES):
            self._enqueue(pb.TierJob.KIND_LOAD, some, rank=-priority)

    def store(self, blocks: Sequence[Block]) -> None:
        """Writes blocks, as far as the queue's bound lets it."""
        wanted = max(_MAX_JOB_BYTES, int(self._queue_s * (self._store_rate or _FIRST_RATE)))
        bound = min(wanted, self._index.frames.num_bytes // _MAX_PINNED_PART)
        for some in _batches(blocks, min(_MAX_JOB_BYTES, bound)):
            num_bytes = sum(block.shelf.namespace.frame_bytes for block in some)
            if self.queued_bytes + num_bytes > bound or not self._workers:
                self._counts.num_redis_dropped += len(some)
                continue
            self._index.begin_store(some)
            self.queued_bytes += num_bytes
            self._enqueue(pb.TierJob.KIND_STORE, some, rank=_STORES_COME_LAST)

    def _enqueue(self, kind: pb.TierJob.Kind, blocks: Sequence[Block], rank: int) -> None:
        if not blocks:
            return
        hashes, anchors = [block.block_hash for block in blocks], [block.anchor for block in blocks]
        job = self._job(kind, blocks[0].shelf, hashes, anchors)
        job.frames, job.ttl_s = pack_uint64([block.frame for block in blocks]), self._ttl_s
        queued = _Queued(rank, job.id, job, blocks)
        if self._workers:
            self._queue.put_nowait(queued)
        else:
            self._finish(queued, pb.TierReport(error="no Redis worker runs"), 0.0)

    def _job(
        self, kind: pb.TierJob.Kind, shelf: Shelf, hashes: Sequence[bytes], anchors: Sequence[bytes]
    ) -> pb.TierJob:
        namespace = shelf.namespace
        return pb.TierJob(
            id=next(self._serial),
            kind=kind,
            fingerprint=namespace.fingerprint,
            num_parts=namespace.num_parts,
            part_bytes=namespace.part_bytes,
            hashes=b"".join(hashes),
            anchors=b"".join(anchors),
        )

    async def _keep(self, number: int) -> None:
        """Starts a worker again whenever it dies; whoever waits for the last one is told at once."""
        pause_s = _RESTART_AFTER_S[0]
        while True:
            try:
                worker = await self._start(number)
            except WorkerLost:
                log.error("a redis worker did not start", number=number)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _RESTART_AFTER_S[1])
                continue
            self._workers[number] = worker
            started = time.monotonic()
            runners = [asyncio.create_task(self._work(worker)) for _ in range(_JOBS_PER_WORKER)]
            try:
                await worker.wait_until_gone()
            finally:
                # Those that wait for a report get WorkerLost; the others wait for a job.
                del self._workers[number]
                worker.kill()
                for task in runners:
                    task.cancel()
                await asyncio.gather(*runners, return_exceptions=True)
            while not self._workers and not self._queue.empty():
                self._finish(self._queue.get_nowait(), pb.TierReport(error="no Redis worker runs"), 0.0)
            lived_s = time.monotonic() - started
            log.warning("redis worker died", number=number, after_s=round(lived_s, 1))
            least_s, most_s = _RESTART_AFTER_S
            pause_s = least_s if lived_s > most_s else min(2 * pause_s, most_s)
            await asyncio.sleep(pause_s)

    async def _work(self, worker: RedisProcess) -> None:
        while True:
            queued = await self._queue.get()
            started = time.monotonic()
            report = pb.TierReport(error="the Redis worker has died")
            try:
                with contextlib.suppress(WorkerLost):
                    report = await self._ask(worker, queued.job)
            finally:  # it is dead as well when this task is cancelled
                self._finish(queued, report, time.monotonic() - started)

    async def _ask(self, worker: RedisProcess, job: pb.TierJob) -> pb.TierReport:
        started = time.monotonic()
        report = await worker.ask(job)
        self._metrics.observe(job.kind, time.monotonic() - started)
        self._counts.num_redis_errors += bool(report.error)
        return report

    def _finish(self, queued: _Queued, report: pb.TierReport, took_s: float) -> None:
        """No worker touches these blocks any longer."""
        blocks = queued.blocks
        succeeded = [bool(each) for each in report.succeeded] or [False] * len(blocks)
        num_bytes = sum(succeeded) * blocks[0].shelf.namespace.frame_bytes
        counts = self._counts
        counts.num_redis_damaged += report.num_damaged
        if queued.job.kind == pb.TierJob.KIND_STORE:
            self.queued_bytes -= queued.num_bytes
            counts.redis_written_bytes += num_bytes
            counts.num_redis_dropped += succeeded.count(False)
            self._store_rate = _smoothed(self._store_rate, num_bytes, took_s)
            self._index.end_store(blocks, succeeded)
        else:
            counts.redis_read_bytes += num_bytes
            counts.num_promoted += sum(succeeded)
            self._load_rate = _smoothed(self._load_rate, num_bytes, took_s)
            self._index.end_load(blocks, succeeded)
        self._on_change()


def _smoothed(rate: float, num_bytes: int, took_s: float) -> float:
    """An exponential mean; what moved nothing says nothing."""
    if not num_bytes or took_s <= 0:
        return rate
    latest = num_bytes / took_s
    return latest if not rate else rate + _SMOOTHING * (latest - rate)


def _batches(blocks: Sequence[Block], max_bytes: int) -> list[Sequence[Block]]:
    """Blocks of one namespace in jobs."""
    if not blocks:
        return []
    size = max(1, max_bytes // blocks[0].shelf.namespace.frame_bytes)
    return [blocks[start : start + size] for start in range(0, len(blocks), size)]
