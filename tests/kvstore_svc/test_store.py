"""The store as planners and ranks see it: a real process, real sessions, shared memory."""

import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest

from albireo.block_hash import chain_hashes, root_hash
from albireo.errors import InvalidRequest, Overloaded, StoreUnavailable
from albireo.kv.arena import Lease, LocalArena
from albireo.kv.fingerprint import Namespace
from albireo.kv.link import KvLink
from albireo.kv.session import KvSession
from albireo.v1 import kvstore_pb2 as pb
from kv_stores import (
    MIB,
    NAMESPACE,
    chain,
    contents,
    copies_of,
    flush,
    kv_session,
    kv_store,
    put,
    read_blocks,
    stats_of,
    until,
    until_idle,
    write_blocks,
)
from kvstore_svc.config import StoreConfig
from services import Service, free_port, process, read_metrics

RANK = Path(__file__).with_name("rank_process.py")
EPOCHS = itertools.count(1)


@pytest.fixture(scope="module")
def metrics_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, metrics_port: int) -> Iterator[Service]:
    with kv_store(tmp_path_factory.mktemp("kv"), metrics_port=metrics_port) as service:
        yield service


@pytest.fixture
async def session(store: Service) -> AsyncIterator[KvSession]:
    """The store is empty before, and nobody holds anything after."""
    await flush(store)
    async with kv_session(store, epoch=next(EPOCHS)) as session:
        yield session
    await until_idle(store)


@pytest.fixture
def arena(session: KvSession) -> Iterator[LocalArena]:
    arena = LocalArena.attach(session.lease)
    yield arena
    arena.close()


