"""Real groups move blocks beside their steps, and outlive what breaks meanwhile: a rank, the store, the planner."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
import pytest
from arena_server import ArenaServer, places, transfer
from group_driver import PROMPT, Ranks, true_output

from albireo.arrays import EMPTY_INT32
from albireo.errors import GroupUnavailable
from albireo.exposure import analyse, read_pages
from albireo.kv.fingerprint import Namespace
from albireo.kv.session import open_session
from albireo.plan import NewSequence, Rows, StepPlan, StepResult
from albireo.rpc import make_channel
from albireo.transfers import KvLease, Transfer, TransferKind, TransferResult
from albireo.v1 import ledger_pb2, plan_pb2
from scheduler_svc.planner.group import GroupLink
from services import free_port, process, wait_until_serving

NUM_PARTS, PART_BYTES = 8, 256  # of the stub
STORE, LOAD = TransferKind.STORE, TransferKind.LOAD
WAIT_S = 30


class Planner:
    """One plan stream, step by step. A context manager."""

    def __init__(self, link: GroupLink, epoch: int, first_step: int = 0) -> None:
        self._stream = link.open()
        self.epoch = epoch
        self._next_step = first_step
        self._steps: asyncio.Queue[StepResult] = asyncio.Queue()
        self._transfers: asyncio.Queue[TransferResult] = asyncio.Queue()

    async def __aenter__(self) -> "Planner":
        self._begun = asyncio.Event()
        self._running = asyncio.create_task(self._stream.run(self._begun.set, self._take))
        return self

    async def __aexit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)

    def begin(self, table: list[int], num_computed: int = 0, *transfers: Transfer) -> int:
        """Plans the step that computes PROMPT, or the rest of it, in slot 0; its id."""
        new = NewSequence(0, PROMPT, len(PROMPT), num_computed, np.array(table, np.int32), plan_pb2.Sampling(top_p=1))
        rows = Rows(np.zeros(1, np.int32), np.array([len(PROMPT) - num_computed], np.int32), np.ones(1, np.bool_))
        return self._send(StepPlan(self.epoch, self._next_step, rows, new_sequences=(new,), transfers=transfers))

    def decode(self, *transfers: Transfer) -> int:
        return self._send(StepPlan(self.epoch, self._next_step, None, transfers=transfers))

    def move(self, *transfers: Transfer) -> None:
        """Sends transfers alone."""
        plan = StepPlan(self.epoch, self._next_step, None, EMPTY_INT32, transfers=transfers, only_transfers=True)
        self._stream.send(plan)

    async def has_begun(self) -> None:
        await asyncio.wait_for(self._begun.wait(), WAIT_S)

    async def token(self) -> int:
        return int((await self._get(self._steps)).token_ids[0])

    async def moved(self) -> TransferResult:
        return await self._get(self._transfers)

    async def ended(self) -> str:
        """How the stream ends."""
        with pytest.raises(GroupUnavailable) as raised:
            await asyncio.wait_for(asyncio.shield(self._running), WAIT_S)
        return str(raised.value)

    def _send(self, plan: StepPlan) -> int:
        self._stream.send(plan)
        self._next_step += 1
        return plan.step_id

    def _take(self, result: StepResult) -> None:
        assert result.epoch == self.epoch
        if not result.only_transfers:
            self._steps.put_nowait(result)
        for moved in result.transfers:
            self._transfers.put_nowait(moved)

    async def _get(self, queue):  # type: ignore[no-untyped-def]
        getting = asyncio.create_task(queue.get())
        await asyncio.wait({getting, self._running}, timeout=WAIT_S, return_when=asyncio.FIRST_COMPLETED)
        if not getting.done():
            getting.cancel()
            self._running.result()
        return getting.result()


def move(kind: TransferKind, blocks: list[int], lease: KvLease, after_step: int = -1, first: int = 0) -> Transfer:
    names = list(range(first, first + len(blocks)))
    return transfer(kind, blocks, names, places(first, len(blocks), NUM_PARTS, PART_BYTES), lease, after_step)


@asynccontextmanager
async def linked(ranks: Ranks) -> AsyncIterator[GroupLink]:
    """To a group that is ready, on all ranks."""
    link = GroupLink(ranks.address)
    try:
        await asyncio.wait_for(link.wait_until_ready(), WAIT_S)
        yield link
    finally:
        await link.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, stub_model: Path) -> Iterator[tuple[Ranks, ArenaServer]]:
    """A group of two ranks whose modelled steps take 5 ms, and its arena."""
    run_dir = tmp_path_factory.mktemp("group")
    with (
        ArenaServer(run_dir / "arena.sock") as arena,
        Ranks(run_dir, stub_model, 2, engine="stub", kv_store=arena.address, stub_step_ms=5) as ranks,
    ):
        yield ranks, arena


async def begun(link: GroupLink) -> Planner:
    """A planner of the next epoch."""
    return Planner(link, (await link.status()).epoch + 1)


async def test_a_prefix_computed_by_one_group_is_used_by_another(
    shared: tuple[Ranks, ArenaServer], tmp_path: Path, stub_model: Path
):
    """Of two ranks and of one. Exactly: the stub's next tokens depend on every word of the blocks."""
    ranks, arena = shared
    lease = arena.open_lease()
    async with linked(ranks) as link, await begun(link) as planner:
        layout = (await link.status()).info.kv_layout
        assert (layout.num_parts, layout.part_bytes, layout.arena) == (NUM_PARTS, PART_BYTES, arena.address)
        step_id = planner.begin([3, 1])
        planner.decode(move(STORE, [3], lease, after_step=step_id))
        assert (await planner.moved()).succeeded.tolist() == [True]
    with Ranks(tmp_path, stub_model, 1, engine="stub", kv_store=arena.address) as ranks:
        async with linked(ranks) as link, await begun(link) as planner:
            assert (await link.status()).info.kv_layout == layout
            planner.move(move(LOAD, [7], lease))
            result = await planner.moved()
            assert (result.succeeded.tolist(), result.num_bytes) == ([True], NUM_PARTS * PART_BYTES)
            planner.begin([7, 2], 32)
            for _ in range(4):
                planner.decode()
            assert [await planner.token() for _ in range(5)] == true_output(5)


