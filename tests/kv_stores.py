"""Starts KV stores and Redis servers, and plays planner and ranks with them."""

import asyncio
import contextlib
import hashlib
import itertools
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from redis import Redis, RedisError

from albireo.arrays import UInt64Array
from albireo.kv.arena import Arena, LocalArena, PartCopy
from albireo.kv.chain import anchors_of
from albireo.kv.fingerprint import Namespace
from albireo.kv.part import Bytes, PartName
from albireo.kv.session import Acquired, KvSession, open_session
from albireo.rpc import make_channel
from albireo.v1 import kvstore_pb2 as pb
from albireo.v1 import kvstore_pb2_grpc as rpc
from services import Service, fixed_ports, free_port, process, wait_until_serving

NAMESPACE = Namespace(b"f" * 32, num_parts=2, part_bytes=4096)
MIB = 1 << 20
_EPOCHS = itertools.count(1)


def chain(letter: str, num: int) -> list[bytes]:
    return [hashlib.sha256(f"{letter} {i}".encode()).digest() for i in range(num)]


def contents(block_hash: bytes, namespace: Namespace = NAMESPACE) -> list[Bytes]:
    """The parts that a block of that name has."""
    rng = np.random.default_rng(list(block_hash[:8]))
    return [rng.integers(0, 256, namespace.part_bytes, dtype=np.uint8) for _ in range(namespace.num_parts)]


def copies_of(
    hashes: Sequence[bytes],
    offsets: UInt64Array,
    pieces: Sequence[Sequence[Bytes]],
    namespace: Namespace = NAMESPACE,
    parts: range | None = None,
) -> list[PartCopy]:
    """Those that a rank with these parts does; all, for a rank alone."""
    return [
        PartCopy(int(offsets[i, part]), PartName(namespace.fingerprint, each, part), [pieces[i][part]])
        for i, each in enumerate(hashes)
        for part in parts or range(namespace.num_parts)
    ]


def write_blocks(
    arena: Arena, hashes: Sequence[bytes], offsets: UInt64Array, namespace: Namespace = NAMESPACE
) -> list[bool]:
    """Which blocks came to be complete."""
    pieces = [contents(each, namespace) for each in hashes]
    done = arena.write(copies_of(hashes, offsets, pieces, namespace))
    return [all(done[i : i + namespace.num_parts]) for i in range(0, len(done), namespace.num_parts)]


def read_blocks(
    arena: Arena, hashes: Sequence[bytes], offsets: UInt64Array, namespace: Namespace = NAMESPACE
) -> list[bool]:
    """Which parts came; what comes is what was written, or the test fails."""
    pieces = [[np.zeros(namespace.part_bytes, dtype=np.uint8) for _ in range(namespace.num_parts)] for _ in hashes]
    done = arena.read(copies_of(hashes, offsets, pieces, namespace))
    for i, came in enumerate(done):
        block, part = divmod(i, namespace.num_parts)
        if came:
            np.testing.assert_array_equal(pieces[block][part], contents(hashes[block], namespace)[part])
    return done


async def put(session: KvSession, arena: Arena, hashes: Sequence[bytes], tenant: str = "t", **more: bool) -> int:
    """Reserves, writes and commits what is new; the hold."""
    anchors = anchors_of(hashes)
    reserved = await session.reserve(hashes, anchors, tenant, **more)
    new = [each for each, state in zip(hashes, reserved.states, strict=True) if state == pb.KV_BLOCK_STATE_NEW]
    session.commit(reserved.hold, write_blocks(arena, new, reserved.offsets, session.namespace))
    return reserved.hold


@contextlib.contextmanager
def kv_store(run_dir: Path, **flags: object) -> Iterator[Service]:
    """A store of 8 MiB in segments of 1 MiB, unless flags say otherwise."""
    run_dir.mkdir(parents=True, exist_ok=True)
    flags = {"arena_gib": 8 / 1024, "segment_mib": 1, **flags}
    address = f"unix:{run_dir}/kv.sock"
    argv = ["kvstore_svc", "--listen", address, "--run-dir", str(run_dir)]
    for name, value in flags.items():
        argv += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
    with process(argv, run_dir / "kvstore.log") as child:
        wait_until_serving(address, child, run_dir / "kvstore.log")
        yield Service(address, child, run_dir)


@contextlib.asynccontextmanager
async def kv_session(
    store: Service, name: str = "p", epoch: int = 1, namespace: Namespace = NAMESPACE
) -> AsyncIterator[KvSession]:
    async with make_channel(store.address, to_peer=True) as channel:
        session = await open_session(channel, name, epoch, namespace)
        try:
            yield session
        finally:
            await session.close()


