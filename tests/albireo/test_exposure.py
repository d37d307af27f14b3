"""What the device waited for, from rows made by hand and by chance."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo.exposure import TASKS, Coverage, Page, RankExposure, aligned, analyse, read_pages
from albireo.ledger import FRONTEND_COLUMNS, PLANNER_COLUMNS, RANK_COLUMNS, make_page

US = 1000
START = 10**15  # an uptime of 11 days


def page(process: str, names: Sequence[str], rows: Sequence[Mapping[str, int]], clock: str = "here") -> Page:
    """Columns that a row leaves out are 0; times are given in microseconds after the start."""

    def value(row: Mapping[str, int], name: str) -> int:
        if name not in row:
            return 0
        if name.endswith("_at_ns"):
            return START + row[name] * US
        return row[name] * US if name.endswith("_ns") else row[name]

    columns = {name: np.array([value(row, name) for row in rows], dtype=np.int64) for name in names}
    return Page(process, clock, columns)


def planner_row(step: int, plan: tuple[int, int], commit: tuple[int, int], deliver: tuple[int, int]) -> dict[str, int]:
    return {
        "step_id": step,
        **{"plan_start_at_ns": plan[0], "plan_end_at_ns": plan[1]},
        **{"commit_start_at_ns": commit[0], "commit_end_at_ns": commit[1]},
        **{"deliver_start_at_ns": deliver[0], "deliver_end_at_ns": deliver[1]},
    }


def rank_row(step: int, prepare: tuple[int, int], launch: int, run: tuple[int, int], **more: int) -> dict[str, int]:
    sample = more.pop("sample", 100)
    return {
        "step_id": step,
        **{"received_at_ns": prepare[0], "prepared_at_ns": prepare[1], "launched_at_ns": launch},
        **{"start_at_ns": run[0], "end_at_ns": run[1]},
        **{"forward_ns": run[1] - run[0] - sample, "sample_ns": sample},
        **more,
    }


def synchronous(num_steps: int = 10) -> list[Page]:
    """A step a millisecond: 20 commit, 30 plan, 50 on the way, 40 prepare, 10 until the start, then 850 on the device.
    Delivery takes 35 after the plan has left: 25 of it in the first 50, so all of it is in the gap."""
    planner, rank, frontend = [], [], []
    for step in range(num_steps):
        at = 1000 * step
        planner.append(
            planner_row(step, (at + 20, at + 50), (at + 1000, at + 1020), (at + 1050, at + 1085)),
        )
        rank.append(rank_row(step, (at + 100, at + 140), at + 145, (at + 150, at + 1000)))
        frontend.append({"received_at_ns": at + 500, "dispatched_at_ns": at + 600})
    return [
        page("planner", PLANNER_COLUMNS, planner),
        page("rank-0", RANK_COLUMNS, rank),
        page("frontend-0", FRONTEND_COLUMNS, frontend),
    ]


def overlapped(num_steps: int = 10, late: int = 0) -> list[Page]:
    """Steps of a millisecond back to back (``late``: that much between them); step n is planned and prepared while
    step n-1 runs."""
    planner, rank = [], []
    for step in range(1, num_steps + 1):
        at = (1000 + late) * step
        planner.append(
            planner_row(step, (at - 900, at - 870), (at + 1020, at + 1040), (at + 1090, at + 1120)),
        )
        rank.append(rank_row(step, (at - 800, at - 760), at - 750, (at, at + 1000)))
    return [page("planner", PLANNER_COLUMNS, planner), page("rank-0", RANK_COLUMNS, rank)]


def exposed(result: RankExposure) -> dict[str, float]:
    return {name: round(task.exposed_us, 3) for name, task in result.tasks.items()}


def test_synchronous_steps_wait_for_everything() -> None:
    """The first step's gap is not known: nine of ten periods have one."""
    (result,) = analyse(synchronous())
    assert result.num_steps == 10
    assert result.idle_fraction == pytest.approx(9 * 150 / (10 * 1000 - 150))
    assert (result.gaps.p50_us, result.gaps.max_us) == (150, 150)
    assert result.launch_delay.p50_us == 45
    part = 9 / 10
    t5 = 20 + 35
    rest = 150 - 20 - 30 - 35 - 40  # nothing but wires
    wanted = {
        "T1": 30 * part,
        "T2": 40 * part,
        "T3": 750,
        "T4": 100,
        "T5": t5 * part,
        "KV": 0,
        "transport": rest * part,
    }
    assert exposed(result) == pytest.approx(wanted)
    assert sum(exposed(result).values()) == pytest.approx(result.step_us)
    assert result.tasks["T5"].total_us == pytest.approx(t5 * part + 100), "the front end's 100, all hidden"
    assert result.tasks["T1"].exposed_p50_us == 30
    assert result.non_scalable_fraction == pytest.approx((9 * 150 + 10 * 100) / 9850)