@contextlib.contextmanager
def rank_process(lease: Lease, offset: int) -> Iterator[subprocess.Popen[str]]:
    """A rank that writes a part at ``offset`` until its lease ends."""
    argv = [lease.arena_socket, lease.arena_id.hex(), lease.lease, offset, NAMESPACE.part_bytes]
    command = [sys.executable, str(RANK), *map(str, argv)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "writing\n"
        yield child
    finally:
        child.kill()
        child.communicate()


async def test_two_ranks_write_what_one_rank_reads(session: KvSession, arena: LocalArena):
    """Parts do not depend on the TP degree."""
    hashes = chain("a", 5)
    reserved = await session.reserve(hashes)
    pieces = [contents(each) for each in hashes]
    other = LocalArena.attach(session.lease)
    for rank, part in ((arena, range(1)), (other, range(1, 2))):
        assert all(rank.write(copies_of(hashes, reserved.offsets, pieces, parts=part)))
    session.commit(reserved.hold, [True] * 5)
    found = await session.lookup([*hashes, *chain("b", 1)])
    assert (found.num_ready, found.num_pending) == (5, 0)
    acquired = await session.acquire([*hashes, *chain("b", 1)])
    assert acquired.num_blocks == 5
    assert all(read_blocks(other, hashes, acquired.offsets))
    other.close()


async def test_parts_that_ranks_did_not_write_are_misses(session: KvSession, arena: LocalArena):
    """Whatever a planner says: who reads a part checks it."""
    hashes = chain("unwritten", 3)
    reserved = await session.reserve(hashes)
    write_blocks(arena, hashes[:2], reserved.offsets)
    session.commit(reserved.hold, [True, True, True])
    acquired = await session.acquire(hashes)
    assert read_blocks(arena, hashes, acquired.offsets) == [True, True, True, True, False, False]


async def test_a_flipped_bit_in_the_arena_is_a_miss(session: KvSession, arena: LocalArena):
    hashes = chain("a", 2)
    await put(session, arena, hashes)
    acquired = await session.acquire(hashes)
    for at in (0, 30, 63, 64, 64 + NAMESPACE.part_bytes - 1):
        place = int(acquired.offsets[0, 0]) + at
        arena._memory[place] ^= 1
        assert read_blocks(arena, hashes, acquired.offsets) == [False, True, True, True], f"byte {at}"
        arena._memory[place] ^= 1
    assert all(read_blocks(arena, hashes, acquired.offsets))


async def test_a_waiting_acquire_gets_what_another_session_commits(
    store: Service, session: KvSession, arena: LocalArena
):
    """The next turn comes before the last one's write is complete. Nobody else waits for it."""
    hashes = chain("a", 4)
    await put(session, arena, hashes[:2])
    reserved = await session.reserve(hashes)
    async with kv_session(store, "reader", next(EPOCHS)) as reader:
        waiting = asyncio.create_task(reader.acquire(hashes, wait_s=20.0))
        found = await reader.lookup(hashes)
        assert (found.num_ready, found.num_pending) == (2, 2)
        assert not waiting.done()
        session.commit(reserved.hold, write_blocks(arena, hashes[2:], reserved.offsets))
        acquired = await asyncio.wait_for(waiting, 10)
        assert acquired.num_blocks == 4
        assert all(read_blocks(arena, hashes, acquired.offsets))


async def test_a_deadline_gives_what_is_ready(store: Service, session: KvSession, arena: LocalArena):
    hashes = chain("a", 4)
    await put(session, arena, hashes[:2])
    reserved = await session.reserve(hashes)
    async with kv_session(store, "reader", next(EPOCHS)) as reader:
        started = time.monotonic()
        acquired = await reader.acquire(hashes, wait_s=0.2)
        assert acquired.num_blocks == 2
        assert 0.2 <= time.monotonic() - started < 2.0
    session.abort(reserved.hold)


async def test_a_cancelled_acquire_holds_nothing(store: Service, session: KvSession, arena: LocalArena):
    hashes = chain("a", 4)
    await put(session, arena, hashes[:2])
    reserved = await session.reserve(hashes[2:])
    waiting = asyncio.create_task(session.acquire(hashes, wait_s=30.0))

    async def is_held() -> bool:
        return (await stats_of(store)).pinned_bytes == 4 * NAMESPACE.frame_bytes

    await until(is_held, "what it waits for is held")
    waiting.cancel()
    session.abort(reserved.hold)
    await session.lookup(hashes)
    assert (await stats_of(store)).pinned_bytes == 0


async def test_a_full_store_refuses_at_once(session: KvSession, arena: LocalArena):
    num = session.credit_bytes // NAMESPACE.frame_bytes
    holds = [
        await put(session, arena, chain(f"kept {i}", min(session.max_blocks, num - i)), keeps=True)
        for i in range(0, num, session.max_blocks)
    ]
    with pytest.raises(Overloaded, match="the session holds") as refused:
        await session.reserve(chain("more", 1))
    assert refused.value.retry_after_s > 0
    session.release(holds[0])
    await put(session, arena, chain("more", 1))


async def test_two_tenants_with_the_same_text_never_meet(session: KvSession, arena: LocalArena):
    tokens = np.arange(96, dtype=np.int32)
    first, second = (chain_hashes(root_hash(tenant), tokens, 32) for tenant in ("one", "two"))
    await put(session, arena, first, tenant="one")
    assert (await session.lookup(first)).num_ready == 3
    assert (await session.lookup(second)).num_ready == 0


async def test_a_newer_epoch_ends_the_older_session_and_its_ranks(store: Service, session: KvSession):
    async with kv_session(store, "twice", next(EPOCHS)) as old:
        rank = LocalArena.attach(old.lease)
        reserved = await old.reserve(chain("a", 1))
        async with kv_session(store, "twice", next(EPOCHS)) as new:
            assert "has begun" in await asyncio.wait_for(old.wait_until_ended(), 10)
            with pytest.raises(StoreUnavailable):
                await old.lookup(chain("a", 1))
            with pytest.raises(StoreUnavailable, match="does not know lease"):
                LocalArena.attach(old.lease)
            with pytest.raises(InvalidRequest, match="epoch 1 of 'twice'"):
                async with kv_session(store, "twice", 1):
                    pass
            await until(_is_lost(rank), "the old rank goes on")
            assert rank.write(copies_of(chain("a", 1), reserved.offsets, [contents(chain("a", 1)[0])])) == [False] * 2
            assert (await new.lookup(chain("a", 1))).num_pending == 0


async def test_a_zombie_rank_keeps_its_place_until_it_lets_go(store: Service, session: KvSession, arena: LocalArena):
    """A frozen rank may go on writing when it wakes: until then nobody gets the place that it writes to."""
    async with kv_session(store, "zombie", next(EPOCHS)) as planner:
        reserved = await planner.reserve(chain("z", 2))
        offset = int(reserved.offsets[0, 0])
        with rank_process(planner.lease, offset) as rank:
            rank.send_signal(signal.SIGSTOP)

            async def is_frozen() -> bool:
                stats = [stat.read_text() for stat in Path(f"/proc/{rank.pid}/task").glob("*/stat")]
                return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)

            await until(is_frozen, "the rank runs")
            await planner.close()

            async def in_quarantine() -> bool:
                return (await stats_of(store)).quarantined_bytes == 2 * NAMESPACE.frame_bytes

            await until(in_quarantine, "the places are given away")
            num = session.credit_bytes // NAMESPACE.frame_bytes
            taken = []
            for i in range(0, num, session.max_blocks):
                some = chain(f"b{i}", min(session.max_blocks, num - i))
                more = await session.reserve(some)
                taken += more.offsets[:, 0].tolist()
                session.abort(more.hold)
            assert offset not in taken
            assert await in_quarantine()
            rank.send_signal(signal.SIGCONT)
            assert rank.stdout is not None
            assert rank.stdout.readline() == "stopped\n"

            async def is_back() -> bool:
                return (await stats_of(store)).quarantined_bytes == 0

            await until(is_back, "the places do not come back")


