"""Ranks on other hosts: the same parts by the store's Data stream, under the same lease."""

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest

from albireo.kv.arena import LocalArena, PartCopy
from albireo.kv.part import PartName
from albireo.kv.remote import RemoteArena
from kv_stores import (
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
from services import Service


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with kv_store(tmp_path_factory.mktemp("kv")) as service:
        yield service


async def test_parts_by_data_are_the_arenas(store: Service):
    """Written by one way and read by the other. What the lease does not cover is refused, part by part."""
    async with kv_session(store, "a", 1) as session:
        local = LocalArena.attach(session.lease)
        remote = await asyncio.to_thread(RemoteArena, store.address, session.lease.lease, asyncio.get_running_loop())
        hashes = chain("a", 40)
        reserved = await session.reserve(hashes)
        assert not any(await asyncio.to_thread(read_blocks, remote, hashes, reserved.offsets)), "reserved, not pinned"
        assert all(await asyncio.to_thread(write_blocks, remote, hashes, reserved.offsets))
        session.commit(reserved.hold, [True] * 40)
        acquired = await session.acquire(hashes)
        assert all(read_blocks(local, hashes, acquired.offsets))
        assert all(await asyncio.to_thread(read_blocks, remote, hashes, acquired.offsets))
        assert not any(await asyncio.to_thread(write_blocks, remote, hashes, acquired.offsets)), "pinned, not reserved"
        assert all(read_blocks(local, hashes, acquired.offsets))

        pieces = [[np.zeros(NAMESPACE.part_bytes, dtype=np.uint8) for _ in range(2)]]
        good = copies_of(hashes[:1], acquired.offsets, pieces)
        too_long = [np.zeros(NAMESPACE.part_bytes + 64, dtype=np.uint8)]
        bad = [
            PartCopy(good[0].offset + 64, good[0].name, good[0].pieces),
            PartCopy(1 << 40, good[0].name, good[0].pieces),
            PartCopy(good[0].offset, good[0].name, too_long),
            PartCopy(good[0].offset, PartName(NAMESPACE.fingerprint, hashes[1], 0), good[0].pieces),
        ]
        assert await asyncio.to_thread(remote.read, [*bad, *good]) == [False] * 4 + [True] * 2
        assert not remote.is_lost

        session.release(acquired.hold)
        await session.lookup(hashes)
        assert not any(await asyncio.to_thread(read_blocks, remote, hashes, acquired.offsets)), "released"
        local.close()
        await asyncio.to_thread(remote.close)
    await until_idle(store)
    await flush(store)


async def test_a_lease_that_has_ended_is_lost(store: Service):
    async with kv_session(store, "b", 1) as session:
        local = LocalArena.attach(session.lease)
        remote = await asyncio.to_thread(RemoteArena, store.address, session.lease.lease, asyncio.get_running_loop())
        await put(session, local, chain("b", 2))
        acquired = await session.acquire(chain("b", 2))
        assert all(await asyncio.to_thread(read_blocks, remote, chain("b", 2), acquired.offsets))
        await session.close()
        local.close()

        async def has_ended() -> bool:
            return (await stats_of(store)).num_sessions == 0

        await until(has_ended, "the session goes on")
        assert not any(await asyncio.to_thread(read_blocks, remote, chain("b", 2), acquired.offsets))
        assert remote.is_lost
        copies = copies_of(chain("b", 1), acquired.offsets, [contents(chain("b", 1)[0])])
        assert await asyncio.to_thread(remote.write, copies) == [False, False]
        await asyncio.to_thread(remote.close)