def test_overlapped_steps_wait_for_nothing() -> None:
    (result,) = analyse(overlapped())
    assert result.idle_fraction == 0
    assert exposed(result) == {"T1": 0, "T2": 0, "T3": 900, "T4": 100, "T5": 0, "KV": 0, "transport": 0}
    assert result.tasks["T1"].total_us == pytest.approx(30 * 9 / 10), "the first step's plan lies before the first step"
    assert result.non_scalable_fraction == pytest.approx(0.1), "sampling is left"


def test_a_task_that_is_hidden_in_part() -> None:
    """A gap of 50, in which the commit of the step before takes 20, from 20 on; the delivery, from 90 on, is hidden."""
    (result,) = analyse(overlapped(late=50))
    assert result.gaps.p50_us == 50
    assert result.tasks["T5"].exposed_us == pytest.approx(20 * 9 / 10)
    assert result.tasks["T5"].total_us == pytest.approx((20 + 30) * 9 / 10)
    assert result.tasks["transport"].exposed_us == pytest.approx(30 * 9 / 10)


def test_a_range_of_steps_and_missing_rows() -> None:
    """Steps outside the range, and those that the planner does not know, are left out; a hole in the rows is no gap."""
    planner, rank, frontend = synchronous()
    (result,) = analyse([planner, rank, frontend], first_step=2, last_step=5)
    assert result.num_steps == 4
    holes = planner.select(~np.isin(planner["step_id"], [4, 5]))
    (result,) = analyse([holes, rank], first_step=1)
    assert result.num_steps == 7
    assert result.gaps.max_us == 150
    with pytest.raises(ValueError, match="no rank"):
        analyse([planner, rank], first_step=100)
    with pytest.raises(ValueError, match="no rank"):
        analyse([])


def test_an_engine_that_prepares_within_launch() -> None:
    pages = synchronous()
    (result,) = analyse(pages, prepares_in_launch=True)
    assert result.tasks["T2"].exposed_us == pytest.approx((40 + 5) * 9 / 10)
    (result,) = analyse(overlapped(), prepares_in_launch=True)
    assert result.tasks["T2"].total_us == pytest.approx(40 * 9 / 10), "a wait for the device is no work"


def test_transfers_that_make_a_step_longer_are_exposed() -> None:
    rows = [rank_row(step, (1, 2), 3, (1000 * step, 1000 * step + 1000), kv_ns=300) for step in range(1, 5)]
    for row in rows:
        row["forward_ns"] -= 120
    (result,) = analyse([page("rank-0", RANK_COLUMNS, rows)])
    assert (result.tasks["KV"].total_us, result.tasks["KV"].exposed_us) == (300, 120)


def test_without_a_planner_all_is_transport() -> None:
    (result,) = analyse(synchronous()[1:2])
    assert result.tasks["T1"].total_us == 0
    assert result.tasks["transport"].exposed_us == pytest.approx(110 * 9 / 10)


def test_pages_of_another_host_are_moved() -> None:
    """By a rank that starts the same step, else by the plan's arrival: the analysis does not see the difference."""
    planner, rank, frontend = synchronous()
    shifted = [each.process for each in (rank, frontend)]
    there = [
        Page(each.process, "there", {k: v - 10**14 if k.endswith("_at_ns") else v for k, v in each.columns.items()})
        for each in (rank, frontend)
    ]
    peer = Page("rank-1", "here", rank.columns)
    moved = aligned([planner, peer, *there])
    assert [each.process for each in moved] == ["planner", "rank-1", *shifted]
    for each, original in zip(moved[2:], (rank, frontend), strict=True):
        assert all((each[name] == original[name]).all() for name in original.columns)
    by_plan = aligned([planner, there[0]])[1]
    assert by_plan["received_at_ns"][0] == planner["plan_end_at_ns"][0]
    assert (np.diff(by_plan["start_at_ns"]) == np.diff(rank["start_at_ns"])).all()
    assert [each.process for each in aligned([planner, there[1]])] == ["planner"], "a clock that nothing ties to ours"
    assert aligned([]) == []


