"""The pictures of the benchmark log: each tool draws what it is given, small enough for a repository."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG"
MAX_BYTES = 200_000


def run_tool(name: str, *argv: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def check_picture(file: Path) -> None:
    assert file.read_bytes().startswith(PNG)
    assert file.stat().st_size < MAX_BYTES


def report(tp: int, batch: int, **more: Any) -> dict[str, Any]:
    figures = {
        f"{name}_cpu_us_per_step": 100.0 * tp for name in ("planner", "planner_logic", "leader", "rank", "frontend")
    }
    depths = {f"depth_{depth}": {"idle_fraction": 0.1 / depth, "shortest_step_ms": None, **figures} for depth in (1, 2)}
    facts = {"engine": "stub", "clients": "internal", "step_ms": 10.0, "modelled": True, "num_cpus": 2}
    return {"tp": tp, "batch": batch, **facts, **depths, **more}


def write_reports(directory: Path, reports: list[dict[str, Any]]) -> list[Path]:
    files = [directory / f"{index}.json" for index in range(len(reports))]
    for file, each in zip(files, reports, strict=True):
        file.write_text(json.dumps(each))
    return files


def test_the_host_picture(tmp_path: Path) -> None:
    """What no report has is left out."""
    files = write_reports(tmp_path, [report(tp, batch) for tp in (1, 2) for batch in (8, 64)])
    done = run_tool("plot_host.py", *files, "-o", tmp_path / "host.png")
    assert done.returncode == 0, done.stderr
    check_picture(tmp_path / "host.png")


def test_a_single_report_makes_no_line(tmp_path: Path) -> None:
    files = write_reports(tmp_path, [report(2, 8)])
    done = run_tool("plot_host.py", *files, "-o", tmp_path / "host.png")
    assert done.returncode == 2
    assert "no two of these reports differ" in done.stderr


def test_different_settings_are_not_mixed(tmp_path: Path) -> None:
    files = write_reports(tmp_path, [report(1, 8), report(1, 64, step_ms=5.0)])
    done = run_tool("plot_host.py", *files, "-o", tmp_path / "host.png")
    assert done.returncode == 1
    assert "differ in step_ms: 10.0, 5.0" in done.stderr


def trace(num_steps: int) -> dict[str, Any]:
    names = [("planner", "step loop", "T1 plan"), ("rank-0", "device", "T3 forward"), ("rank-0", "device", "idle")]
    events: list[dict[str, Any]] = []
    for pid, (process, thread, _) in enumerate(names[:2], start=1):
        events.append({"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": process}})
        events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": 1, "args": {"name": thread}})
    for step in range(num_steps):
        for pid, name, begin, length in ((1, "T1 plan", -500, 50), (2, "T3 forward", 0, 900), (2, "idle", 900, 100)):
            at = {"ts": 1000 * (step + 1) + begin, "dur": length}
            events.append({"ph": "X", "name": name, "pid": pid, "tid": 1, **at, "args": {"step": step}})
    return {"traceEvents": events}


def test_trace_pictures(tmp_path: Path) -> None:
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for file in files:
        file.write_text(json.dumps(trace(30)))
    done = run_tool("plot_trace.py", *files, "-o", tmp_path / "steps.png", "--titles", "depth 1", "depth 2")
    assert done.returncode == 0, done.stderr
    check_picture(tmp_path / "steps.png")
    done = run_tool("plot_trace.py", files[0], "-o", tmp_path / "steps.png", "--first", "30")
    assert done.returncode == 1
    assert "30 steps, none at --first 30" in done.stderr
