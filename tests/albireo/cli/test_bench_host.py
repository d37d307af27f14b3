"""``albireo bench host``: its arithmetic on pages made by hand, its report, and what it starts."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from albireo.cli import bench_host, host_window
from albireo.cli.host_services import Services, Setting, stages
from albireo.cli.main import main
from albireo.cli.processes import command_line, cpu_ns, descendants, option
from albireo.cli.run_dir import open_run_dir
from albireo.errors import GroupError
from albireo.exposure import Page
from albireo.ledger import PLANNER_COLUMNS, RANK_COLUMNS

pytestmark = pytest.mark.alone

NUM_STEPS = 100
BEGIN_NS = 10**12
PERIOD_NS = 10_000_000


def pages(gap_ns: int = 100_000) -> list[Page]:
    """Ten milliseconds a step, a gap of 100 us before each; rank 1 is launched later than rank 0."""
    n = np.arange(NUM_STEPS) + 7
    at = BEGIN_NS + np.arange(NUM_STEPS) * PERIOD_NS
    zero, ones = np.zeros_like(n), np.ones_like(n)
    planner = [n, at - 500_000, at - 450_000, at + PERIOD_NS, at + PERIOD_NS, at + PERIOD_NS + 10_000, zero, zero]
    planner += [130_000 * ones, 8 * ones, 39 * ones]
    result = [Page("planner", "here", dict(zip(PLANNER_COLUMNS, planner, strict=True)))]
    for rank in range(3):
        row = [n, at - 400_000, at - 350_000, at - 300_000 + 50_000 * rank, at, at + PERIOD_NS - gap_ns]
        row += [(PERIOD_NS - gap_ns) * ones, zero, zero, zero, 8 * ones, 39 * ones]
        result.append(Page(f"rank-{rank}", "here", dict(zip(RANK_COLUMNS, row, strict=True))))
    return result


def figures(**seen: float) -> dict[str, Any]:
    used = {"planner": 50, "rank-0": 40, "rank-1": 20, "rank-2": 30, "frontend-0": 10, "frontend-1": 5, "worker": 1}
    used_ns = {name: us * 1000 * NUM_STEPS for name, us in used.items()}
    clients = {"num_tokens": 8 * NUM_STEPS, "num_responses": 4 * NUM_STEPS, "duration_s": 1.0, **seen}
    end_ns = BEGIN_NS + NUM_STEPS * PERIOD_NS
    return host_window.figures(pages(), BEGIN_NS, end_ns, used_ns, clients, "stub")


def test_figures_of_a_window() -> None:
    got = figures()
    assert got["num_steps"] == NUM_STEPS
    assert got["step_ms"] == pytest.approx(10, rel=1e-3)
    assert got["rows_per_step"] == 8
    assert got["idle_fraction"] == pytest.approx(0.01, rel=2e-2)
    assert (got["gap_p50_us"], got["gap_p99_us"], got["gap_max_us"]) == pytest.approx((100, 100, 100))
    assert got["planner_logic_cpu_us_per_step"] == 130
    cpu = {name: got[f"{name}_cpu_us_per_step"] for name in ("planner", "leader", "rank", "frontend")}
    assert cpu == pytest.approx({"planner": 50, "leader": 40, "rank": 25, "frontend": 15}, rel=1e-3)
    assert got["cpu_us_per_token"] == pytest.approx(156 / 8)
    assert got["launch_delay_p50_us"] == 200, "of the worst rank"
    assert got["tasks"]["T1"] == {"total_us": pytest.approx(50, rel=0.02), "exposed_us": 0}
    assert "coalescing_factor" not in got, "there are no responses without clients"


def test_latencies_of_clients() -> None:
    got = figures(itl_p50_ms=10.0, itl_p99_ms=12.0, ttft_p50_ms=30.0, ttft_p99_ms=50.0)
    assert got["coalescing_factor"] == 2
    assert (got["itl_p50_ms"], got["itl_p99_ms"], got["ttft_p50_ms"]) == (10, 12, 30)


def test_a_window_without_steps() -> None:
    with pytest.raises(GroupError, match="no step"):
        host_window.figures(pages(), 1, 2, {}, {"num_tokens": 0, "duration_s": 1.0}, "stub")
    with pytest.raises(GroupError, match="ledger"):
        host_window.figures([], 1, 2, {}, {"num_tokens": 0, "duration_s": 1.0}, "stub")


def test_medians() -> None:
    runs = [
        {"a": 1.0, "tasks": {"T1": {"x": 3}}},
        {"a": 5.0, "tasks": {"T1": {"x": 1}}},
        {"a": 2.0, "tasks": {"T1": {"x": 2}}},
    ]
    assert host_window.medians(runs) == {"a": 2.0, "tasks": {"T1": {"x": 2}}}


@pytest.mark.parametrize(
    ("num_idle", "tried", "shortest"),
    [
        (lambda step_ms: 0 if step_ms >= 4 else 3, [10, 7, 5, 4, 3], 4.0),
        (lambda _: 3, [10], None),
        (lambda _: 0, list(bench_host.LADDER_MS), 1.5),
        (lambda step_ms: 1 if step_ms >= 3 else 2, [10, 7, 5, 4, 3, 2.5], 3.0),
    ],
)
def test_the_shortest_step(
    num_idle: Any, tried: list[float], shortest: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down the ladder while the device is busy in most windows: a single stall of the host does not decide."""
    asked: list[float] = []

    async def run(setting: Setting, num_steps: int, reps: int, _: Any) -> list[dict[str, float]]:
        assert num_steps == 400
        asked.append(setting.step_ms)
        return [{"idle_fraction": 0.02 if index < num_idle(setting.step_ms) else 0.001} for index in range(reps)]

    monkeypatch.setattr(bench_host, "_run", run)
    assert asyncio.run(bench_host._shortest_step(Setting(1, 8, 2), 400, 3)) == shortest
    assert asked == tried


