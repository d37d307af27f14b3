"""``albireo bench kv``: how fast parts go to a KV store of its own and come back, against plain copies.

Each call moves 8 MiB of parts, checksums on. *out* is from a rank's memory to the store, *in* the way back; over Redis,
from arena to Redis and back. Copies of the same bytes between two buffers of this process are timed between the calls.
"""

import argparse
import asyncio
import hashlib
import importlib.util
import secrets
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from albireo.arrays import UInt64Array
from albireo.child import Child, Process, python_module
from albireo.cli.json_file import write_json
from albireo.cli.ports import check_port
from albireo.cli.progress import counting_bar
from albireo.cli.run_dir import open_run_dir
from albireo.errors import ConfigError, GroupError
from albireo.kv.arena import Arena, LocalArena, PartCopy
from albireo.kv.chain import anchors_of
from albireo.kv.fingerprint import Namespace, fingerprint_of
from albireo.kv.part import Bytes, PartName
from albireo.kv.remote import RemoteArena
from albireo.kv.session import KvSession, open_session
from albireo.rpc import make_channel
from albireo.v1 import kvstore_pb2 as pb
from albireo.v1 import kvstore_pb2_grpc as rpc

_SIZES = tuple(64 << (10 + 2 * i) for i in range(4))  # 64 KiB to 4 MiB
_CALL_BYTES = 8 << 20
_START_TIMEOUT_S = 60.0
_REDIS_TIMEOUT_S = 20.0
_POLL_S = 0.001


@dataclass(frozen=True)
class Row:
    """One path, direction and size. Rates in 10^6 bytes of payload per second, medians; times of one call."""

    path: str
    direction: str
    part_bytes: int
    mb_s: float
    memcpy_mb_s: float
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True)
class _Case:
    """One call's blocks, of a single part each, and the rank's memory."""

    session: KvSession
    stub: "rpc.KvStoreAsyncStub"  # a name of the types only
    hashes: list[bytes]
    source: list[Bytes]
    target: list[Bytes]

    def copies(self, offsets: UInt64Array, pieces: Sequence[Bytes]) -> list[PartCopy]:
        fingerprint = self.session.namespace.fingerprint
        return [
            PartCopy(int(offsets[i, 0]), PartName(fingerprint, each, 0), [pieces[i]])
            for i, each in enumerate(self.hashes)
        ]


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--redis", metavar="URL", help="measure this Redis as well; its albireo:* keys grow")
    parser.add_argument("--reps", type=int, default=30, metavar="N", help="calls for each row; default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write the rows here as one JSON object; - is stdout")
    parser.add_argument("--plot", metavar="FILE", help="draw them as a PNG (needs matplotlib)")


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    if args.reps < 2:
        parser.error("--reps: at least 2 are needed")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot: matplotlib is not installed")
    with open_run_dir(None) as run_dir:
        rows = asyncio.run(_measure(run_dir.path, args.redis, args.reps))
    if args.json != "-":
        print(table(rows))
    if args.json:
        write_json(args.json, {"reps": args.reps, "call_bytes": _CALL_BYTES, "rows": [asdict(row) for row in rows]})
    if args.plot:
        from albireo.cli.kv_plot import draw

        draw(rows, Path(args.plot))
    return 0


async def _measure(run_dir: Path, redis: str | None, reps: int) -> list[Row]:
    rows: list[Row] = []
    paths = ["shm", "remote", *(["redis"] if redis else [])]
    async with _store(run_dir, redis) as target:
        with counting_bar(2 * len(paths) * len(_SIZES), "kv", "row") as bar:
            for part_bytes in _SIZES:
                for path in paths:
                    async with _case(target, part_bytes, path) as case:
                        rows += await _measure_path(path, target, case, part_bytes, reps)
                    bar.update(2)
    return rows


async def _measure_path(path: str, target: str, case: _Case, part_bytes: int, reps: int) -> list[Row]:
    out_s: list[float] = []
    in_s: list[float] = []
    memcpy_s: list[float] = []
    write, read = (_write_to_redis, _read_from_redis) if path == "redis" else (_write, _read)
    arena = await asyncio.to_thread(_attach, path, target, case.session, asyncio.get_running_loop())
    for _ in range(reps + 1):
        case.hashes[:] = _names(len(case.hashes))
        out_s.append(await write(case, arena))
        in_s.append(await read(case, arena))
        memcpy_s.append(await asyncio.to_thread(_copy, case))
        await case.stub.Flush(pb.FlushKvRequest())  # the next call finds the same memory, which is there by now
    await asyncio.to_thread(arena.close)
    memcpy = statistics.median(_rates(memcpy_s))
    return [
        Row(path, direction, part_bytes, statistics.median(_rates(times)), memcpy, *_percentiles(times))
        for direction, times in (("out", out_s), ("in", in_s))
    ]


def _attach(path: str, target: str, session: KvSession, loop: asyncio.AbstractEventLoop) -> Arena:
    if path == "remote":
        return RemoteArena(target, session.lease.lease, loop)
    return LocalArena.attach(session.lease)


async def _write(case: _Case, arena: Arena) -> float:
    """Seconds in which a rank writes; the blocks are committed after."""
    reserved = await case.session.reserve(case.hashes)
    copies = case.copies(reserved.offsets, case.source)
    seconds = await asyncio.to_thread(_timed, lambda: arena.write(copies))
    case.session.commit(reserved.hold, [True] * len(case.hashes))
    return seconds


