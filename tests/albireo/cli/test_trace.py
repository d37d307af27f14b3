"""``albireo trace`` against a server that answers with pages made by hand."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from albireo.cli.main import main
from albireo.exposure import Page
from albireo.ledger import FRONTEND_COLUMNS, PLANNER_COLUMNS, RANK_COLUMNS, make_page
from albireo.v1 import ledger_pb2, ledger_pb2_grpc
from fake_server import FakeServer

STEP_NS = 1_000_000
START_NS = 5 * 10**12


class FakeLedger(ledger_pb2_grpc.LedgerServicer):
    def __init__(self, pages: list[ledger_pb2.LedgerPage]) -> None:
        self.pages = pages
        self.num_rows = 0

    def Read(self, request: ledger_pb2.ReadLedgerRequest, context: Any) -> ledger_pb2.LedgerPages:
        self.num_rows = request.num_rows
        return ledger_pb2.LedgerPages(pages=self.pages)


def overlapped(num_steps: int = 20) -> list[ledger_pb2.LedgerPage]:
    """Step n is planned 0.9 ms before it starts, prepared 0.8 ms before, while step n - 1 runs; every step is followed
    by a gap of 5 us."""
    at = START_NS + np.arange(num_steps) * (STEP_NS + 5_000)
    n = np.arange(num_steps) + 100
    ones = np.ones_like(n)
    planner = [n, at - 900_000, at - 870_000, at + 1_010_000, at + 1_020_000, at + 1_040_000, at + 1_080_000]
    planner += [at + 1_090_000, 70_000 * ones, 8 * ones, 8 * ones]
    rank = [n, at - 800_000, at - 760_000, at - 750_000, at, at + STEP_NS, 900_000 * ones, 100_000 * ones]
    rank += [0 * ones, np.where(n % 2, 50_000, 0), 8 * ones, 8 * ones]
    frontend = [at + 1_200_000, at + 1_250_000, 8 * ones, 8 * ones]
    return [
        make_page("frontend-0", FRONTEND_COLUMNS, np.stack(frontend, axis=1)),
        make_page("planner", PLANNER_COLUMNS, np.stack(planner, axis=1)),
        *(make_page(f"rank-{each}", RANK_COLUMNS, np.stack(rank, axis=1)) for each in (1, 0)),
    ]


@pytest.fixture
def ledger() -> FakeLedger:
    return FakeLedger(overlapped())


@pytest.fixture
def ledger_server(ledger: FakeLedger):
    from concurrent.futures import ThreadPoolExecutor

    server = grpc.server(ThreadPoolExecutor(max_workers=2))
    ledger_pb2_grpc.add_LedgerServicer_to_server(ledger, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(grace=None).wait()


def read_trace(target: str, file: Path, *flags: str) -> list[dict[str, Any]]:
    assert main(["trace", "--target", target, "-o", str(file), *flags]) == 0
    return json.loads(file.read_text())["traceEvents"]


def spans_of(events: list[dict[str, Any]], process: str, name: str) -> dict[int, tuple[float, float]]:
    """Step -> start and end in microseconds."""
    pids = [e["pid"] for e in events if e["name"] == "process_name" and e["args"]["name"] == process]
    spans = [e for e in events if e["ph"] == "X" and e["pid"] in pids and e["name"] == name]
    return {e["args"]["step"]: (e["ts"], e["ts"] + e["dur"]) for e in spans}


def test_the_next_plan_is_made_while_a_step_runs(
    ledger: FakeLedger, ledger_server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = read_trace(ledger_server, tmp_path / "trace.json", "--steps", "10")
    assert ledger.num_rows == 10, "no more is asked for"
    plans, runs = spans_of(events, "planner", "T1 plan"), spans_of(events, "rank-0", "T3 forward")
    assert list(runs) == list(range(110, 120))
    for step in range(110, 119):
        start, end = runs[step]
        assert start < plans[step + 1][0] < plans[step + 1][1] < end
    out = capsys.readouterr().out
    assert "10 steps" in out
    assert "ui.perfetto.dev" in out


def test_the_trace_is_valid(ledger_server: str, tmp_path: Path) -> None:
    """Threads do one thing at a time; every event says which step; times begin at 0; arrows have two ends."""
    events = read_trace(ledger_server, tmp_path / "trace.json")
    names = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert names == ["frontend-0", "planner", "rank-0", "rank-1"]
    threads: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        assert {"ph", "name", "pid"} <= event.keys()
        if event["ph"] == "X":
            threads[event["pid"], event["tid"]].append(event)
            assert event["args"]["step" if event["pid"] > 1 else "sequences"] > 0
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert named == set(threads)
    for spans in threads.values():
        ends = [span["ts"] + span["dur"] for span in spans]
        assert all(end <= after["ts"] + 1e-6 for end, after in zip(ends, spans[1:], strict=False))
    assert min(span["ts"] for spans in threads.values() for span in spans) == 0
    device = next(spans for spans in threads.values() if spans[0]["cat"] == "device")
    assert [span["name"] for span in device[:5]] == ["T3 forward", "T4 sample", "idle", "T3 forward", "T4 sample"]
    assert device[2]["dur"] == pytest.approx(5)
    assert any(spans[0]["cat"] == "KV transfers" for spans in threads.values())
    flows = [e for e in events if e["ph"] in "sf"]
    assert len(flows) == 2 * 2 * 20, "from each plan to the step on two ranks"
    for leaves, arrives in zip(flows[::2], flows[1::2], strict=True):
        assert (leaves["ph"], arrives["ph"], leaves["id"]) == ("s", "f", arrives["id"])
        assert leaves["ts"] < arrives["ts"]


def test_a_host_with_another_clock(ledger: FakeLedger, ledger_server: str, tmp_path: Path) -> None:
    """Its ranks start their steps with ours."""
    shown = read_trace(ledger_server, tmp_path / "one.json")
    for page in ledger.pages:
        if page.process == "rank-1":
            rows = np.frombuffer(page.rows, dtype="<i8").reshape(-1, len(RANK_COLUMNS)).copy()
            rows[:, 1:6] += 77 * 10**9
            page.rows, page.clock = rows.tobytes(), "another boot"
    assert read_trace(ledger_server, tmp_path / "other.json") == shown


def test_work_that_overlaps_on_a_thread_is_shown_in_turn(
    ledger: FakeLedger, ledger_server: str, tmp_path: Path
) -> None:
    """Plans that came while the thread was busy were received before it was their turn."""
    for page in ledger.pages:
        if page.process == "rank-0":
            rows = np.frombuffer(page.rows, dtype="<i8").reshape(-1, len(RANK_COLUMNS)).copy()
            rows[1::2, 1] = rows[0::2, 1]
            page.rows = rows.tobytes()
    spans = spans_of(read_trace(ledger_server, tmp_path / "trace.json"), "rank-0", "T2 prepare")
    assert spans[100][1] == spans[101][0]


def test_nothing_has_run(
    ledger: FakeLedger, ledger_server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for pages in ([], [make_page("planner", PLANNER_COLUMNS, np.zeros((0, len(PLANNER_COLUMNS)), dtype=np.int64))]):
        ledger.pages = pages
        assert main(["trace", "--target", ledger_server, "-o", str(tmp_path / "trace.json")]) == 1
        assert "no steps yet" in capsys.readouterr().err
    assert not (tmp_path / "trace.json").exists()


def test_no_ledger(
    server: FakeServer,
    dead_target: str,
    ledger: FakeLedger,
    ledger_server: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = str(tmp_path / "trace.json")
    assert main(["trace", "--target", server.target, "-o", file]) == 1
    assert "does not offer albireo.v1.Ledger" in capsys.readouterr().err
    assert main(["trace", "--target", dead_target, "-o", file]) == 1
    assert dead_target in capsys.readouterr().err
    assert main(["trace", "--target", ledger_server, "-o", str(tmp_path / "no" / "trace.json")]) == 2
    assert "trace.json: No such file" in capsys.readouterr().err
    ledger.pages[0].rows = b"odd"
    assert main(["trace", "--target", ledger_server, "-o", file]) == 1
    assert "cannot be read" in capsys.readouterr().err


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["trace", "-o", "x", "--steps", "0"])
    assert "--steps" in capsys.readouterr().err


def test_pages_are_told_apart_by_their_columns() -> None:
    assert Page("a", "", dict.fromkeys(FRONTEND_COLUMNS, np.zeros(0, dtype=np.int64))).is_frontend