def test_pages_are_read_and_joined() -> None:
    rows = np.arange(8 * len(RANK_COLUMNS), dtype=np.int64).reshape(8, -1)
    (older,) = read_pages([make_page("rank-0", RANK_COLUMNS, rows[:5])])
    (newer,) = read_pages([make_page("rank-0", RANK_COLUMNS, rows[3:])])
    assert older.is_rank
    assert not older.is_planner
    joined = older.joined(newer)
    assert joined["step_id"].tolist() == rows[:, 0].tolist()
    assert joined["num_tokens"].tolist() == rows[:, -1].tolist()
    (empty,) = read_pages([make_page("rank-0", RANK_COLUMNS, rows[:0])])
    assert len(empty.joined(older)) == len(older.joined(empty)) == 5


def test_coverage_of_nothing() -> None:
    coverage = Coverage([0, START, START], [START, 0, START])
    assert coverage.within(np.array([0, START]), np.array([START, START + 5])).tolist() == [0, 0]


intervals = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 20)).map(lambda x: (x[0], x[0] + x[1])), max_size=12)


@given(intervals, st.integers(0, 80), st.integers(0, 80))
def test_coverage_counts_every_moment_once(covers: list[tuple[int, int]], one: int, other: int) -> None:
    first, last = sorted((one, other))
    wanted = sum(any(start <= moment < end for start, end in covers) for moment in range(first, last))
    coverage = Coverage([START + start for start, _ in covers], [START + end for _, end in covers])
    got = coverage.within(np.array([START + first]), np.array([START + last]))
    assert got[0] == pytest.approx(wanted)


@st.composite
def loops(draw: st.DrawFn) -> list[Page]:
    """Steps in their order with tasks of any length anywhere, as one thread each does them."""
    duration = st.integers(0, 300)
    planner, rank, frontend = [], [], []
    host = device = 1
    for step in range(draw(st.integers(1, 8))):
        spans = []
        for _ in range(3):
            start = host + draw(duration)
            host = start + draw(duration)
            spans.append((start, host))
        planner.append(planner_row(step, *spans))
        begin = device + draw(duration)
        launch = draw(st.integers(max(1, begin - 200), begin))
        prepare = launch - draw(st.integers(0, launch - 1))
        device = begin + 100 + draw(duration)
        rank.append(rank_row(step, (prepare, launch), launch, (begin, device), sample=draw(st.integers(0, 100))))
        frontend.append({"received_at_ns": spans[2][0], "dispatched_at_ns": spans[2][0] + draw(duration)})
    return [
        page("planner", PLANNER_COLUMNS, planner),
        page("rank-0", RANK_COLUMNS, rank),
        page("frontend-0", FRONTEND_COLUMNS, frontend),
    ]


@given(loops(), st.booleans())
def test_exposed_is_a_part_of_the_whole_and_of_the_gaps(pages: list[Page], in_launch: bool) -> None:
    (result,) = analyse(pages, prepares_in_launch=in_launch)
    gaps_us = result.idle_fraction * result.step_us
    assert 0 <= result.idle_fraction <= result.non_scalable_fraction <= 1
    for name in TASKS:
        task = result.tasks[name]
        assert -1e-6 <= task.exposed_us <= task.total_us + 1e-6
        if name in ("T1", "T2", "T5", "transport"):
            assert task.exposed_us <= gaps_us + 1e-6


@given(loops())
def test_exposed_times_of_tasks_that_do_not_overlap_fill_the_gaps(pages: list[Page]) -> None:
    """A planner is one thread: T1 and T5 of it never overlap, and what they leave is transport."""
    planner, rank, _ = pages
    alone = Page(rank.process, rank.clock, {**rank.columns, "received_at_ns": rank["prepared_at_ns"]})
    (result,) = analyse([planner, alone])
    gaps_us = result.idle_fraction * result.step_us
    assert sum(result.tasks[name].exposed_us for name in ("T1", "T5", "transport")) == pytest.approx(gaps_us, abs=1e-6)
    everything = sum(task.exposed_us for task in result.tasks.values())
    assert everything == pytest.approx(result.step_us, abs=1e-6), "steps are nothing but T3 and T4 here"
