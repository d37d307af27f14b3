"""How a rank gets out of a group that breaks, and what happens when it does not."""

import os
import threading
import time
from pathlib import Path

import pytest

from albireo.errors import GroupError
from worker_svc.life import Deadlines, Membership
from worker_svc.stub.collective import StarCollective


class RecordingEngine:
    """Of an engine what a membership calls."""

    is_asynchronous = False

    def __init__(self) -> None:
        self.calls: list[str] = []

    def abort(self) -> None:
        self.calls.append("abort")

    def leave(self) -> None:
        self.calls.append("leave")


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Statuses with which this process would have ended."""
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    return statuses


def test_the_first_reason_counts_and_nothing_aborts_the_next_group(exits: list[int]):
    engine, reasons = RecordingEngine(), []
    membership = Membership(engine, Deadlines(), reasons.append)  # type: ignore[arg-type]
    membership.check()
    for reason in ("rank 1 is gone", "rank 2 is gone"):
        membership.break_up(reason)
    assert membership.steps.get() is None
    with pytest.raises(GroupError, match="rank 1 is gone"):
        membership.check()
    membership.leave()
    membership.break_up("late")
    assert (engine.calls, reasons) == (["abort", "leave"], ["rank 1 is gone"])


def test_a_rank_that_does_not_get_out_of_a_broken_group_ends(exits: list[int], monkeypatch: pytest.MonkeyPatch):
    deadlines = Deadlines()
    membership = Membership(RecordingEngine(), deadlines, lambda _reason: None)  # type: ignore[arg-type]
    membership.break_up("rank 1 is gone")
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 3)
    assert deadlines.check()
    assert exits == []
    monkeypatch.setattr(time, "monotonic", lambda: now + 5)
    deadlines.check()
    assert exits == [1]
    membership.leave()
    deadlines.check()
    assert exits == [1]


def test_what_is_over_has_no_deadline(exits: list[int]):
    deadlines = Deadlines()
    with pytest.raises(ValueError, match="other"), deadlines.within(-1, "a step"):
        raise ValueError("other")
    deadlines.check()
    assert exits == []


def join_all(collectives: list[StarCollective], meetings: list[int]) -> list[GroupError | None]:
    """Every rank joins in a thread of its own; what each of them got."""
    errors: list[GroupError | None] = [None] * len(collectives)

    def join(rank: int) -> None:
        try:
            collectives[rank].join(meetings[rank])
        except GroupError as error:
            errors[rank] = error

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(len(collectives))]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    if any(thread.is_alive() for thread in threads):
        collectives[0].abort()
    for thread in threads:
        thread.join(10)
    return errors


def test_ranks_of_different_meetings_never_meet(tmp_path: Path):
    """And an abort ends the wait, for good until the group is left."""
    collectives = [StarCollective(tmp_path / "collective.sock", rank, 2) for rank in range(2)]
    start = time.monotonic()
    errors = join_all(collectives, [1, 2])
    assert isinstance(errors[0], GroupError)
    assert time.monotonic() - start < 5
    with pytest.raises(GroupError, match="aborted"):
        collectives[0].join(3)
    for collective in collectives:
        collective.leave()
    assert join_all(collectives, [4, 4]) == [None, None]
    for collective in collectives:
        collective.leave()
