"""A worker group as real processes, driven over its plan stream."""

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from albireo.errors import GroupUnavailable
from albireo.plan import NewSequence, Rows, StepPlan
from albireo.v1 import plan_pb2
from scheduler_svc.planner.group import GroupLink
from services import process, wait_until_serving, worker_group
from worker_svc.stub.truth import true_tokens

PROMPT = np.arange(5, 50, dtype=np.int32)


def start_plan(epoch: int, step_id: int = 0) -> StepPlan:
    """A plan that computes all of PROMPT in slot 0."""
    new = NewSequence(0, PROMPT, len(PROMPT), 0, np.array([3, 1], dtype=np.int32), plan_pb2.Sampling(top_p=1))
    rows = Rows(np.zeros(1, np.int32), np.array([len(PROMPT)], dtype=np.int32), np.ones(1, dtype=bool))
    return StepPlan(epoch, step_id, rows, new_sequences=(new,))


async def collect(link: GroupLink, num: int) -> list[int]:
    """Sampled tokens of the next ``num`` results."""
    results: asyncio.Queue = asyncio.Queue()
    running = asyncio.create_task(link.run(results.put_nowait))
    try:
        return [int((await asyncio.wait_for(results.get(), 20)).token_ids[0]) for _ in range(num)]
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


@pytest.mark.parametrize("tp", [1, 2, 4])
async def test_plans_run_in_order_on_all_ranks(tmp_path: Path, stub_model: Path, tp: int):
    """Prefill, then decodes sent ahead of their results: the tokens are the true ones."""
    with worker_group(tmp_path, stub_model, engine="stub", tp=tp) as address:
        link = GroupLink(address)
        info = (await link.wait_until_ready()).info
        assert (info.tp_size, info.engine, info.vocab_size) == (tp, "stub", 1003)
        for plan in [start_plan(1), *(StepPlan(1, step, None) for step in range(1, 10))]:
            link.send(plan)
        tokens = await collect(link, 10)
        await link.close()
    assert tokens == true_tokens(PROMPT, plan_pb2.Sampling(), frozenset(), 10, 1003).tolist()


async def test_a_broken_stream_is_refused_and_a_new_epoch_heals_the_group(tmp_path: Path, stub_model: Path):
    with worker_group(tmp_path, stub_model, engine="stub", tp=2) as address:
        link = GroupLink(address)
        link.send(start_plan(1))
        link.send(StepPlan(1, 7, None))
        with pytest.raises(GroupUnavailable, match="step 7 where step 1 follows"):
            await link.run(lambda _: None)
        await link.close()

        link = GroupLink(address)
        assert (await link.wait_until_ready()).epoch == 1
        link.send(start_plan(2, step_id=50))
        assert await collect(link, 1) == true_tokens(PROMPT, plan_pb2.Sampling(), frozenset(), 1, 1003).tolist()
        await link.close()


async def test_a_second_planner_takes_over(tmp_path: Path, stub_model: Path):
    with worker_group(tmp_path, stub_model, engine="stub") as address:
        first, second = GroupLink(address), GroupLink(address)
        first.send(start_plan(1))
        ended = asyncio.create_task(first.run(lambda _: None))
        await asyncio.sleep(0.3)
        second.send(start_plan(2))
        assert len(await collect(second, 1)) == 1
        with pytest.raises(GroupUnavailable):
            await asyncio.wait_for(ended, 10)
        await first.close()
        await second.close()


def rank_pids(parent: int) -> list[int]:
    """The child processes of a group's supervisor, in order of start."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_group_within_5_s(tmp_path: Path, stub_model: Path, victim: int):
    """No half-dead group: the supervisor stops the rest, exits non-zero and names the log."""
    address = f"unix:{tmp_path}/group.sock"
    argv = ["worker_svc", "--model", str(stub_model), "--engine", "stub", "--tp", "2", "--listen", address]
    with process([*argv, "--run-dir", str(tmp_path)], tmp_path / "worker.log") as group:
        wait_until_serving(address, group, tmp_path / "worker.log")
        ranks = rank_pids(group.pid)
        os.kill(ranks[victim], signal.SIGKILL)
        killed_at = time.monotonic()
        assert group.wait(10) != 0
        assert time.monotonic() - killed_at < 5
        assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert f"logs/rank-{victim}.log" in (tmp_path / "worker.log").read_text()


def test_sigterm_ends_the_group_in_order(tmp_path: Path, stub_model: Path):
    address = f"unix:{tmp_path}/group.sock"
    argv = ["worker_svc", "--model", str(stub_model), "--engine", "stub", "--tp", "4", "--listen", address]
    with process([*argv, "--run-dir", str(tmp_path)], tmp_path / "worker.log") as group:
        wait_until_serving(address, group, tmp_path / "worker.log")
        ranks = rank_pids(group.pid)
        group.send_signal(signal.SIGTERM)
        assert group.wait(10) == 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tp", "3"], "takes 1, 2, 4 or 8"),
        (["--model", "/nowhere"], "no such directory"),
        (["--tp", "0"], "at least 1"),
        (["--max-num-batched-tokens", "8"], "less than --max-num-seqs 64"),
    ],
)
def test_a_group_that_cannot_start_says_why(tmp_path: Path, stub_model: Path, flags: list[str], message: str):
    argv = ["worker_svc", "--model", str(stub_model), "--engine", "stub", "--run-dir", str(tmp_path)]
    argv += ["--listen", f"unix:{tmp_path}/group.sock", *flags]
    with process(argv, tmp_path / "worker.log") as group:
        assert group.wait(30) != 0
    assert message in (tmp_path / "worker.log").read_text()


def test_health_is_not_serving_while_ranks_are_missing_and_sigterm_ends_the_wait(tmp_path: Path, stub_model: Path):
    """A leader alone waits for its ranks: it must say so, and leave when it is told to."""
    address = f"unix:{tmp_path}/group.sock"
    argv = ["worker_svc", "--model", str(stub_model), "--engine", "stub", "--tp", "2", "--rank", "0"]
    with process([*argv, "--listen", address, "--run-dir", str(tmp_path)], tmp_path / "rank.log") as leader:
        with grpc.insecure_channel(address) as channel:
            request = health_pb2.HealthCheckRequest()
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=20, wait_for_ready=True)
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        leader.send_signal(signal.SIGTERM)
        assert leader.wait(5) == 0
