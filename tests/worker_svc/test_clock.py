"""The stub's clock: the modelled time line is worked out from when plans were ready, not from when anyone woke up."""

import threading
import time
from pathlib import Path

import pytest

from albireo.errors import GroupError
from worker_svc.stub.clock import Clock, Launched, Span

MS = 1_000_000


@pytest.fixture
def clocks(tmp_path: Path) -> list[Clock]:
    """Of a group of three, which has met."""
    return join(tmp_path, 1)


def join(run_dir: Path, meeting: int, may_lag: bool = False) -> list[Clock]:
    clocks = [Clock(run_dir, rank, 3, may_lag) for rank in range(3)]
    for clock in clocks:
        clock.join(meeting)
    return clocks


def test_a_step_starts_when_the_last_rank_is_ready_and_the_one_before_has_ended(clocks: list[Clock]):
    first = [clock.launch() for clock in clocks]
    second = [clock.launch() for clock in clocks]
    span = clocks[0].finish(first[0], 20 * MS)
    assert time.monotonic_ns() >= span.end_ns
    assert span == Span(first[2].ready_ns, first[2].ready_ns + 20 * MS)
    after = clocks[0].finish(second[0], 5 * MS)
    assert after == Span(span.end_ns, span.end_ns + 5 * MS)
    for clock, launched in zip(clocks[1:], (first[1], first[2]), strict=True):
        assert clock.finish(launched, 20 * MS) == span


def test_a_rank_that_is_late_moves_the_step(clocks: list[Clock]):
    launched = [clock.launch() for clock in clocks[:2]]
    late: list[Launched] = []

    def launch_late() -> None:
        time.sleep(0.05)
        late.append(clocks[2].launch())

    thread = threading.Thread(target=launch_late)
    thread.start()
    span = clocks[0].finish(launched[0], 10 * MS)
    thread.join()
    assert span.start_ns == late[0].ready_ns > launched[0].ready_ns + 40 * MS
    assert time.monotonic_ns() >= span.end_ns


def test_a_rank_that_is_missing_breaks_the_group(clocks: list[Clock]):
    for clock in clocks[:2]:
        clock.launch()
    start = time.monotonic()
    with pytest.raises(GroupError, match="rank 2 has not launched step 1"):
        clocks[0].finish(Launched(1, time.monotonic_ns()), MS)
    assert 2.9 < time.monotonic() - start < 5


@pytest.mark.parametrize("rank", [0, 1])
def test_an_abort_ends_every_wait(clocks: list[Clock], rank: int):
    launched = [clock.launch() for clock in clocks]
    threading.Timer(0.05, clocks[rank].abort).start()
    start = time.monotonic()
    with pytest.raises(GroupError, match="aborted"):
        clocks[rank].finish(launched[rank], 60_000 * MS)
    assert time.monotonic() - start < 2


def test_stamps_of_another_group_do_not_count(clocks: list[Clock], tmp_path: Path):
    """A new meeting begins with nothing, and an abort of the last one is over."""
    for clock in clocks:
        clock.launch()
        clock.abort()
        clock.leave()
    for clock in clocks:
        clock.join(2)
    assert [path.name for path in tmp_path.glob("clock-*")] == [f"clock-{2:016x}"]
    launched = clocks[0].launch()
    assert launched.number == 1
    threading.Timer(0.05, clocks[0].abort).start()
    with pytest.raises(GroupError, match="aborted"):
        clocks[0].finish(launched, MS)


def test_a_rank_in_no_hurry_learns_of_many_steps_at_once(tmp_path: Path):
    """And of some of them nothing, where it comes so late that the leader has forgotten them."""
    clocks = join(tmp_path, 1, may_lag=True)
    mine: list[Launched] = []
    spans: list[Span] = []
    for _ in range(1500):
        launched = [clock.launch() for clock in clocks]
        mine.append(launched[1])
        spans.append(clocks[0].finish(launched[0], 0))
    learnt = [clocks[1].finish(launched, 0) for launched in mine]
    assert learnt[:476] == [Span(0, 0)] * 476
    assert learnt[476:] == spans[476:]