async def _read(case: _Case, arena: Arena) -> float:
    acquired = await case.session.acquire(case.hashes)
    copies = case.copies(acquired.offsets, case.target)
    seconds = await asyncio.to_thread(_timed, lambda: arena.read(copies))
    case.session.release(acquired.hold)
    return seconds


async def _write_to_redis(case: _Case, arena: Arena) -> float:
    """From the commit until nothing waits to be written."""
    reserved = await case.session.reserve(case.hashes, anchors_of(case.hashes), durable=True)
    copies = case.copies(reserved.offsets, case.source)
    await asyncio.to_thread(_timed, lambda: arena.write(copies))
    start = time.perf_counter()
    case.session.commit(reserved.hold, [True] * len(case.hashes))
    await case.session.lookup(case.hashes)  # the commit has been seen
    await _until(case.stub, lambda stats: not stats.pinned_bytes)
    return time.perf_counter() - start


async def _read_from_redis(case: _Case, _arena: Arena) -> float:
    await case.stub.Flush(pb.FlushKvRequest())
    start = time.perf_counter()
    acquired = await case.session.acquire(case.hashes, anchors_of(case.hashes), wait_s=_REDIS_TIMEOUT_S)
    seconds = time.perf_counter() - start
    case.session.release(acquired.hold)
    if acquired.num_blocks < len(case.hashes):
        raise GroupError(f"--redis: {acquired.num_blocks} of {len(case.hashes)} blocks came back")
    return seconds


def _timed(call: Callable[[], list[bool]]) -> float:
    start = time.perf_counter()
    succeeded = call()
    seconds = time.perf_counter() - start
    if not all(succeeded):
        raise GroupError(f"{succeeded.count(False)} of {len(succeeded)} parts were lost")
    return seconds


def _copy(case: _Case) -> float:
    start = time.perf_counter()
    for source, target in zip(case.source, case.target, strict=True):
        np.copyto(target, source)
    return time.perf_counter() - start


@asynccontextmanager
async def _store(run_dir: Path, redis: str | None) -> AsyncIterator[str]:
    """A store's address; it runs meanwhile."""
    target = f"127.0.0.1:{check_port('127.0.0.1', 0, '--listen')}"  # as ranks of other hosts come
    argv = [*python_module("kvstore_svc"), "--listen", target, "--run-dir", str(run_dir), "--arena-gib", "0.25"]
    child = Child("kvstore", [*argv, *(["--redis", redis] if redis else [])], run_dir / "logs" / "kvstore.log")
    process = await Process.start(child, run_dir)
    try:
        started: set[asyncio.Future[Any]] = {process.ready, process.exited}
        await asyncio.wait(started, timeout=_START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if not process.ready.done():
            raise GroupError(process.report() if process.exited.done() else f"not ready: its log is {child.log_path}")
        yield target
    finally:
        process.terminate()
        await process.exited


@asynccontextmanager
async def _case(target: str, part_bytes: int, path: str) -> AsyncIterator[_Case]:
    namespace = Namespace(fingerprint_of({"bench": part_bytes}), 1, part_bytes)
    num = _CALL_BYTES // part_bytes
    source = list(np.random.default_rng(part_bytes).integers(0, 256, (num, part_bytes), dtype=np.uint8))
    async with make_channel(target, to_peer=True) as channel:
        stub: rpc.KvStoreAsyncStub = rpc.KvStoreStub(channel)
        session = await open_session(channel, "bench", time.time_ns(), namespace)
        try:
            if path == "redis":
                await _until(stub, lambda stats: stats.num_redis_workers > 0)
            yield _Case(session, stub, _names(num), source, list(np.zeros((num, part_bytes), dtype=np.uint8)))
        finally:
            await session.close()


async def _until(stub: "rpc.KvStoreAsyncStub", condition: Callable[[pb.KvStats], bool]) -> None:
    """Raises GroupError when it does not come about in time."""
    deadline = time.monotonic() + _REDIS_TIMEOUT_S
    while not condition(await stub.GetStats(pb.GetKvStatsRequest())):
        if time.monotonic() > deadline:
            raise GroupError(f"--redis: nothing within {_REDIS_TIMEOUT_S:g} s")
        await asyncio.sleep(_POLL_S)


def _names(num: int) -> list[bytes]:
    root = secrets.token_bytes(16)
    return [hashlib.sha256(root + index.to_bytes(4, "little")).digest() for index in range(num)]


def _rates(seconds: Sequence[float]) -> list[float]:
    """MB/s; the first call, which touches pages for the first time, does not count."""
    return [_CALL_BYTES / each / 1e6 for each in seconds[1:]]


def _percentiles(seconds: Sequence[float]) -> tuple[float, float]:
    p50, p99 = np.percentile(seconds[1:], (50, 99))
    return 1e3 * float(p50), 1e3 * float(p99)


def table(rows: Sequence[Row]) -> str:
    lines = [f"{'path':8}{'':5}{'part KiB':>9}{'MB/s':>9}{'memcpy':>9}{'ratio':>7}{'p50 ms':>9}{'p99 ms':>9}"]
    lines += [
        f"{row.path:8}{row.direction:5}{row.part_bytes >> 10:>9}{row.mb_s:>9.0f}{row.memcpy_mb_s:>9.0f}"
        f"{row.mb_s / row.memcpy_mb_s:>7.2f}{row.p50_ms:>9.2f}{row.p99_ms:>9.2f}"
        for row in rows
    ]
    return "\n".join(lines)
