"""The compute thread of a rank: takes prepared steps in order and launches them. Nothing else runs there."""

import time
from collections.abc import Callable
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


StepQueue = SimpleQueue[PreparedStep | None]  # None ends the loop


def prepare(state: BatchState, plan: StepPlan) -> PreparedStep:
    """Applies a plan to the batch state (T2)."""
    start = time.perf_counter_ns()
    batch = state.apply(plan)
    return PreparedStep(plan.epoch, plan.step_id, batch, time.perf_counter_ns() - start)


def run_steps(engine: Engine, steps: StepQueue, report: Callable[[StepResult], None]) -> None:
    """Runs steps until the queue says None. ``report`` is called from this thread, in the order of the steps."""
    while True:
        waiting_since = time.perf_counter_ns()
        step = steps.get()
        if step is None:
            return
        idle_ns = time.perf_counter_ns() - waiting_since
        output = engine.launch(step.batch).resolve()
        output.timings.prepare_ns += step.prepare_ns
        output.timings.idle_ns = idle_ns
        report(StepResult(step.epoch, step.step_id, output.token_ids, output.timings))
