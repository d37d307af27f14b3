"""Where the time of a group's steps goes, as its leader tells."""

import itertools
import time
from pathlib import Path

import numpy as np
import pytest
from group_driver import Ranks, collect, send_plans, true_output

from albireo.ledger import RANK_COLUMNS, Ledger, rows_of
from albireo.v1 import ledger_pb2, ledger_pb2_grpc
from checkpoints import make_checkpoint
from scheduler_svc.planner.group import GroupLink
from services import free_port, read_metrics
from worker_svc.ledgers import GroupLedgers, ledger_path

NUM_STEPS = 12


async def run_steps(ranks: Ranks, num: int) -> list[int]:
    link = GroupLink(ranks.address)
    await link.wait_until_ready()
    stream = link.open()
    send_plans(stream, 1, num)
    tokens = await collect(stream, num)
    await link.close()
    return tokens


async def read_pages(ranks: Ranks, num_rows: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """Process -> column -> values, once all ranks have as many rows as the leader: others may lag behind it."""
    link = GroupLink(ranks.address)
    stub = ledger_pb2_grpc.LedgerStub(link._channel)
    deadline = time.monotonic() + 5
    while True:
        answer = await stub.Read(ledger_pb2.ReadLedgerRequest(num_rows=num_rows), timeout=5)
        pages = {page.process: rows_of(page) for page in answer.pages}
        if len({page["step_id"][-1] for page in pages.values()}) == 1 or time.monotonic() > deadline:
            assert len({page.clock for page in answer.pages}) == 1
            await link.close()
            return pages


@pytest.mark.parametrize("mode", ["truth", "clock"])
async def test_modelled_steps_follow_on_one_another_at_the_same_times_on_all_ranks(
    tmp_path: Path, stub_model: Path, mode: str
):
    with Ranks(tmp_path, stub_model, 2, engine="stub", stub_mode=mode, stub_step_ms=10) as ranks:
        tokens = await run_steps(ranks, NUM_STEPS)
        assert len(tokens) == NUM_STEPS
        assert mode == "clock" or tokens == true_output(NUM_STEPS)
        pages = await read_pages(ranks)
        first, second = pages["rank-0"], pages["rank-1"]
        assert first["step_id"].tolist() == second["step_id"].tolist() == list(range(NUM_STEPS))
        for name in ("start_at_ns", "end_at_ns", "num_rows", "num_tokens"):
            assert (first[name] == second[name]).all(), name
        assert (first["num_tokens"] == [45, *[1] * (NUM_STEPS - 1)]).all()
        assert (first["forward_ns"] == 10_000_000).all()
        # All plans but the first were there before the device could begin.
        assert (first["start_at_ns"][1:] == first["end_at_ns"][:-1]).all()
        for page in (first, second):
            assert (page["received_at_ns"] <= page["prepared_at_ns"]).all()
            assert (page["prepared_at_ns"] <= page["launched_at_ns"]).all()
            assert page["launched_at_ns"][-1] < page["start_at_ns"][-1], "the last plan waited on the device"
        assert (await read_pages(ranks, num_rows=3))["rank-1"]["step_id"].tolist() == [9, 10, 11]


async def test_a_roofline_says_how_long_steps_last(tmp_path: Path, stub_model: Path):
    flags = {"stub_mode": "clock", "stub_device": "h200", "stub_model": "llama-3.1-70b"}
    with Ranks(tmp_path, stub_model, 2, engine="stub", **flags) as ranks:
        tokens = await run_steps(ranks, 5)
        assert tokens == await ranks.generate(5), "the same in every run"
        pages = await read_pages(ranks)
    for page in pages.values():
        # 139 GB of weights at 2 x 4.8 TB/s, 160 all-reduces, a launch.
        assert ((page["forward_ns"] > 15.4e6) & (page["forward_ns"] < 15.8e6)).all()
        assert ((page["collective_ns"] > 160 * 6_000) & (page["collective_ns"] < 160 * 10_000)).all()
        assert ((page["sample_ns"] > 20_000) & (page["sample_ns"] < 100_000)).all()
        assert (page["end_at_ns"] - page["start_at_ns"] == page["forward_ns"] + page["sample_ns"]).all()


@pytest.mark.parametrize("flags", [{}, {"eager": True}], ids=["compiled", "eager"])
async def test_steps_of_a_real_model(tmp_path: Path, flags: dict[str, bool]):
    """The parts of a step add up, and time in collectives is seen."""
    checkpoint = make_checkpoint(tmp_path / "model", "qwen3")
    with Ranks(tmp_path, checkpoint, 2, device="cpu", max_model_len=256, **flags) as ranks:
        await run_steps(ranks, 8)
        pages = await read_pages(ranks)
    assert sorted(pages) == ["rank-0", "rank-1"]
    for page in pages.values():
        times = [page[name] for name in RANK_COLUMNS[1:6]]
        assert all((earlier <= later).all() for earlier, later in itertools.pairwise(times))
        assert (page["end_at_ns"] - page["start_at_ns"] == page["forward_ns"] + page["sample_ns"]).all()
        assert (page["collective_ns"] > 0).all()
        assert (page["collective_ns"] < page["end_at_ns"] - page["start_at_ns"]).all()


async def test_histograms_of_the_leader(tmp_path: Path, stub_model: Path):
    """Idle time is counted between the steps of a busy period only."""
    port = free_port()
    with Ranks(tmp_path, stub_model, 1, engine="stub", stub_step_ms=10, metrics_port=port) as ranks:
        await run_steps(ranks, NUM_STEPS)
        time.sleep(0.2)
        await ranks.generate(NUM_STEPS)
        metrics = read_metrics(port)
    for name in ("prepare", "forward", "sample", "launch_delay"):
        assert metrics[f"albireo_step_{name}_seconds_count"] == 2 * NUM_STEPS
    assert metrics["albireo_step_forward_seconds_sum"] == pytest.approx(2 * NUM_STEPS * 0.01)
    assert metrics["albireo_step_idle_seconds_count"] == 2 * NUM_STEPS - 2
    assert metrics["albireo_step_idle_seconds_sum"] < 0.05
    assert metrics["albireo_worker_steps_total"] == 2 * NUM_STEPS


def test_a_rank_that_has_not_started_has_no_page(tmp_path: Path):
    own = Ledger("rank-0", RANK_COLUMNS, path=ledger_path(tmp_path, 0))
    ledger_path(tmp_path, 2).write_bytes(b"nonsense")
    third = Ledger("rank-3", RANK_COLUMNS, path=ledger_path(tmp_path, 3))
    third.add(*range(len(RANK_COLUMNS)))
    pages = GroupLedgers(tmp_path, 4, own).pages()
    assert [(page.process, len(rows_of(page)["step_id"])) for page in pages] == [("rank-0", 0), ("rank-3", 1)]


def test_a_row_costs_a_step_less_than_5_us(tmp_path: Path):
    ledger = Ledger("rank-0", RANK_COLUMNS, path=ledger_path(tmp_path, 0))
    row = tuple(time.monotonic_ns() + column for column in range(len(RANK_COLUMNS)))
    medians = []
    for _ in range(5):
        durations = []
        for _ in range(3000):
            start = time.perf_counter_ns()
            ledger.add(*row)
            durations.append(time.perf_counter_ns() - start)
        medians.append(float(np.median(durations)))
    assert min(medians) < 5_000
