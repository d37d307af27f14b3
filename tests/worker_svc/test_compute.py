"""Steps on their way through an engine: who launches them, and what happens when one fails."""

import contextlib
import threading
import time
from dataclasses import dataclass, field

import numpy as np
import pytest

from albireo.errors import GroupError
from albireo.ledger import RANK_COLUMNS, Ledger
from albireo.plan import StepPlan, StepResult, decode_rows
from worker_svc.batch import BatchState, InputBatch
from worker_svc.compute import PreparedStep, StepQueue, prepare, run_steps
from worker_svc.engine import StepOutput, StepTimes

NO_ROWS = decode_rows(np.zeros(0, dtype=np.int32))


@dataclass
class Device:
    """An engine whose steps are over when the test says so."""

    is_asynchronous: bool
    num_launched: int = 0
    launching_threads: list[int] = field(default_factory=list)
    results: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    failing_step: int = -1

    def launch(self, _batch: InputBatch) -> "Device":
        self.num_launched += 1
        self.launching_threads.append(threading.get_ident())
        if self.num_launched == self.failing_step:
            raise GroupError("a peer is lost")
        return self

    def resolve(self) -> StepOutput:
        assert self.results.acquire(timeout=10)
        now = time.monotonic_ns()
        return StepOutput(np.zeros(0, dtype=np.int32), StepTimes(now - 2_000, now, 1_500, 500, 100))


class Run:
    """The compute thread at work on a device's steps."""

    def __init__(self, device: Device) -> None:
        self.steps = StepQueue(device if device.is_asynchronous else None)  # type: ignore[arg-type]
        self.reported: list[StepResult] = []
        self.guards: list[str] = []
        self.error: GroupError | None = None
        self.ledger = Ledger("rank-0", RANK_COLUMNS)
        self._device = device
        self._state = BatchState(4, 64, 4, 64, 100, 64)
        self._num_put = 0
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def put(self) -> PreparedStep:
        step = prepare(self._state, StepPlan(1, self._num_put, NO_ROWS), time.monotonic_ns())
        self._num_put += 1
        self.steps.put(step)
        return step

    def wait_for(self, num: int) -> None:
        deadline = time.monotonic() + 10
        while self.ledger.num_added < num:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def _run(self) -> None:
        @contextlib.contextmanager
        def guard():
            self.guards.append("in")
            yield
            self.guards.append("out")

        try:
            report = self.reported.append
            run_steps(self._device, self.steps, report, guard, self.ledger, lambda: 300)  # type: ignore[arg-type]
        except GroupError as error:
            self.error = error


def test_an_asynchronous_engine_has_the_next_step_while_one_runs():
    device = Device(is_asynchronous=True)
    run = Run(device)
    for _ in range(3):
        run.put()
    assert device.num_launched == 3
    assert set(device.launching_threads) == {threading.get_ident()}
    assert run.reported == []
    device.results.release(3)
    run.wait_for(3)
    assert [result.step_id for result in run.reported] == [0, 1, 2]
    assert run.guards == ["in", "out"] * 3
    run.steps.end()
    run.thread.join(10)
    run.put()
    assert device.num_launched == 3, "launched after the end"


def test_another_engine_gets_one_step_after_the_other_from_the_compute_thread():
    device = Device(is_asynchronous=False)
    run = Run(device)
    for _ in range(3):
        run.put()
    device.results.release()
    run.wait_for(1)
    time.sleep(0.05)
    assert device.num_launched == 2
    assert set(device.launching_threads) == {run.thread.ident}
    device.results.release(2)
    run.wait_for(3)
    run.steps.end()
    run.thread.join(10)


@pytest.mark.parametrize("is_asynchronous", [True, False])
def test_a_launch_that_fails_is_raised_by_the_compute_thread_after_the_steps_before(is_asynchronous: bool):
    device = Device(is_asynchronous, failing_step=2)
    run = Run(device)
    for _ in range(3):
        run.put()
    device.results.release(3)
    run.thread.join(10)
    assert str(run.error) == "a peer is lost"
    assert [result.step_id for result in run.reported] == [0]


def test_what_a_broken_group_computes_is_not_reported():
    device = Device(is_asynchronous=True)
    run = Run(device)
    run.put()
    run.put()
    while run.guards != ["in"]:
        time.sleep(0.001)
    run.steps.end()
    device.results.release(2)
    run.thread.join(10)
    assert not run.thread.is_alive()
    assert run.reported == []
    assert run.ledger.num_added == 0


@pytest.mark.parametrize("is_asynchronous", [True, False])
def test_each_step_leaves_a_row(is_asynchronous: bool):
    device = Device(is_asynchronous)
    run = Run(device)
    device.results.release(2)
    steps = [run.put()]
    run.wait_for(1)
    steps.append(run.put())
    run.wait_for(2)
    rows = [dict(zip(RANK_COLUMNS, row, strict=True)) for row in run.ledger.latest().tolist()]
    for row, step in zip(rows, steps, strict=True):
        assert (row["step_id"], row["received_at_ns"]) == (step.step_id, step.received_at_ns)
        assert row["received_at_ns"] <= row["prepared_at_ns"] <= row["launched_at_ns"] <= row["end_at_ns"]
        assert row["end_at_ns"] - row["start_at_ns"] == row["forward_ns"] + row["sample_ns"]
        assert (row["collective_ns"], row["kv_ns"], row["num_rows"], row["num_tokens"]) == (100, 300, 0, 0)
    first, second = (result.timings for result in run.reported)
    assert first.idle_ns == 0
    assert second.idle_ns == rows[1]["start_at_ns"] - rows[0]["end_at_ns"]
    assert second.prepare_ns == rows[1]["prepared_at_ns"] - rows[1]["received_at_ns"]
