"""The compute thread of a rank: takes prepared steps in order and launches them. Nothing else runs there."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from queue import SimpleQueue

from albireo.plan import StepPlan, StepResult
from worker_svc.batch import BatchState, InputBatch
from worker_svc.engine import Engine


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """A step whose inputs are ready; made by the I/O thread while the step before it runs."""

    epoch: int
    step_id: int
    batch: InputBatch
    prepare_ns: int


class StepQueue:
    """Prepared steps of one group, on their way to the compute thread. Any thread may put, or end."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[PreparedStep | None] = SimpleQueue()
        self.has_ended = False

    def put(self, step: PreparedStep) -> None:
        self._queue.put(step)

    def end(self) -> None:
        """The group is broken: what still waits is not run."""
        self.has_ended = True
        self._queue.put(None)

    def get(self) -> PreparedStep | None:
        """Waits for the next step; None at the end."""
        step = self._queue.get()
        return None if self.has_ended else step


def prepare(state: BatchState, plan: StepPlan) -> PreparedStep:
    """Applies a plan to the batch state (T2)."""
    start = time.perf_counter_ns()
    batch = state.apply(plan)
    return PreparedStep(plan.epoch, plan.step_id, batch, time.perf_counter_ns() - start)


def run_steps(
    engine: Engine,
    steps: StepQueue,
    report: Callable[[StepResult], None],
    guard: Callable[[], AbstractContextManager[None]],
) -> None:
    """Runs steps until the queue ends.

    Args:
        report: called from this thread, in the order of the steps.
        guard: each step runs inside one of these.
    """
    while True:
        waiting_since = time.perf_counter_ns()
        step = steps.get()
        if step is None:
            return
        idle_ns = time.perf_counter_ns() - waiting_since
        with guard():
            output = engine.launch(step.batch).resolve()
        if steps.has_ended:  # meanwhile: its tokens may be those of an aborted collective
            return
        output.timings.prepare_ns += step.prepare_ns
        output.timings.idle_ns = idle_ns
        report(StepResult(step.epoch, step.step_id, output.token_ids, output.timings))