async def stats_of(store: Service) -> pb.KvStats:
    async with make_channel(store.address) as channel:
        stub: rpc.KvStoreAsyncStub = rpc.KvStoreStub(channel)
        return await stub.GetStats(pb.GetKvStatsRequest(), timeout=5)


async def flush(store: Service, **what: str) -> int:
    async with make_channel(store.address) as channel:
        stub: rpc.KvStoreAsyncStub = rpc.KvStoreStub(channel)
        return (await stub.Flush(pb.FlushKvRequest(**what), timeout=5)).num_blocks


async def until(condition: Callable[[], Awaitable[bool]], what: str, timeout_s: float = 20.0) -> None:
    """For what no event tells: another process's state."""
    deadline = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.02)


async def until_idle(store: Service) -> pb.KvStats:
    """Leases go back to zero."""

    async def is_idle() -> bool:
        stats = await stats_of(store)
        return not (stats.pinned_bytes or stats.quarantined_bytes or stats.num_sessions or stats.num_ranks)

    await until(is_idle, "somebody still holds something")
    return await stats_of(store)


@dataclass
class Planner:
    """A planner with one rank."""

    store: Service
    session: KvSession
    arena: LocalArena

    async def put(self, hashes: list[bytes], **more: bool) -> None:
        self.session.release(await put(self.session, self.arena, hashes, **more))

    async def acquire(self, hashes: list[bytes], wait_s: float = 5.0) -> Acquired:
        return await self.session.acquire(hashes, anchors_of(hashes), "t", wait_s=wait_s)

    async def use(self, hashes: list[bytes], wait_s: float = 5.0) -> int:
        """How many blocks come, whole."""
        acquired = await self.acquire(hashes, wait_s)
        assert all(read_blocks(self.arena, hashes[: acquired.num_blocks], acquired.offsets))
        self.session.release(acquired.hold)
        return acquired.num_blocks

    async def num_remote(self, hashes: list[bytes]) -> int:
        return (await self.session.lookup(hashes, anchors_of(hashes), asks_redis=True)).num_remote


@contextlib.asynccontextmanager
async def planner(store: Service) -> AsyncIterator[Planner]:
    """Of an empty store with Redis; nobody holds anything after it."""

    async def has_worker() -> bool:
        return (await stats_of(store)).num_redis_workers == 1

    await until(has_worker, "no Redis worker")
    await flush(store)
    async with kv_session(store, epoch=next(_EPOCHS)) as session:
        arena = LocalArena.attach(session.lease)
        yield Planner(store, session, arena)
        arena.close()
    await until_idle(store)


@dataclass(frozen=True)
class RedisServer:
    url: str
    process: subprocess.Popen[bytes]
    client: Redis

    def send_signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


@contextlib.contextmanager
def redis_server(directory: Path, *argv: str) -> Iterator[RedisServer]:
    """A Redis on a unix socket that keeps nothing on disk."""
    directory.mkdir(parents=True, exist_ok=True)
    socket = directory / "redis.sock"
    command = ["redis-server", "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(directory), *argv]
    with (directory / "redis.log").open("ab") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log)
    client = Redis(unix_socket_path=str(socket))
    try:
        wait_for_redis(client, child)
        yield RedisServer(f"unix://{socket}", child, client)
    finally:
        client.close()
        child.kill()
        child.wait()


@contextlib.contextmanager
def redis_cluster(directory: Path, num_nodes: int = 3) -> Iterator[str]:
    """The URL of a cluster on loopback ports, without replicas."""
    port = fixed_ports(num_nodes)
    with contextlib.ExitStack() as stack:
        clients = []
        for i in range(num_nodes):
            flags = ["--port", str(port + i), "--cluster-port", str(free_port()), "--cluster-enabled", "yes"]
            clients.append(stack.enter_context(redis_server(directory / str(i), *flags)).client)
        nodes = [f"127.0.0.1:{port + i}" for i in range(num_nodes)]
        command = ["redis-cli", "--cluster", "create", *nodes, "--cluster-yes"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        deadline = time.monotonic() + 60
        while not all(client.cluster("INFO")["cluster_state"] == "ok" for client in clients):
            assert time.monotonic() < deadline, "the cluster does not form"
            time.sleep(0.1)
        yield f"redis://{nodes[0]}"


def wait_for_redis(client: Redis, child: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 20
    while child.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(RedisError):
            client.ping()
            return
        time.sleep(0.02)
    raise AssertionError("redis-server did not start")
