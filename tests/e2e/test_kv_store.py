"""The KV store behind real services: swapped sequences and stored prefixes, at any TP degree; every token is exact."""

import asyncio
import contextlib
import random
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from albireo.rpc import make_channel
from albireo.v1 import generation_pb2_grpc as rpc
from kv_stores import kv_store, redis_server, stats_of, until, until_idle
from load import EMPTY, Answer, Case, fixed_case, random_tokens, run_case, wait_for_metrics, wait_until
from needs import needs_redis
from services import Service, fixed_ports, process, read_metrics, scheduler_service, worker_service

pytestmark = pytest.mark.e2e

NUM_BLOCKS = 48
NUM_SHARED = 512


@dataclass(frozen=True)
class Served:
    """A scheduler with a group of stub ranks and a store."""

    scheduler: Service
    metrics_port: int
    group: Service

    @property
    def target(self) -> str:
        return self.scheduler.address

    def metric(self, name: str) -> float:
        return read_metrics(self.metrics_port)[f"albireo_kv_{name}"]


@contextlib.contextmanager
def serve(
    directory: Path, model: Path, store: Service, tp: int, num_blocks: int = 0, **flags: object
) -> Iterator[Served]:
    """``num_blocks`` 0: as many as are needed. The store's ``run_dir`` may hold a store that is still to come."""
    pool_gib = num_blocks * 32 * (8 // tp) * 8 / 2**30
    limits = {"max_num_seqs": 16, "max_model_len": 1024, "kv_cache_gib": pool_gib}
    arena, ports = f"unix:{store.run_dir}/kv-arena.sock", fixed_ports(2)
    more = {"kv_store": store.address, "metrics_port": ports + 1, **flags}
    with (
        worker_service(directory / "g", model, engine="stub", tp=tp, kv_store=arena, **limits) as group,
        scheduler_service(directory / "s", model, group.address, port=ports, **more) as scheduler,
    ):
        yield Served(scheduler, ports + 1, group)


async def ask(target: str, *cases: Case) -> list[int]:
    """Runs them at once; returns how many tokens of each were cached."""
    answers = [Answer(case) for case in cases]
    async with make_channel(target) as channel:
        await asyncio.gather(*(run_case(rpc.GenerationStub(channel), answer) for answer in answers))
    return [answer.finish.usage.cached_tokens for answer in answers if answer.finish is not None]


def long_cases(seed: str, num: int) -> list[Case]:
    rng = random.Random(seed)
    return [fixed_case(random_tokens(rng, rng.randrange(30, 200)), rng.randrange(100, 250)) for _ in range(num)]


async def until_released(store: Service) -> None:
    """The store holds nothing any more for sequences that have ended."""

    async def is_released() -> bool:
        return (await stats_of(store)).pinned_bytes == 0

    await until(is_released, "blocks of sequences that have ended are pinned")


@pytest.mark.parametrize("tp", [pytest.param(1, marks=pytest.mark.soak), 4])
async def test_swapped_sequences_go_on_exactly(tmp_path: Path, stub_model: Path, tp: int):
    """A pool for a few of them, so that they take turns: what was computed comes back from the store."""
    with (
        kv_store(tmp_path / "kv", arena_gib=64 / 1024) as store,
        serve(tmp_path, stub_model, store, tp, NUM_BLOCKS, swap="always") as served,
    ):
        await ask(served.target, *long_cases("swap", 16))
        assert read_metrics(served.metrics_port)["albireo_preemptions_total"] > 0
        assert served.metric("blocks_out_total") > 0
        assert served.metric("blocks_in_total") > 0
        await wait_for_metrics(served.metrics_port, EMPTY)
        await until_released(store)


async def test_a_rank_and_the_store_die_while_sequences_are_swapped(tmp_path: Path, stub_model: Path):
    """Whoever waits for their blocks computes them; a store that comes back is used again."""
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(kv_store(tmp_path / "kv", arena_gib=64 / 1024))
        served = stack.enter_context(serve(tmp_path, stub_model, store, 2, NUM_BLOCKS, swap="always"))
        asking = asyncio.create_task(ask(served.target, *long_cases("faults", 20)))
        await wait_until(lambda: served.metric("blocks_in_total") > 0, "blocks are swapped in")
        (rank,) = served.group.pids("--rank", "1")
        served.group.send_signal(rank, signal.SIGKILL)
        name = "albireo_recoveries_total"
        await wait_until(lambda: read_metrics(served.metrics_port)[name] > 0, "the group is back")
        store.process.kill()
        await asking
        assert served.metric("store_connected") == 0
        store = stack.enter_context(kv_store(tmp_path / "kv", arena_gib=64 / 1024))
        await wait_until(lambda: served.metric("store_connected") == 1, "the new store is found")
        num_out = served.metric("blocks_out_total")
        await ask(served.target, *long_cases("after", 8))
        assert served.metric("blocks_out_total") > num_out
        await wait_for_metrics(served.metrics_port, EMPTY)
        await until_released(store)


@contextlib.asynccontextmanager
async def frozen_in_mid_transfer(served: Served) -> AsyncIterator[None]:
    """A rank stands still, and blocks are on their way that do not arrive without it."""
    (rank,) = served.group.pids("--rank", "1")
    is_moving = False
    while not is_moving:
        served.group.send_signal(rank, signal.SIGSTOP)
        try:
            is_moving = served.metric("queued_bytes") > 0
            if is_moving:
                yield
        finally:
            served.group.send_signal(rank, signal.SIGCONT)
        await asyncio.sleep(0)  # clients read


async def test_the_planner_is_killed_in_the_middle_of_transfers(tmp_path: Path, stub_model: Path):
    """Its successor goes on with every sequence, and nobody holds anything for the dead one."""
    with kv_store(tmp_path / "kv", arena_gib=64 / 1024) as store:
        with serve(tmp_path, stub_model, store, 2, NUM_BLOCKS, swap="always") as served:
            asking = asyncio.create_task(ask(served.target, *long_cases("planner", 16)))
            await wait_until(lambda: served.metric("blocks_in_total") > 0, "blocks are swapped in")
            (planner,) = served.scheduler.pids("scheduler_svc", "planner")
            async with frozen_in_mid_transfer(served):
                assert (await stats_of(store)).pinned_bytes > 0
                served.scheduler.send_signal(planner, signal.SIGKILL)
            assert not asking.done()
            await asking
            await wait_for_metrics(served.metrics_port, EMPTY)
            await until_released(store)
            stats = await stats_of(store)
            assert (stats.num_sessions, stats.num_ranks, stats.quarantined_bytes) == (1, 2, 0)
        await until_idle(store)


async def test_a_prefix_that_one_group_computed_is_another_groups_at_another_tp_degree(
    tmp_path: Path, stub_model: Path
):
    """Of the same tenant; what another tenant says is computed, word by word."""
    prefix = random_tokens(random.Random("prefix"), NUM_SHARED)
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(range(32)))
    flags = {"swap": "always", "kv_secret_file": secret}
    with kv_store(tmp_path / "kv", arena_gib=64 / 1024) as store:
        with serve(tmp_path / "one", stub_model, store, 1, **flags) as served:
            assert await ask(served.target, fixed_case([*prefix, 7], 9, "a")) == [0]
            await wait_until(lambda: served.metric("blocks_out_total") >= NUM_SHARED // 32, "the prefix is stored")
        with serve(tmp_path / "two", stub_model, store, 2, **flags) as served:
            assert await ask(served.target, fixed_case([*prefix, 8], 9, "a")) == [NUM_SHARED]
            assert await ask(served.target, fixed_case([*prefix, 8], 9, "b")) == [0]
            assert served.metric("blocks_in_total") == NUM_SHARED // 32


@needs_redis
async def test_a_prefix_outlives_everything_but_redis(tmp_path: Path, stub_model: Path):
    """It goes to Redis when it is used again and again, and comes back from there into a new store, for a new group."""
    prefix = random_tokens(random.Random("redis"), NUM_SHARED)
    with redis_server(tmp_path / "redis") as redis:
        flags = {"arena_gib": 64 / 1024, "redis": redis.url}
        with (
            kv_store(tmp_path / "kv-1", **flags) as store,
            serve(tmp_path / "one", stub_model, store, 2, swap="always") as served,
        ):
            assert await ask(served.target, fixed_case([*prefix, 7], 9)) == [0]
            await wait_until(lambda: served.metric("blocks_out_total") >= NUM_SHARED // 32, "the prefix is stored")
            for own in (8, 9):
                assert await ask(served.target, fixed_case([*prefix, own], 9)) == [NUM_SHARED]
            await wait_until(lambda: redis.client.dbsize() >= NUM_SHARED // 32, "Redis has it")
        with (
            kv_store(tmp_path / "kv-2", **flags) as store,
            serve(tmp_path / "two", stub_model, store, 1, swap="always") as served,
        ):
            assert await ask(served.target, fixed_case([*prefix, 10], 9)) == [NUM_SHARED]
            assert served.metric("blocks_in_total") == NUM_SHARED // 32


async def test_serve_starts_a_store_and_uses_it(short_path: Path, stub_model: Path):
    """The same topology without containers. What a group has forgotten in its death comes back from the store."""
    run_dir, ready, ports = short_path / "run", short_path / "ready", fixed_ports(5)
    target = f"127.0.0.1:{ports}"
    argv = ["albireo", "serve", str(stub_model), "--engine", "stub", "--port", str(ports), "--run-dir", str(run_dir)]
    argv += ["--metrics-port", str(ports + 1), "--ready-file", str(ready), "--kv-store-gib", "0.06", "--swap", "always"]
    case = fixed_case(random_tokens(random.Random("serve"), 200), 9)
    with process(argv, short_path / "serve.log") as served:
        await wait_until(ready.exists, "it serves")
        await wait_until(lambda: read_metrics(ports + 1)["albireo_kv_store_connected"] == 1, "the store is found")
        assert await ask(target, case) == [0]
        await wait_until(lambda: read_metrics(ports + 1)["albireo_kv_blocks_out_total"] == 6, "the prompt is stored")
        whole = Service(target, served, run_dir)
        whole.send_signal(whole.pids("--rank", "0")[0], signal.SIGKILL)
        await wait_until(lambda: read_metrics(ports + 1)["albireo_recoveries_total"] == 1, "the group is back")
        assert await ask(target, case) == [192]