async def test_a_rank_killed_in_mid_write_leaves_nothing(store: Service, session: KvSession):
    async with kv_session(store, "killed", next(EPOCHS)) as planner:
        reserved = await planner.reserve(chain("z", 2))
        with rank_process(planner.lease, int(reserved.offsets[0, 0])) as rank:
            rank.kill()
            rank.wait()
            await planner.close()

            async def is_back() -> bool:
                return (await stats_of(store)).quarantined_bytes == 0

            await until(is_back, "the places do not come back")
    assert (await session.lookup(chain("z", 2))).num_pending == 0


async def test_a_killed_store_is_a_miss_and_the_next_one_another_arena(tmp_path: Path):
    """Clients see misses, come back by themselves, and never mistake old places for new ones."""
    sessions: list[KvSession] = []
    came = asyncio.Event()

    def on_change(session: KvSession | None) -> None:
        if session is not None:
            sessions.append(session)
            came.set()

    hashes = chain("a", 3)
    link = KvLink(f"unix:{tmp_path}/kv.sock", "p", NAMESPACE, on_change)
    running = asyncio.create_task(link.run())
    try:
        argv = ["kvstore_svc", "--listen", f"unix:{tmp_path}/kv.sock", "--run-dir", str(tmp_path)]
        with process([*argv, "--arena-gib", "0.1"], tmp_path / "kv.log") as child:
            await asyncio.wait_for(came.wait(), 30)
            arena = LocalArena.attach(sessions[0].lease)
            await put(sessions[0], arena, hashes)
            acquired = await sessions[0].acquire(hashes)
            assert all(read_blocks(arena, hashes, acquired.offsets))
            came.clear()
            child.kill()
            await asyncio.wait_for(sessions[0].wait_until_ended(), 10)
            with pytest.raises(StoreUnavailable):
                await sessions[0].acquire(hashes)
            await until(_is_lost(arena), "the rank does not notice")
            assert not any(read_blocks(arena, hashes, acquired.offsets))
            assert not any(write_blocks(arena, hashes, acquired.offsets))
        await until(_has_no_memfd, "the arena is still mapped", timeout_s=5)
        with process([*argv, "--arena-gib", "0.1"], tmp_path / "kv.log"):
            await asyncio.wait_for(came.wait(), 30)
            assert sessions[1].lease.arena_id != sessions[0].lease.arena_id
            assert (await sessions[1].lookup(hashes)).num_ready == 0
            with pytest.raises(StoreUnavailable, match="does not know lease"):
                LocalArena.attach(sessions[0].lease)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def _has_no_memfd() -> bool:
    """A memfd lives as long as somebody maps it: here, this process would."""
    return "memfd:albireo-kv" not in Path("/proc/self/maps").read_text()


def _is_lost(arena: LocalArena):  # type: ignore[no-untyped-def]
    async def is_lost() -> bool:
        return arena.is_lost

    return is_lost


