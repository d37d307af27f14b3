"""A group outlives the loss of any of its ranks, at any moment: the others keep their processes and their weights."""

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import pytest
from group_driver import Ranks, send_plans, true_output
from grpc_health.v1 import health_pb2, health_pb2_grpc

from albireo.errors import GroupUnavailable
from albireo.v1 import plan_pb2
from checkpoints import make_checkpoint
from scheduler_svc.planner.group import GroupLink
from services import free_port, read_metrics


async def lose_one(ranks: Ranks, victim: int, lose: Callable[[int], Awaitable[None]]) -> None:
    """Loses a rank and waits until the group is complete again; the others must be the same processes."""
    pids, formings = ranks.pids, ranks.count(0, "group is ready")
    await lose(victim)
    await ranks.wait_until_ready(formings + 1)
    assert [rank for rank in range(ranks.tp) if ranks.pids[rank] != pids[rank]] == [victim]
    assert all(process.poll() is None for process in ranks.processes.values())


@pytest.mark.parametrize("tp", [2, 4])
async def test_a_group_outlives_each_of_its_ranks(tmp_path: Path, stub_model: Path, tp: int):
    with Ranks(tmp_path, stub_model, tp, engine="stub") as ranks:

        async def kill(rank: int) -> None:
            ranks.restart(rank)

        assert await ranks.generate(5) == true_output(5)
        link = GroupLink(ranks.address)
        info = (await link.status()).info
        for victim in range(tp):
            await lose_one(ranks, victim, kill)
            assert await ranks.generate(5) == true_output(5)
            assert (await link.status()).info == info
        await link.close()
        assert [ranks.count(rank, "weights are loaded") for rank in range(tp)] == [2] * tp


@pytest.mark.parametrize("victim", [0, 1])
async def test_steps_under_way_end_the_stream_with_the_reason(tmp_path: Path, stub_model: Path, victim: int):
    """UNAVAILABLE, and health says that nothing is served, until the group has formed again."""
    with Ranks(tmp_path, stub_model, 2, engine="stub", stub_step_ms=300) as ranks:
        link = GroupLink(ranks.address)
        await link.wait_until_ready()
        stream = link.open()
        send_plans(stream, 1, 10)
        running = asyncio.create_task(stream.run(lambda: None, lambda _: None))
        await asyncio.sleep(0.5)
        ranks.kill(victim)
        killed_at = time.monotonic()
        with pytest.raises(GroupUnavailable, match="UNAVAILABLE" if victim == 0 else r"UNAVAILABLE.*rank 1 is gone"):
            await asyncio.wait_for(running, 5)
        assert time.monotonic() - killed_at < 2
        if victim == 1:
            status = await link.status()
            assert (status.state, status.epoch) == (plan_pb2.GroupStatus.STATE_LOADING, 1)
            assert (status.stage, status.num_queued) == ("meeting the other ranks", 0)
            with grpc.insecure_channel(ranks.address) as channel:
                answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        ranks.start(victim)
        assert await ranks.generate(3) == true_output(3)
        await link.close()


async def test_a_frozen_rank_that_is_killed(tmp_path: Path, stub_model: Path):
    """While it is frozen, the others give up on the step after 3 s and wait for it in the next meeting."""
    with Ranks(tmp_path, stub_model, 2, engine="stub") as ranks:

        async def freeze(rank: int) -> None:
            ranks.signal(rank, signal.SIGSTOP)
            with contextlib.suppress(GroupUnavailable, TimeoutError):
                await asyncio.wait_for(ranks.generate(3), 4)
            ranks.restart(rank)

        for victim in (1, 0):
            assert await ranks.generate(3) == true_output(3)
            await lose_one(ranks, victim, freeze)
            assert await ranks.generate(3) == true_output(3)


async def test_a_rank_that_wakes_up_comes_back(tmp_path: Path, stub_model: Path):
    """Nobody was killed: a freeze that is shorter than the supervisor's patience."""
    with Ranks(tmp_path, stub_model, 2, engine="stub") as ranks:
        assert await ranks.generate(3) == true_output(3)
        pids = ranks.pids
        for rank in (1, 0):
            ranks.signal(rank, signal.SIGSTOP)
            with contextlib.suppress(GroupUnavailable, TimeoutError):
                await asyncio.wait_for(ranks.generate(3), 3.5)
            ranks.signal(rank, signal.SIGCONT)
            assert await ranks.generate_until_it_works(3) == true_output(3)
        assert ranks.pids == pids


