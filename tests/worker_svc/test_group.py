"""A worker group as real processes, driven over its plan stream."""

import signal
from pathlib import Path

import grpc
import pytest
from group_driver import collect, send_plans, true_output
from grpc_health.v1 import health_pb2, health_pb2_grpc

from scheduler_svc.planner.group import GroupLink
from services import process, wait_until_serving, worker_group


@pytest.mark.parametrize("tp", [1, 2, 4])
async def test_plans_run_in_order_on_all_ranks(tmp_path: Path, stub_model: Path, tp: int):
    """Prefill, then decodes sent ahead of their results: the tokens are the true ones."""
    with worker_group(tmp_path, stub_model, engine="stub", tp=tp) as address:
        link = GroupLink(address)
        info = (await link.wait_until_ready()).info
        assert (info.tp_size, info.engine, info.vocab_size) == (tp, "stub", 1003)
        stream = link.open()
        send_plans(stream, 1, 10)
        assert await collect(stream, 10) == true_output(10)
        await link.close()


def rank_pids(parent: int) -> list[int]:
    """The child processes of a group's supervisor, in order of start."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


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
        (["--tp", "-1"], "must not be negative"),
        (["--quantize", "w8a8"], "compiled kernels do that, on a CPU"),
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