async def test_other_users_get_no_arena(store: Service, session: KvSession):
    """Even where the file system lets them in."""
    if os.getuid() != 0:
        pytest.skip("needs to become another user")
    nobody = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(s.recv(64))"
    path = Path(session.lease.arena_socket)
    parents = [each for each in path.parents if each != Path("/") and not each.stat().st_mode & 0o001]
    for each in parents:
        each.chmod(0o711)
    path.chmod(0o777)
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    assert python is not None
    done = subprocess.run(
        [python, "-c", nobody, str(path)],
        user="nobody",
        cwd="/",
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    path.chmod(0o600)
    for each in parents:
        each.chmod(0o700)
    assert done.stdout == "b''\n", done.stderr


@pytest.mark.parametrize(
    ("namespace", "message"),
    [
        (Namespace(b"q" * 32, 1, 3 * MIB), "the store's segments have 1048576"),
        (Namespace(NAMESPACE.fingerprint, 1, 64), "this fingerprint has 2 and 4096"),
    ],
)
async def test_namespaces_that_do_not_fit(store: Service, session: KvSession, namespace: Namespace, message: str):
    with pytest.raises(InvalidRequest, match=message):
        async with kv_session(store, "other", next(EPOCHS), namespace):
            pass


async def test_bad_requests_are_refused_by_name(session: KvSession):
    with pytest.raises(InvalidRequest, match="31 bytes: no multiple of 32"):
        await session.lookup([b"x" * 31])
    with pytest.raises(InvalidRequest, match="0 hashes: 1 to"):
        await session.acquire([])
    with pytest.raises(InvalidRequest, match="1 anchors: none, or one for each of 2 hashes"):
        await session.reserve(chain("a", 2), [b"a" * 8])
    with pytest.raises(InvalidRequest, match=r"wait_s -1: 0 to 60"):
        await session.acquire(chain("a", 1), wait_s=-1.0)
    with pytest.raises(InvalidRequest, match=f"{session.max_blocks + 1} hashes: 1 to {session.max_blocks}"):
        await session.reserve(chain("a", session.max_blocks + 1))
    assert session.is_open
    session.commit(77, [True])
    assert "id 77: no reservation" in await asyncio.wait_for(session.wait_until_ended(), 10)


async def test_stats_and_metrics(store: Service, metrics_port: int, session: KvSession, arena: LocalArena):
    before, metrics_before = await stats_of(store), read_metrics(metrics_port)
    await put(session, arena, chain("a", 2), tenant="one")
    acquired = await session.acquire(chain("a", 3))
    stats = await stats_of(store)
    assert [(each.tenant, each.num_blocks) for each in stats.tenants] == [("one", 2)]
    assert (stats.num_hits - before.num_hits, stats.num_misses - before.num_misses) == (2, 1)
    assert (stats.num_ranks, stats.num_sessions) == (1, 1)
    metrics = read_metrics(metrics_port)
    frames = 2 * NAMESPACE.frame_bytes
    assert metrics["albireo_kv_pinned_bytes"] == frames
    for name, more in (("hits", 2), ("misses", 1), ("acquired_bytes", frames), ("committed_bytes", frames)):
        sample = f"albireo_kv_{name}_total"
        assert metrics[sample] - metrics_before[sample] == more
    session.release(acquired.hold)
    assert await flush(store, tenant="two") == 0
    assert await flush(store, tenant="one") == 2
    assert (await session.lookup(chain("a", 2))).num_ready == 0
    assert (await stats_of(store)).used_bytes == 0


def test_wrong_flags_end_the_store_with_status_2():
    command = [sys.executable, "-m", "kvstore_svc", "--redis", "http://x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "--redis" in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"segment_mib": 64.0, "arena_gib": 0.01}, "--segment-mib 64: more than 0, at most --arena-gib 0.01"),
        ({"ttl": -1.0}, "--ttl -1: not negative"),
        ({"redis_workers": 17}, "--redis-workers 17: 1 to 16"),
        ({"redis_timeout": 0.0}, "--redis-timeout 0: more than 0, at most 60"),
    ],
)
def test_flags_out_of_their_ranges(flags: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        StoreConfig(**flags)  # type: ignore[arg-type]


def test_session_states_are_the_wires():
    assert (pb.KV_BLOCK_STATE_NEW, pb.KV_BLOCK_STATE_READY, pb.KV_BLOCK_STATE_PENDING) == (0, 1, 2)