async def test_steps_go_on_beside_transfers_and_none_waits(shared: tuple[Ranks, ArenaServer]):
    """Each of 60 steps has a store or a load of 32 blocks beside it; the ledger says: hidden."""
    ranks, arena = shared
    lease, tokens = arena.open_lease(), []
    async with linked(ranks) as link, await begun(link) as planner:
        last = planner.begin([3, 1, 2, 4])
        for number in range(60):
            others = list(range(100 + 32 * (number % 8), 132 + 32 * (number % 8)))
            last = planner.decode(move((STORE, LOAD)[number % 2], others, lease, last, first=100))
            tokens.append(await planner.token())
        assert tokens == true_output(60)
        results = [await planner.moved() for _ in range(60)]
        assert all(result.succeeded.all() for result in results)
        pages = await link.read_ledger(ledger_pb2.ReadLedgerRequest(num_rows=60))
        for rank in analyse(read_pages(pages.pages)):
            assert rank.tasks["KV"].total_us > 100
            assert rank.tasks["KV"].exposed_us == 0


async def test_damage_in_the_arena_is_told_by_block(shared: tuple[Ranks, ArenaServer]):
    ranks, arena = shared
    lease = arena.open_lease()
    async with linked(ranks) as link, await begun(link) as planner:
        planner.move(move(STORE, [1, 2, 3], lease))
        assert (await planner.moved()).succeeded.all()
        offsets = places(0, 3, NUM_PARTS, PART_BYTES)
        arena.memory.bytes[int(offsets[1, NUM_PARTS - 1]) + 100] ^= 1  # rank 1's
        planner.move(move(LOAD, [4, 5, 6], lease))
        result = await planner.moved()
        assert result.succeeded.tolist() == [True, False, True]
        assert result.num_bytes == (3 + 2) * NUM_PARTS * PART_BYTES // 2


def big_moves(lease: KvLease, num: int) -> list[Transfer]:
    """Stores of 500 blocks each: ever the same ones, so that the arena is written to as long as they run."""
    return [move(STORE, list(range(500)), lease) for _ in range(num)]


async def test_another_planner_finds_all_transfers_ended(shared: tuple[Ranks, ArenaServer]):
    """Those of the planner before fail on both ranks before the stream begins."""
    ranks, arena = shared
    old, new = arena.open_lease(), arena.open_lease()
    async with linked(ranks) as link, await begun(link) as planner:
        planner.move(*big_moves(old, 100))
        await planner.moved()
        async with await begun(link) as successor:
            await successor.has_begun()
            arena.memory.bytes[:] = 0
            successor.begin([3, 1])
            assert await successor.token() == true_output(1)[0]
            successor.move(move(LOAD, [5], new))
            assert (await successor.moved()).succeeded.tolist() == [False]
            assert not arena.memory.bytes.any()


