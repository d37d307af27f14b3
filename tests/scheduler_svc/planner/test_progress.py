"""When a group counts as stalled. Times are the test's own."""

import pytest

from scheduler_svc.planner.progress import Progress


def run_steps(progress: Progress, num: int, num_tokens: int, duration_s: float, start: float = 0.0) -> float:
    now = start
    for _ in range(num):
        progress.planned(num_tokens, 0, now)
        now += duration_s
        progress.completed(now)
    return now


def test_without_history_the_limit_is_3_seconds() -> None:
    progress = Progress()
    progress.planned(8, 0, 100.0)
    assert not progress.is_stalled(102.9)
    assert progress.is_stalled(103.1)


def test_the_limit_follows_the_median_of_steps_of_that_size() -> None:
    progress = Progress()
    now = run_steps(progress, 9, 8, 0.01)
    now = run_steps(progress, 9, 512, 1.0, now)
    progress.planned(512, 0, now)
    assert not progress.is_stalled(now + 9.9)
    assert progress.is_stalled(now + 10.1)
    progress.forget_steps(now)
    progress.planned(8, 0, now)
    assert progress.is_stalled(now + 3.1)


def test_a_larger_size_than_any_before_is_judged_in_proportion() -> None:
    progress = Progress()
    now = run_steps(progress, 5, 64, 0.5)
    progress.planned(256, 0, now)
    assert not progress.is_stalled(now + 19.9)
    assert progress.is_stalled(now + 20.1)


def test_a_step_is_timed_from_the_result_before_it() -> None:
    """Plans wait in the window while the device works: their wait is no part of their duration."""
    progress = Progress()
    progress.planned(8, 0, 0.0)
    progress.planned(8, 0, 0.0)
    progress.completed(1.0)
    progress.completed(2.0)
    progress.planned(8, 0, 2.0)
    assert progress.waited_s(2.5) == pytest.approx(0.5)
    assert not progress.is_stalled(11.9)
    assert progress.is_stalled(12.1)


def test_time_without_work_does_not_count() -> None:
    progress = Progress()
    progress.idle(50.0)
    assert not progress.is_stalled(52.0)
    progress.planned(1, 0, 52.0)
    assert not progress.is_stalled(54.9)


def test_work_that_is_never_planned_counts() -> None:
    """Sequences wait, nothing is in flight: that is no progress either."""
    progress = Progress()
    progress.idle(10.0)
    assert progress.is_stalled(13.1)