async def test_a_group_whose_device_is_but_a_clock(tmp_path: Path, stub_model: Path):
    """Ranks that do not compute together miss each other all the same: dead or frozen, leader or not."""
    with Ranks(tmp_path, stub_model, 2, engine="stub", stub_mode="clock", stub_step_ms=5) as ranks:

        async def kill(rank: int) -> None:
            ranks.restart(rank)

        async def freeze(rank: int) -> None:
            ranks.signal(rank, signal.SIGSTOP)
            with contextlib.suppress(GroupUnavailable, TimeoutError):
                await asyncio.wait_for(ranks.generate(3), 4)
            ranks.restart(rank)

        tokens = await ranks.generate(5)
        for victim, lose in ((1, kill), (0, kill), (1, freeze), (0, freeze)):
            await lose_one(ranks, victim, lose)
            assert await ranks.generate(5) == tokens
        assert "rank 1 has not launched step" in ranks.logs()


async def test_a_leader_that_dies_again_and_again(tmp_path: Path, stub_model: Path):
    with Ranks(tmp_path, stub_model, 4, engine="stub") as ranks:
        await ranks.wait_until_ready(1)
        pids = ranks.pids[1:]
        for pause_s in (0.0, 0.4, 0.8, 1.2, 1.6):
            await asyncio.sleep(pause_s)
            ranks.restart(0)
        assert await ranks.generate_until_it_works(5) == true_output(5)
        assert ranks.pids[1:] == pids


@pytest.mark.parametrize("seed", range(3))
async def test_ranks_that_die_at_any_moment(tmp_path: Path, stub_model: Path, seed: int):
    """Two breaks in quick succession, deaths in the midst of forming, deaths of several: a group forms in the end."""
    generator = random.Random(seed)
    with Ranks(tmp_path, stub_model, 4, engine="stub") as ranks:
        for _ in range(6):
            for victim in generator.sample(range(4), generator.choice([1, 1, 2, 3])):
                ranks.restart(victim)
                await asyncio.sleep(generator.choice([0.0, 0.01, 0.5, 1.0]))
            if generator.random() < 0.5:
                formings = ranks.count(0, "group is ready")
                with contextlib.suppress(AssertionError):
                    await ranks.wait_until_ready(formings + 1, timeout_s=generator.choice([1.0, 3.0]))
        assert await ranks.generate_until_it_works(5) == true_output(5)


async def test_formings_are_counted(tmp_path: Path, stub_model: Path):
    port = free_port()
    with Ranks(tmp_path, stub_model, 2, engine="stub", metrics_port=port) as ranks:
        await ranks.wait_until_ready(1)
        ranks.restart(1)
        await ranks.wait_until_ready(2)
        assert read_metrics(port)["albireo_worker_formings_total"] == 2


async def test_a_step_that_does_not_end_ends_the_rank(tmp_path: Path, stub_model: Path):
    with Ranks(tmp_path, stub_model, 1, engine="stub", stub_step_ms=60_000, step_timeout=1) as ranks:
        with pytest.raises((GroupUnavailable, TimeoutError)):
            await asyncio.wait_for(ranks.generate(1), 20)
        assert ranks.processes[0].wait(5) == 1
        assert ranks.count(0, "this rank is stuck and ends") == 1


@pytest.mark.parametrize("after", ["at once", "while it waits for the leader", "when the group is ready"])
def test_sigterm_at_any_moment(tmp_path: Path, stub_model: Path, after: str):
    async def until(ranks: Ranks) -> None:
        if after == "while it waits for the leader":
            ranks.kill(0)
            await ranks.wait_for(1, "weights are loaded", 1)
            await asyncio.sleep(0.3)
        elif after == "when the group is ready":
            await ranks.wait_until_ready(1)

    with Ranks(tmp_path, stub_model, 2, engine="stub") as ranks:
        asyncio.run(until(ranks))
        alive = [process for process in ranks.processes.values() if process.poll() is None]
        start = time.monotonic()
        for process in alive:
            process.terminate()
        # Before Python code runs that could say otherwise, the signal itself ends the process.
        allowed = {0, -signal.SIGTERM} if after == "at once" else {0}
        assert all(process.wait(10) in allowed for process in alive)
        assert time.monotonic() - start < 5


@pytest.mark.parametrize("flags", [{}, {"eager": True}], ids=["compiled", "eager"])
async def test_ranks_of_a_real_model_keep_their_weights(tmp_path: Path, flags: dict[str, bool]):
    """Tokens are the same before and after the loss of each rank, and those that stay load nothing again."""
    checkpoint = make_checkpoint(tmp_path / "model", "qwen3")
    with Ranks(tmp_path, checkpoint, 2, device="cpu", max_model_len=256, **flags) as ranks:

        async def kill(rank: int) -> None:
            ranks.restart(rank)

        tokens = await ranks.generate(12)
        assert len(set(tokens)) > 1
        for victim in (1, 0):
            await lose_one(ranks, victim, kill)
            assert await ranks.generate(12) == tokens
        assert [ranks.count(rank, "weights are loaded") for rank in range(2)] == [2, 2]
