"""Steps on their way through a rank's engine: prepared by the I/O thread, launched, resolved by the compute thread.

An asynchronous engine gets each step from the I/O thread, at once: no hand-over lies between a plan and the device, and
the compute thread has nothing to do but to wait for results. Otherwise the compute thread does all the engine's work.
"""

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np

from albireo.ledger import Ledger
from albireo.logprobs import places_where
from albireo.plan import StepPlan, StepResult
from albireo.v1 import plan_pb2
from worker_svc.batch import BatchState, InputBatch
from worker_svc.engine import Engine, PendingStep, StepOutput, StepTimes


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """A step whose inputs are ready; made by the I/O thread while the step before it runs."""

    epoch: int
    step_id: int
    batch: InputBatch
    received_at_ns: int
    prepared_at_ns: int


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step that the engine has been given."""

    prepared: PreparedStep
    pending: PendingStep
    launched_at_ns: int


class StepQueue:
    """Prepared steps of one group, on their way to the compute thread. Any thread may put, or end.

    Args:
        engine: an asynchronous one, which gets each step when it is put.
    """

    def __init__(self, engine: Engine | None = None) -> None:
        self._engine = engine
        self._queue: SimpleQueue[PreparedStep | LaunchedStep | None] = SimpleQueue()
        self._lock = threading.Lock()
        self.has_ended = False

    def put(self, step: PreparedStep) -> None:
        if self._engine is None:
            self._queue.put(step)
            return
        with self._lock:
            if not self.has_ended:
                self._queue.put(_launch(self._engine, step))

    def end(self) -> None:
        """The group is broken: what still waits is not run, and nothing is launched any more."""
        with self._lock:
            self.has_ended = True
        self._queue.put(None)

    def get(self) -> PreparedStep | LaunchedStep | None:
        """Waits for the next step; None at the end."""
        step = self._queue.get()
        return None if self.has_ended else step


def prepare(state: BatchState, plan: StepPlan, received_at_ns: int) -> PreparedStep:
    """Applies a plan, which arrived then, to the batch state (T2)."""
    batch = state.apply(plan)
    return PreparedStep(plan.epoch, plan.step_id, batch, received_at_ns, time.monotonic_ns())


def run_steps(
    engine: Engine,
    steps: StepQueue,
    report: Callable[[StepResult], None],
    guard: Callable[[], AbstractContextManager[None]],
    ledger: Ledger,
    step_completed: Callable[[], int],
) -> None:
    """Runs steps until the queue ends; the compute thread's loop.

    Args:
        report: called from this thread, in the order of the steps.
        guard: each step runs inside one of these.
        ledger: gets a row of `RANK_COLUMNS` for each step.
        step_completed: told of each; returns for how long KV transfers ran since the one before, ns.
    Raises GroupError when the engine has lost a peer.
    """
    last_end_ns = 0
    while (step := steps.get()) is not None:
        with guard():
            launched = step if isinstance(step, LaunchedStep) else _start(engine, step)
            output = launched.pending.resolve()
        if steps.has_ended:  # meanwhile: its tokens may be those of an aborted collective
            return
        prepared, times = launched.prepared, output.times
        timings = _timings(prepared, times, last_end_ns)
        report(step_result(prepared, output, timings))
        _record(ledger, launched, times, step_completed())
        last_end_ns = times.end_at_ns


def step_result(step: PreparedStep, output: StepOutput, timings: plan_pb2.StepTimings) -> StepResult:
    """Parts what was sampled from what was scored."""
    num_sampled, told = len(step.batch.sample_slots), output.logprobs
    token_ids = output.token_ids[:num_sampled]
    if told is None or not len(step.batch.scored_token_ids):
        return StepResult(step.epoch, step.step_id, token_ids, timings, told)
    is_sampled = np.arange(len(output.token_ids)) < num_sampled
    sampled, scored = (told.of_tokens(places_where(which)) for which in (is_sampled, ~is_sampled))
    return StepResult(step.epoch, step.step_id, token_ids, timings, sampled if len(sampled.indices) else None, scored)


def _launch(engine: Engine, step: PreparedStep) -> LaunchedStep:
    """Hands a step to an asynchronous engine. What goes wrong is raised by its `resolve`, on the compute thread."""
    try:
        pending = engine.launch(step.batch)
    except Exception as error:  # noqa: BLE001  # raised again
        pending = _Failed(error)
    return LaunchedStep(step, pending, time.monotonic_ns())


def _start(engine: Engine, step: PreparedStep) -> LaunchedStep:
    """Has an engine that is not asynchronous do most of a step."""
    launched_at_ns = time.monotonic_ns()
    return LaunchedStep(step, engine.launch(step.batch), launched_at_ns)


@dataclass(frozen=True, slots=True)
class _Failed:
    error: Exception

    def resolve(self) -> StepOutput:
        raise self.error


def _timings(step: PreparedStep, times: StepTimes, last_end_ns: int) -> plan_pb2.StepTimings:
    return plan_pb2.StepTimings(
        prepare_ns=step.prepared_at_ns - step.received_at_ns,
        forward_ns=times.forward_ns,
        sample_ns=times.sample_ns,
        idle_ns=max(0, times.start_at_ns - last_end_ns) if last_end_ns else 0,
    )


def _record(ledger: Ledger, launched: LaunchedStep, times: StepTimes, kv_ns: int) -> None:
    step = launched.prepared
    ledger.add(
        step.step_id,
        step.received_at_ns,
        step.prepared_at_ns,
        min(launched.launched_at_ns, times.start_at_ns),  # a device that is idle begins before `launch` returns
        times.start_at_ns,
        times.end_at_ns,
        times.forward_ns,
        times.sample_ns,
        times.collective_ns,
        kv_ns,
        len(step.batch.slots),
        len(step.batch.positions),
    )