def test_the_report_and_its_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: list[Setting] = []

    async def run(setting: Setting, *_: Any) -> list[dict[str, Any]]:
        settings.append(setting)
        return [figures()]

    monkeypatch.setattr(bench_host, "_run", run)
    file = tmp_path / "report.json"
    argv = ["bench", "host", "--tp", "4", "--batch", "8", "--step-ms", "5", "--depth", "2,1", "--reps", "1"]
    assert main([*argv, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert (report["tp"], report["batch"], report["step_ms"], report["modelled"]) == (4, 8, 5.0, True)
    assert report["num_cpus"] == os.cpu_count()
    assert list(report)[-2:] == ["depth_1", "depth_2"]
    assert report["depth_2"]["shortest_step_ms"] == 1.5, "the ladder's end"
    assert report["depth_1"]["runs"][0]["planner_cpu_us_per_step"] == report["depth_1"]["planner_cpu_us_per_step"]
    assert settings[0] == Setting(tp=4, batch=8, depth=1, step_ms=5.0)
    out = capsys.readouterr().out
    assert all(word in out for word in ("depth 1", "depth 2", "idle fraction", "transport", "modelled", "TP 4"))

    settings.clear()
    argv = ["bench", "host", "--depth", "2", "--reps", "1", "--stub-device", "h100", "--stub-model", "llama-70b"]
    assert main([*argv, "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert "shortest_step_ms" not in json.loads(captured.out)["depth_2"], "the clock's steps are the device's"
    assert len(settings) == 1
    assert (settings[0].step_ms, settings[0].stub_device, settings[0].stub_model) == (0, "h100", "llama-70b")
    assert "idle fraction" in captured.err


@pytest.mark.parametrize(
    "flags",
    [
        ["--tp", "0"],
        ["--step-ms", "0"],
        ["--depth", "two"],
        ["--depth", "0,1"],
        ["--reps", "0"],
        ["--frontends", "2"],
        ["--stub-device", "h100"],
    ],
)
def test_wrong_usage(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", "host", *flags])
    assert exit_info.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_what_is_started() -> None:
    """Names of all services and the flags that matter; real front ends only for real clients."""
    paths = (Path("/r"), Path("/r/group"), Path("/r/logs"))
    started = stages(Setting(tp=2, batch=100, depth=3, step_ms=2.5), *paths)
    assert [[child.name for child in stage] for stage in started] == [["worker"], ["planner"], [], ["load"]]
    worker, planner, load = started[0][0].argv, started[1][0].argv, started[3][0].argv
    wanted = {
        "--tp": "2",
        "--max-num-seqs": "100",
        "--stub-step-ms": "2.5",
        "--stub-mode": "clock",
        "--max-model-len": "160",
    }
    assert {name: option(list(worker), name) for name in wanted} == wanted
    assert option(list(planner), "--depth") == "3"
    assert option(list(load), "--planner") == option(list(planner), "--planner") == "unix:/r/planner.sock"
    assert load[0] == sys.executable, "its cost is measured: it is not niced"

    setting = Setting(1, 8, 2, engine="torch", model="m", clients="grpc", frontends=2, frontend_nice=5)
    started = stages(setting, *paths)
    assert [child.name for child in started[2]] == ["frontend-0", "frontend-1"]
    assert "--stub-mode" not in started[0][0].argv
    assert started[2][0].argv[:3] == ["nice", "-n", "5"]
    assert started[3][0].argv[:3] == ["nice", "-n", "10"]
    assert option(list(started[3][0].argv), "--target") == "unix:/r/frontend-0.sock,unix:/r/frontend-1.sock"
    assert not any(key.startswith("ALBIREO_") for key in started[0][0].env)


def test_a_service_that_does_not_start(tmp_path: Path) -> None:
    """The error shows the end of its log; nothing is left running."""

    async def start() -> None:
        with open_run_dir(str(tmp_path)) as run_dir:
            async with Services(Setting(tp=1, batch=8, depth=2, model=str(tmp_path / "none")), run_dir):
                pass

    with pytest.raises(GroupError, match="the log of worker ends:"):
        asyncio.run(start())
    assert descendants(os.getpid()) == []


@pytest.mark.e2e
def test_services_that_die_while_they_are_measured(tmp_path: Path) -> None:
    """A rank is started again by its supervisor, but its figures are lost; what else dies shows its log."""

    async def kill() -> None:
        with open_run_dir(str(tmp_path)) as run_dir:
            async with Services(Setting(tp=2, batch=8, depth=2, step_ms=5.0), run_dir) as services:
                used = services.cpu_ns()
                assert used.keys() == {"worker", "planner", "frontend-0", "rank-0", "rank-1"}
                assert min(used.values()) > 0
                os.kill(services._servers["rank-1"], signal.SIGKILL)
                await asyncio.sleep(0.3)
                with pytest.raises(GroupError, match="rank-1 has died"):
                    services.cpu_ns()
                os.kill(services._servers["planner"], signal.SIGKILL)
                await asyncio.sleep(0.3)
                with pytest.raises(GroupError, match="planner was killed by SIGKILL"):
                    await services.turn_window()

    asyncio.run(kill())
    assert descendants(os.getpid()) == []


def test_processes() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass", "--rank", "3"]) as child:
        try:
            assert child.pid in descendants(os.getpid())
            while option(command_line(child.pid), "--rank") != "3":
                time.sleep(0.01)  # before its exec, it has our command line
            before = cpu_ns(child.pid)
            time.sleep(0.2)
            assert 0 < cpu_ns(child.pid) - before < 10**9
        finally:
            child.send_signal(signal.SIGKILL)
    assert child.pid not in descendants(os.getpid())
    assert command_line(child.pid) == []
    assert cpu_ns(child.pid) == 0
    assert option(["a", "--b"], "--b") is None


_KEYS = {
    *("idle_fraction", "gap_p50_us", "gap_p99_us", "gap_max_us", "non_scalable_fraction", "step_ms"),
    *("planner_logic_cpu_us_per_step", "planner_cpu_us_per_step", "frontend_cpu_us_per_step"),
    *("leader_cpu_us_per_step", "rank_cpu_us_per_step", "cpu_us_per_token", "launch_delay_p50_us", "tasks", "runs"),
}


@pytest.mark.e2e
def test_depth_hides_the_host(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    argv = ["--tp", "2", "--batch", "16", "--step-ms", "5", "--depth", "1,2", "--steps", "200", "--reps", "1"]
    assert main(["bench", "host", *argv, "--no-shortest", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    for name in ("depth_1", "depth_2"):
        got = report[name]
        assert got.keys() >= _KEYS
        assert got["step_ms"] >= 5
        assert 10 < got["rows_per_step"] <= 16
        assert 0 < got["planner_logic_cpu_us_per_step"] < got["planner_cpu_us_per_step"] < 5000
        assert 0 < got["rank_cpu_us_per_step"] < 5000
        assert 0 < got["frontend_cpu_us_per_step"] < 5000
        assert got["gap_p50_us"] <= got["gap_p99_us"] <= got["gap_max_us"]
        assert got["tasks"]["T3"]["total_us"] == pytest.approx(5000, rel=0.01)
        for task in got["tasks"].values():
            assert 0 <= task["exposed_us"] <= task["total_us"] + 1e-3
    assert report["depth_1"]["idle_fraction"] > report["depth_2"]["idle_fraction"]
    assert report["depth_1"]["tasks"]["T1"]["exposed_us"] > report["depth_2"]["tasks"]["T1"]["exposed_us"]


@pytest.mark.e2e
def test_clients_that_stream(tmp_path: Path) -> None:
    """Two front ends, the latencies of real clients, and a window that is read in pieces."""
    file = tmp_path / "report.json"
    argv = ["--batch", "8", "--step-ms", "5", "--depth", "2", "--steps", "100", "--reps", "1", "--no-shortest"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_window, "_PIECE_STEPS", 60)
        assert main(["bench", "host", *argv, "--clients", "grpc", "--frontends", "2", "--json", str(file)]) == 0
    got = json.loads(file.read_text())["depth_2"]
    assert got["num_steps"] > 50
    assert 1 <= got["coalescing_factor"] < 8
    assert 3 < got["itl_p50_ms"] < 100
    assert got["itl_p99_ms"] >= got["itl_p50_ms"]
    assert got["ttft_p50_ms"] > 0
    assert got["rank_cpu_us_per_step"] == 0, "there is the leader only"
