"""``python -m kvstore_svc redis-worker``: moves blocks between the arena and Redis, beside the index's loop.

Does what the store tells it by its socket, and ends with it. A job is answered when nothing of it runs any longer.
"""

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import structlog
import uvloop

from albireo.arrays import unpack_uint64
from albireo.config import parse
from albireo.errors import AlbireoError, ConfigError
from albireo.kv.chain import ANCHOR_BYTES, HASH_BYTES, split
from albireo.kv.fingerprint import Namespace
from albireo.logging import set_up_logging
from albireo.v1 import kvtier_pb2 as pb
from kvstore_svc.breaker import Breaker
from kvstore_svc.config import WorkerConfig
from kvstore_svc.memory import Memory
from kvstore_svc.redis_blocks import FAILURES, RedisBlocks, connect, load_mac_key
from kvstore_svc.tier_wire import read_message, write_message

Result = TypeVar("Result")

log = structlog.get_logger()


def main(argv: list[str]) -> int:
    """Exit status: 0 the store is gone, 1 failed while running, 2 the configuration does not work."""
    config = parse(WorkerConfig, "python -m kvstore_svc redis-worker", "Moves blocks to and from Redis.", argv)
    set_up_logging(config.name, config.log_level)
    try:
        uvloop.run(_run(config))
    except AlbireoError as error:
        log.error("redis worker ends", error=str(error), kind=type(error).__name__)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


async def _run(config: WorkerConfig) -> None:
    client = connect(config)
    memory = Memory.of(config.arena_fd)
    blocks = RedisBlocks(client, memory.bytes, load_mac_key(config))
    reader, writer = await asyncio.open_unix_connection(sock=socket.socket(fileno=config.socket_fd))
    jobs = Jobs(blocks, config.redis_connections, config.redis_timeout)
    tasks: set[asyncio.Task[None]] = set()
    while (message := await read_message(reader)) is not None:
        task = asyncio.create_task(_answer(jobs, pb.TierJob.FromString(message), writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    for task in tasks:
        task.cancel()
    with contextlib.suppress(*FAILURES):
        await client.aclose()


async def _answer(jobs: "Jobs", job: pb.TierJob, writer: asyncio.StreamWriter) -> None:
    write_message(writer, (await jobs.run(job)).SerializeToString())


class Jobs:
    """Works off jobs, one report each.

    Args:
        num_at_once: operations, as many as there are connections.
        timeout_s: an operation that takes longer has failed.
    """

    def __init__(self, blocks: RedisBlocks, num_at_once: int, timeout_s: float) -> None:
        self._blocks = blocks
        self._turns = asyncio.Semaphore(num_at_once)
        self._timeout_s = timeout_s
        self._breaker = Breaker()

    async def run(self, job: pb.TierJob) -> pb.TierReport:
        if job.kind == pb.TierJob.KIND_UNSPECIFIED:
            return pb.TierReport(id=job.id)
        namespace = Namespace(job.fingerprint, job.num_parts, job.part_bytes)
        hashes, anchors = split(job.hashes, HASH_BYTES), split(job.anchors, ANCHOR_BYTES)
        if job.kind == pb.TierJob.KIND_PROBE:
            return await self._probe(job.id, namespace, hashes, anchors)
        frames = unpack_uint64(job.frames).tolist()
        each: Callable[..., Awaitable[bool | None]] = self._blocks.load
        if job.kind == pb.TierJob.KIND_STORE:
            each = partial(self._store, job.ttl_s)
        calls = [self._try(partial(each, namespace, *block)) for block in zip(hashes, anchors, frames, strict=True)]
        results = await asyncio.gather(*calls)
        errors = [result for result in results if isinstance(result, str)]
        return pb.TierReport(
            id=job.id,
            succeeded=bytes(result is True for result in results),
            num_damaged=results.count(None),
            error=errors[0] if errors else "",
        )

    async def _probe(
        self, job_id: int, namespace: Namespace, hashes: list[bytes], anchors: list[bytes]
    ) -> pb.TierReport:
        found = await self._try(partial(self._blocks.probe, namespace, hashes, anchors))
        if isinstance(found, str):
            return pb.TierReport(id=job_id, succeeded=bytes(len(hashes)), error=found)
        return pb.TierReport(id=job_id, succeeded=bytes(found))

    async def _store(self, ttl_s: float, namespace: Namespace, block_hash: bytes, anchor: bytes, frame: int) -> bool:
        await self._blocks.store(namespace, block_hash, anchor, frame, ttl_s)
        return True

    async def _try(self, call: Callable[[], Awaitable[Result]]) -> Result | str:
        """What the call returns, or a text: why it failed."""
        async with self._turns:
            if not self._breaker.lets_through(time.monotonic()):
                return "Redis has failed again and again, and is left alone for a while"
            try:
                async with asyncio.timeout(self._timeout_s):
                    result = await call()
            except FAILURES as error:
                self._breaker.failed(time.monotonic())
                log.warning("redis failed", error=str(error), kind=type(error).__name__)
                return f"{type(error).__name__}: {error}"
            self._breaker.succeeded()
            return result
