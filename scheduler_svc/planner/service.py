"""The step loop, and the servicer that front ends attach to.

Each turn of the loop takes everything that has come in, then: commit, plan, send to the group, deliver to the front
ends. It awaits nothing but its wake-up: plans leave through `GroupLink`, tokens through an `Outbox` per front end.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc
import numpy as np
import structlog
from grpc import aio

from albireo.arrays import BoolArray
from albireo.metrics import Readings
from albireo.plan import StepResult
from albireo.v1 import frontend_pb2, generation_pb2, plan_pb2
from scheduler_svc.planner.arrivals import abort_labelled, apply_message, end_all_of
from scheduler_svc.planner.commit import Committed, commit_step
from scheduler_svc.planner.group import GroupLink
from scheduler_svc.planner.outbox import MAX_BACKLOG_TOKENS, Outbox
from scheduler_svc.planner.policy import plan_step
from scheduler_svc.planner.sequence import EndReason, Sequence
from scheduler_svc.planner.state import PlannerState

SERVICE_NAME = "albireo.v1.Planner"
_LOAD_INTERVAL_S = 0.25

_REASONS = {
    EndReason.STOP: generation_pb2.FINISH_REASON_STOP,
    EndReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
    EndReason.ABORT: generation_pb2.FINISH_REASON_ABORT,
}

log = structlog.get_logger()


@dataclass(slots=True)
class _FrontEnd:
    """An attached front end."""

    name: str
    outbox: Outbox = field(default_factory=Outbox)
    gone: asyncio.Event = field(default_factory=asyncio.Event)


class PlannerService:
    """One planner with one worker group. Servicer of albireo.v1.Planner."""

    def __init__(self, state: PlannerState, group: GroupLink, info: plan_pb2.GroupInfo) -> None:
        self._state = state
        self._group = group
        self._info = info
        self._frontends: dict[int, _FrontEnd] = {}
        self._num_attached = 0
        self._num_arrivals = 0
        self._messages: deque[tuple[int, frontend_pb2.FrontendMessage | None]] = deque()  # None: it is gone
        self._results: deque[StepResult] = deque()
        self._woken = asyncio.Event()
        self._num_steps = self._num_tokens = self._num_preemptions = 0
        self._metrics = self._make_metrics()

    async def run(self) -> None:
        """Runs the step loop until the group is lost; then raises GroupUnavailable."""
        tasks = [
            asyncio.create_task(self._group.run(self._on_result)),
            asyncio.create_task(self._step_loop()),
            asyncio.create_task(self._publish_load()),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()

    async def Attach(  # gRPC's name
        self,
        messages: AsyncIterator[frontend_pb2.FrontendMessage],
        context: "aio.ServicerContext[frontend_pb2.FrontendMessage, frontend_pb2.PlannerMessage]",
    ) -> AsyncIterator[frontend_pb2.PlannerMessage]:
        """A front end's stream: its messages in, its tokens out; its end gives back all its sequences."""
        hello = await anext(aiter(messages), None)
        if hello is None or not hello.HasField("hello"):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message is a hello")
        assert hello is not None
        index, self._num_attached = self._num_attached, self._num_attached + 1
        frontend = self._frontends[index] = _FrontEnd(hello.hello.name)
        log.info("front end attached", frontend=frontend.name)
        reader = asyncio.create_task(self._read(index, frontend, messages))
        try:
            yield frontend_pb2.PlannerMessage(welcome=frontend_pb2.Welcome(group=self._info))
            while not frontend.gone.is_set():
                yield await frontend.outbox.take()
        finally:
            reader.cancel()
            del self._frontends[index]
            self._messages.append((index, None))
            self._woken.set()
            log.info("front end detached", frontend=frontend.name)

    async def _read(
        self, index: int, frontend: _FrontEnd, messages: AsyncIterator[frontend_pb2.FrontendMessage]
    ) -> None:
        with contextlib.suppress(aio.AioRpcError, asyncio.CancelledError):
            async for message in messages:
                self._messages.append((index, message))
                self._woken.set()
        frontend.gone.set()
        frontend.outbox.wake()

    def _on_result(self, result: StepResult) -> None:
        if result.epoch == self._state.epoch:
            self._results.append(result)
            self._woken.set()

    async def _step_loop(self) -> None:
        while True:
            await self._woken.wait()
            self._woken.clear()
            self._take_turn(time.monotonic_ns())

    def _take_turn(self, now_ns: int) -> None:
        """Commit, plan, send, deliver. Requests come before plans, so that they join the very next one."""
        results, self._results = self._results, deque()
        messages, self._messages = self._messages, deque()
        committed = [commit_step(self._state, result.step_id, result.token_ids) for result in results]
        for index, message in messages:
            self._apply(index, message, now_ns)
        while (planned := plan_step(self._state)) is not None:
            self._group.send(planned.plan)
            self._num_steps += 1
            self._num_preemptions += len(planned.preempted)
            for sequence in planned.started:
                sequence.scheduled_ns = sequence.scheduled_ns or now_ns
        for one in committed:
            self._deliver(one, now_ns)

    def _apply(self, index: int, message: frontend_pb2.FrontendMessage | None, now_ns: int) -> None:
        if message is None:
            end_all_of(self._state, index)
            return
        refused = apply_message(self._state, index, message, self._num_arrivals, now_ns)
        self._num_arrivals += len(message.submits)
        for ended in refused:
            self._post_ended(index, ended)
        if message.abort_labels:
            for sequence in abort_labelled(self._state, set(message.abort_labels)):
                self._post_ended(sequence.frontend, _ended_message(sequence, EndReason.ABORT, None, now_ns))

    def _deliver(self, committed: Committed, now_ns: int) -> None:
        self._num_tokens += len(committed.token_ids)
        for sequence in committed.first_tokens:
            sequence.first_token_ns = now_ns
        for index in np.unique(committed.frontends):
            self._post_tokens(int(index), committed, committed.frontends == index)
        for one in committed.ended:
            message = _ended_message(one.sequence, one.reason, one.matched_token_id, now_ns)
            self._post_ended(one.sequence.frontend, message)

    def _post_tokens(self, index: int, committed: Committed, mine: BoolArray) -> None:
        frontend = self._frontends.get(index)
        if frontend is None:
            return
        frontend.outbox.add_tokens(committed.sequence_ids[mine], committed.token_ids[mine])
        if frontend.outbox.backlog_tokens > MAX_BACKLOG_TOKENS and not frontend.gone.is_set():
            log.error("front end does not read", frontend=frontend.name, backlog=frontend.outbox.backlog_tokens)
            frontend.gone.set()

    def _post_ended(self, index: int, ended: frontend_pb2.Ended) -> None:
        frontend = self._frontends.get(index)
        if frontend is not None:
            frontend.outbox.add_ended(ended)

    async def _publish_load(self) -> None:
        while True:
            await asyncio.sleep(_LOAD_INTERVAL_S)
            load = frontend_pb2.Load(
                num_running=self._state.num_running,
                num_waiting=self._state.num_waiting,
                num_used_blocks=self._state.pool.num_held,
            )
            for frontend in self._frontends.values():
                frontend.outbox.set_load(load)

    def _make_metrics(self) -> Readings:
        state = self._state
        return Readings(
            gauges={
                "albireo_running_sequences": ("Sequences that own a slot", lambda: state.num_running),
                "albireo_waiting_sequences": ("Sequences in the queue", lambda: state.num_waiting),
                "albireo_kv_blocks_used": ("KV blocks held by sequences", lambda: state.pool.num_held),
                "albireo_kv_blocks": ("KV blocks in all", lambda: state.pool.num_blocks),
                "albireo_steps_in_flight": ("Plans sent without a result yet", lambda: len(state.in_flight)),
                "albireo_frontends": ("Front ends attached", lambda: len(self._frontends)),
            },
            counters={
                "albireo_planned_steps": ("Steps planned", lambda: self._num_steps),
                "albireo_output_tokens": ("Output tokens committed", lambda: self._num_tokens),
                "albireo_preemptions": ("Sequences preempted", lambda: self._num_preemptions),
            },
        )


def _ended_message(
    sequence: Sequence, reason: EndReason, matched_token_id: int | None, now_ns: int
) -> frontend_pb2.Ended:
    scheduled_ns = sequence.scheduled_ns or now_ns
    first_token_ns = sequence.first_token_ns or now_ns
    return frontend_pb2.Ended(
        sequence_id=sequence.sequence_id,
        reason=_REASONS[reason],
        matched_token_id=matched_token_id,
        num_output_tokens=len(sequence.token_ids) - sequence.num_prompt_tokens,
        timings=generation_pb2.Timings(
            queue_s=(scheduled_ns - sequence.submitted_ns) / 1e9,
            prefill_s=(first_token_ns - scheduled_ns) / 1e9,
            decode_s=(now_ns - first_token_ns) / 1e9,
            num_preemptions=sequence.num_preemptions,
        ),
    )
