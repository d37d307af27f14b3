"""The Redis tier: a real redis-server behind a real store, and what is done to both."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.crc import key_slot

from albireo.kv.chain import anchors_of
from kv_stores import (
    MIB,
    NAMESPACE,
    Planner,
    RedisServer,
    chain,
    flush,
    kv_store,
    planner,
    redis_cluster,
    redis_server,
    stats_of,
    until,
)
from kvstore_svc.breaker import Breaker
from kvstore_svc.redis_blocks import key_of
from needs import needs_redis
from services import Service

pytestmark = needs_redis


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kv")


@pytest.fixture
def redis(directory: Path) -> Iterator[RedisServer]:
    """A new one for each test, where the last one was."""
    with redis_server(directory / "redis") as server:
        yield server


@pytest.fixture(scope="module")
def store(directory: Path) -> Iterator[Service]:
    """One for all tests: Redis comes and goes, and it goes on."""
    with kv_store(directory / "store", redis=f"unix://{directory}/redis/redis.sock", redis_timeout=0.5) as service:
        yield service


@pytest.fixture
async def one(store: Service, redis: RedisServer) -> AsyncIterator[Planner]:
    """The store is empty, and its worker has found the new Redis."""
    async with planner(store) as one:

        async def reaches_redis() -> bool:
            await flush(store)
            await one.put(chain("probe", 1), durable=True)
            return redis.client.dbsize() > 0

        await until(reaches_redis, "the worker does not find Redis")
        await flush(store)
        redis.client.flushall()
        yield one


def keys_of(hashes: list[bytes]) -> list[str]:
    return [key_of(NAMESPACE, each, anchor) for each, anchor in zip(hashes, anchors_of(hashes), strict=True)]


async def until_stored(redis: RedisServer, hashes: list[bytes]) -> None:
    async def are_there() -> bool:
        return redis.client.exists(*keys_of(hashes)) == len(hashes)

    await until(are_there, f"{len(hashes)} blocks in Redis")


async def test_what_redis_has_outlives_the_store(tmp_path: Path, one: Planner, redis: RedisServer):
    """Also the form of keys: a hash per block, a field per part, an expiry, one tag for 64 blocks of a chain."""
    hashes = chain("a", 70)
    await one.put(hashes, durable=True)
    await until_stored(redis, hashes)
    keys = keys_of(hashes)
    assert keys[69] == f"albireo:{{{hashes[64][:8].hex()}}}:{b'f'.hex() * 8}:{hashes[69].hex()}"
    assert sorted(redis.client.hkeys(keys[0])) == [b"0", b"1"]
    assert redis.client.hstrlen(keys[0], "0") == 64 + NAMESPACE.part_bytes
    assert 0.89 * 86_400 <= redis.client.ttl(keys[0]) <= 86_400
    with kv_store(tmp_path, redis=redis.url) as store:
        async with planner(store) as other:
            assert (await other.session.lookup(hashes)).num_ready == 0
            assert await other.num_remote(hashes) == 70
            assert await other.use([*hashes, *chain("b", 1)]) == 70
            assert (await other.session.lookup(hashes)).num_ready == 70


async def test_prefixes_go_to_redis_from_the_second_hit(one: Planner, redis: RedisServer):
    hashes = chain("a", 3)
    await one.put(hashes)
    assert await one.use(hashes) == 3
    assert await one.use(hashes[:2]) == 2
    await until_stored(redis, hashes[:2])
    assert not redis.client.exists(keys_of(hashes)[2])


async def test_a_damaged_block_in_redis_is_a_miss(one: Planner, redis: RedisServer):
    hashes = chain("a", 4)
    await one.put(hashes, durable=True)
    await until_stored(redis, hashes)
    await flush(one.store)
    key = key_of(NAMESPACE, hashes[2], hashes[0][:8])
    value = bytearray(redis.client.hget(key, "1") or b"")
    value[1000] ^= 1
    redis.client.hset(key, "1", bytes(value))
    assert await one.use(hashes) == 2
    redis.client.hdel(key_of(NAMESPACE, hashes[1], hashes[0][:8]), "0")
    await flush(one.store)
    assert await one.use(hashes) == 1


async def test_another_blocks_bytes_are_a_miss(one: Planner, redis: RedisServer):
    """A dropped error, a mixed-up answer: whole and sound, but of something else."""
    hashes = chain("a", 2)
    await one.put(hashes, durable=True)
    await until_stored(redis, hashes)
    await flush(one.store)
    wrong = redis.client.hgetall(key_of(NAMESPACE, hashes[0], hashes[0][:8]))
    redis.client.hset(key_of(NAMESPACE, hashes[1], hashes[0][:8]), mapping=wrong)
    assert await one.use(hashes) == 1


async def test_with_a_key_only_what_is_signed_counts(tmp_path: Path, one: Planner, redis: RedisServer):
    """The store logs in as an ACL user, whose password is in a file."""
    hashes, signed = chain("a", 2), chain("signed", 2)
    await one.put(hashes, durable=True)
    await until_stored(redis, hashes)
    redis.client.acl_setuser("kv", enabled=True, passwords=["+pass word"], keys=["albireo:*"], categories=["+@all"])
    (tmp_path / "password").write_text("pass word\n")
    (tmp_path / "key").write_bytes(b"secret" * 4)
    flags = {"redis_password_file": tmp_path / "password", "redis_mac_key_file": tmp_path / "key"}
    with kv_store(tmp_path, redis=redis.url.replace("unix://", "unix://kv@"), **flags) as store:
        async with planner(store) as strict:
            assert await strict.num_remote(hashes) == 2
            assert await strict.use(hashes) == 0
            await strict.put(signed, durable=True)
            await until_stored(redis, signed)
            await flush(store)
            assert await strict.use(signed) == 2
            key = key_of(NAMESPACE, signed[1], signed[0][:8])
            value = redis.client.hget(key, "0")
            redis.client.hset(key, "0", value[:-32] + bytes(32))
            await flush(store)
            assert await strict.use(signed) == 1


async def test_a_frozen_redis_is_a_miss_within_the_deadline(one: Planner, redis: RedisServer):
    """And look-ups of what the arena has do not feel it."""
    hashes, here = chain("a", 4), chain("b", 4)
    await one.put(hashes, durable=True)
    await until_stored(redis, hashes)
    await flush(one.store)
    await one.put(here)
    redis.send_signal(signal.SIGSTOP)
    try:
        started = time.monotonic()
        waiting = asyncio.create_task(one.use(hashes, wait_s=0.4))
        num_lookups = 0
        while not waiting.done():
            assert (await one.session.lookup(here)).num_ready == 4
            num_lookups += 1
        assert await waiting == 0
        assert time.monotonic() - started < 2.0
        assert num_lookups > 10
    finally:
        redis.send_signal(signal.SIGCONT)

    async def is_back() -> bool:
        return await one.use(hashes) == 4

    await until(is_back, "Redis is back, its blocks are not")


async def test_redis_killed_in_mid_transfer_is_a_miss(directory: Path, one: Planner, redis: RedisServer):
    hashes = chain("a", 200)
    await one.put(hashes, durable=True)
    await until_stored(redis, hashes)
    await flush(one.store)
    acquiring = [asyncio.create_task(one.use(hashes[:num], wait_s=3.0)) for num in (50, 200)]
    await one.session.lookup(hashes)  # the store has seen them
    redis.process.kill()
    assert all(0 <= num <= 200 for num in await asyncio.gather(*acquiring))
    # What came is there; what did not is gone, and may be written again.
    assert (await one.session.lookup(hashes)).num_pending == 0
    await one.put(hashes, durable=True)
    assert await one.use(hashes) == 200


async def test_a_killed_worker_is_replaced_and_nothing_stays_pinned(one: Planner, redis: RedisServer):
    hashes = chain("a", 100)
    await one.put(hashes, durable=True)
    await until_stored(redis, hashes)
    await flush(one.store)
    worker = worker_of(one.store)
    acquiring = asyncio.create_task(one.use(hashes, wait_s=1.0))
    await one.session.lookup(hashes)
    one.store.send_signal(worker, signal.SIGKILL)
    assert 0 <= await acquiring <= 100

    async def is_back() -> bool:
        return worker_of(one.store) != worker and await one.use(hashes) == 100

    await until(is_back, "the new worker does not work")


def worker_of(store: Service) -> int:
    """0 while there is none."""
    return next(iter(store.pids("kvstore_svc", "redis-worker")), 0)


async def test_what_redis_cannot_take_in_time_is_dropped(one: Planner, redis: RedisServer):
    """What waits for Redis pins a quarter of the arena at most; the rest is not written, and nobody waits for it."""
    redis.send_signal(signal.SIGSTOP)
    try:
        for i in range(9):  # 7.5 MB of 8 MiB
            await one.put(chain(f"c{i}", 100), durable=True)
            await one.session.lookup(chain("c0", 1))  # what was sent before has been seen
            assert (await stats_of(one.store)).pinned_bytes <= 2 * MIB
    finally:
        redis.send_signal(signal.SIGCONT)

    async def has_settled() -> bool:
        return (await stats_of(one.store)).pinned_bytes == 0

    await until(has_settled, "writes stay pinned")
    assert redis.client.dbsize() <= 2 * MIB // NAMESPACE.frame_bytes + 10  # and probes


@pytest.mark.soak
async def test_a_cluster_keeps_a_chain_together(tmp_path: Path):
    """64 blocks in a row are on one node; the store finds them wherever that is."""
    hashes = chain("a", 130)
    with redis_cluster(tmp_path / "redis") as url:
        for name in ("one", "two"):
            with kv_store(tmp_path / name, redis=url, redis_cluster=True) as store:
                async with planner(store) as one:
                    if name == "one":
                        await one.put(hashes, durable=True)

                        async def are_stored(one: Planner = one) -> bool:
                            await flush(one.store)
                            return await one.num_remote(hashes) == 130

                        await until(are_stored, "the blocks are not in Redis")
                    assert await one.use(hashes) == 130
    keys = keys_of(hashes)
    slots = [key_slot(key.encode()) for key in keys]
    assert [len(set(slots[i : i + 64])) for i in (0, 64, 128)] == [1, 1, 1]


def test_the_breaker_lets_one_through_after_a_pause():
    breaker = Breaker()
    for _ in range(3):
        assert breaker.lets_through(10.0)
        breaker.failed(10.0)
    assert not breaker.lets_through(10.4)
    assert breaker.lets_through(10.5)
    assert not breaker.lets_through(10.6), "one at a time"
    breaker.failed(11.0)
    assert not breaker.lets_through(11.9), "the pause doubles"
    assert breaker.lets_through(12.0)
    breaker.succeeded()
    assert breaker.lets_through(12.0)
    assert breaker.lets_through(12.0)