@pytest.mark.parametrize("victim", [1, 0])
async def test_a_rank_killed_in_mid_transfer(victim: int, shared: tuple[Ranks, ArenaServer]):
    """The group breaks, and when it is ready again nobody writes what was planned before."""
    ranks, arena = shared
    lease = arena.open_lease()
    formings = [ranks.count(rank, "group is ready") for rank in range(2)]
    async with linked(ranks) as link, await begun(link) as planner:
        planner.move(*big_moves(lease, 100))
        await planner.moved()
        ranks.kill(victim)
        assert "UNAVAILABLE" in await planner.ended()
        ranks.start(victim)
        for rank in range(2):
            await ranks.wait_for(rank, "group is ready", formings[rank] + 1)
    async with linked(ranks) as link:
        arena.memory.bytes[:] = 0
        async with await begun(link) as planner:
            planner.begin([3, 1])
            assert await planner.token() == true_output(1)[0]
            planner.move(move(STORE, [3], lease, after_step=0, first=900))
            assert (await planner.moved()).succeeded.all()
        first = int(places(900, 1, NUM_PARTS, PART_BYTES)[0, 0])
        assert not arena.memory.bytes[:first].any()
        assert arena.memory.bytes[first:].any()


async def test_transfers_that_do_not_fit_end_the_stream(shared: tuple[Ranks, ArenaServer]):
    """The planner's mistake costs an epoch, not the group."""
    ranks, arena = shared
    async with linked(ranks) as link:
        async with await begun(link) as planner:
            planner.move(move(STORE, [1, 1], arena.open_lease()))
            ended = await planner.ended()
            assert "INTERNAL" in ended
            assert "2 blocks, one twice" in ended
        async with await begun(link) as planner:
            planner.begin([3, 1])
            assert await planner.token() == true_output(1)[0]


async def test_the_store_dies_in_mid_transfer_and_comes_back(tmp_path: Path, stub_model: Path):
    path = tmp_path / "arena.sock"
    with Ranks(tmp_path, stub_model, 1, engine="stub", kv_store=f"unix:{path}") as ranks:
        async with linked(ranks) as link, await begun(link) as planner:
            with ArenaServer(path) as arena:
                planner.move(*big_moves(arena.open_lease(), 100))
                assert (await planner.moved()).succeeded.all()
            results = [await planner.moved() for _ in range(99)]
            assert not results[-1].succeeded.any()
            with ArenaServer(path) as arena:
                lease = arena.open_lease()
                planner.begin([3, 1], 0, move(STORE, [3], lease, after_step=0))
                assert await planner.token() == true_output(1)[0]
                assert (await planner.moved()).succeeded.all()


async def test_ranks_reach_a_store_on_another_host(tmp_path: Path, stub_model: Path):
    """By its address: a planner's session reserves and pins, ranks write and read over the network."""
    address = f"127.0.0.1:{free_port()}"
    log = tmp_path / "kvstore.log"
    argv = ["kvstore_svc", "--listen", address, "--run-dir", str(tmp_path), "--arena-gib", "0.125"]
    with (
        process(argv, log) as child,
        Ranks(tmp_path, stub_model, 2, engine="stub", kv_store=address) as ranks,
    ):
        wait_until_serving(address, child, log)
        async with linked(ranks) as link, await begun(link) as planner, make_channel(address) as channel:
            layout = (await link.status()).info.kv_layout
            namespace = Namespace(layout.fingerprint, layout.num_parts, layout.part_bytes)
            session = await open_session(channel, "planner", planner.epoch, namespace)
            lease = KvLease(session.lease.arena_id, session.lease.arena_bytes, session.lease.lease)
            hashes = [number.to_bytes(32, "little") for number in (5, 6)]
            reserved = await session.reserve(hashes)
            step_id = planner.begin([3, 1])
            planner.decode(transfer(STORE, [3, 1], [5, 6], reserved.offsets, lease, step_id))
            succeeded = (await planner.moved()).succeeded
            assert succeeded.all()
            session.commit(reserved.hold, succeeded.tolist())
            acquired = await session.acquire(hashes)
            planner.move(transfer(LOAD, [7, 8], [5, 6], acquired.offsets, lease))
            assert (await planner.moved()).succeeded.all()
            await planner.token()
            await planner.token()
            planner.begin([7, 2], 32)
            assert await planner.token() == true_output(1)[0]
            await session.close()
