"""The step loop, and the worker group that it must not lose.

Each turn of the loop takes everything that has come in, then: commit, plan, send to the group, deliver to the front
ends. It awaits nothing but its wake-up: plans leave through a `PlanStream`, tokens through an outbox per front end.

Whatever goes wrong with the group or its stream has one cure: all sequences wait again with the tokens known so far,
and a new stream begins a new epoch as soon as the group is complete.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable

import grpc
import numpy as np
import structlog

from albireo.errors import GroupError, GroupUnavailable
from albireo.metrics import Readings
from albireo.plan import StepResult
from albireo.rpc import Health
from albireo.v1 import frontend_pb2, generation_pb2, plan_pb2
from scheduler_svc.planner.arrivals import Refused, abort_labelled, apply_message, end_all_of
from scheduler_svc.planner.commit import Committed, Ended, commit_step
from scheduler_svc.planner.frontends import FrontEnds
from scheduler_svc.planner.group import GroupLink, PlanStream
from scheduler_svc.planner.policy import plan_step
from scheduler_svc.planner.progress import Progress
from scheduler_svc.planner.sequence import EndReason, Sequence
from scheduler_svc.planner.state import Limits, PlannerState, end, lose_group, regain_group

_WATCH_INTERVAL_S = 0.25
_SUSPECT_LOSS_AFTER_S = 1.0
_RETRY_AFTER_S = (1.0, 30.0)  # what a refused client is told, at least and at most

_REASONS = {
    EndReason.STOP: generation_pb2.FINISH_REASON_STOP,
    EndReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
    EndReason.ABORT: generation_pb2.FINISH_REASON_ABORT,
}

log = structlog.get_logger()


class Planner:
    """One planner with one worker group.

    Args:
        status: of the group, which is ready.
        limits_of: what a group can hold, as the planner may use it.
        recovery_timeout_s: so long may a lost group stay away before its sequences fail.
    """

    def __init__(
        self,
        group: GroupLink,
        status: plan_pb2.GroupStatus,
        limits_of: Callable[[plan_pb2.GroupInfo], Limits],
        recovery_timeout_s: float,
    ) -> None:
        self._group = group
        self._limits_of = limits_of
        self._recovery_timeout_s = recovery_timeout_s
        self._state = PlannerState.make(limits_of(status.info), epoch=status.epoch + 1)
        self._stream: PlanStream | None = group.open()  # None: the group is lost
        self._given_up = ""  # why sequences are refused: the group is away for too long
        self.frontends = FrontEnds(status.info, self._on_message)
        self._messages: deque[tuple[int, frontend_pb2.FrontendMessage | None]] = deque()  # None: it is gone
        self._results: deque[StepResult] = deque()
        self._woken = asyncio.Event()
        self._progress = Progress()
        self._last_queue_s = 0.0
        self._num_arrivals = 0
        self._num_steps = self._num_tokens = self._num_preemptions = self._num_recoveries = 0
        self._make_metrics()

    async def run(self, health: Health) -> None:
        """Runs until another planner takes the group over (raises Superseded) or something fails."""
        work = [self._keep_group(), self._step_loop(), self._watch(health), self._find_lost_messages()]
        tasks = [asyncio.create_task(each) for each in work]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # The step loop.

    def _on_message(self, index: int, message: frontend_pb2.FrontendMessage | None) -> None:
        self._messages.append((index, message))
        self._woken.set()

    def _on_result(self, result: StepResult) -> None:
        self._results.append(result)
        self._woken.set()

    async def _step_loop(self) -> None:
        while True:
            await self._woken.wait()
            self._woken.clear()
            self._take_turn(time.monotonic_ns())

    def _take_turn(self, now_ns: int) -> None:
        """Commit, plan, send, deliver. Requests come before plans, so that they join the very next one."""
        messages, self._messages = self._messages, deque()
        committed = self._commit(now_ns)
        for index, message in messages:
            self._apply(index, message, now_ns)
        if self._stream is not None:
            self._plan(self._stream, now_ns)
        for one in committed:
            self._deliver(one, now_ns)

    def _commit(self, now_ns: int) -> list[Committed]:
        results, self._results = self._results, deque()
        committed = []
        for result in results:
            if self._stream is None or result.epoch != self._state.epoch:
                continue
            try:
                committed.append(commit_step(self._state, result.step_id, result.token_ids))
            except GroupError as error:
                self._stream.fail(str(error))
                self._lose_group(str(error))
            else:
                self._progress.completed(now_ns / 1e9)
        return committed

    def _plan(self, stream: PlanStream, now_ns: int) -> None:
        while (planned := plan_step(self._state)) is not None:
            stream.send(planned.plan)
            self._progress.planned(planned.num_tokens, now_ns / 1e9)
            self._num_steps += 1
            self._num_preemptions += len(planned.preempted)
            for sequence in planned.started:
                if not sequence.scheduled_ns:
                    sequence.scheduled_ns = now_ns
                    self._last_queue_s = (now_ns - sequence.submitted_ns) / 1e9

    def _apply(self, index: int, message: frontend_pb2.FrontendMessage | None, now_ns: int) -> None:
        if message is None:
            end_all_of(self._state, index)
            return
        arrived = apply_message(self._state, index, message, self._num_arrivals, now_ns)
        self._num_arrivals += len(message.submits)
        for sequence_id, refused in arrived.refused:
            self._refuse(index, sequence_id, refused)
        for ended in arrived.ended:
            self._post_ended(ended, now_ns)
        if self._given_up:
            self._fail_all(self._given_up)
        for sequence in abort_labelled(self._state, set(message.abort_labels)) if message.abort_labels else ():
            self._post_ended(Ended(sequence, EndReason.ABORT), now_ns)

    def _deliver(self, committed: Committed, now_ns: int) -> None:
        self._num_tokens += len(committed.token_ids)
        for sequence in committed.first_tokens:
            sequence.first_token_ns = now_ns
        for index in np.unique(committed.frontends):
            mine = committed.frontends == index
            self.frontends.post_tokens(int(index), committed.sequence_ids[mine], committed.token_ids[mine])
        for ended in committed.ended:
            self._post_ended(ended, now_ns)

    def _post_ended(self, ended: Ended, now_ns: int) -> None:
        self.frontends.post_ended(ended.sequence.frontend, _ended_message(ended, now_ns))

    def _refuse(self, index: int, sequence_id: int, refused: Refused) -> None:
        refusal = frontend_pb2.Refusal(code=refused.code.value[0], message=str(refused))
        if refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            # Whoever comes now waits about as long as the one who has just started did.
            refusal.retry_after_s = min(max(self._last_queue_s, _RETRY_AFTER_S[0]), _RETRY_AFTER_S[1])
        self.frontends.post_ended(index, frontend_pb2.Ended(sequence_id=sequence_id, refusal=refusal))

    # The group: lost and regained.

    async def _keep_group(self) -> None:
        while True:
            stream = self._stream
            assert stream is not None
            try:
                await stream.run(self._on_result)
            except GroupUnavailable as error:
                self._lose_group(str(error))
            await self._regain_group()

    def _lose_group(self, reason: str) -> None:
        if self._stream is None:
            return
        self._stream = None
        log.warning("the group is lost", reason=reason, epoch=self._state.epoch, running=self._state.num_running)
        self._progress.forget_steps(time.monotonic())
        for sequence in lose_group(self._state):
            failed = Refused("the worker group failed again and again at this request", grpc.StatusCode.INTERNAL)
            self._refuse(sequence.frontend, sequence.sequence_id, failed)

    async def _regain_group(self) -> None:
        lost_at = time.monotonic()
        timeout_s = self._recovery_timeout_s
        deadline = asyncio.get_running_loop().call_later(timeout_s, self._give_up)
        status = await self._group.wait_until_ready()
        deadline.cancel()
        if _model_of(status.info) != _model_of(self.frontends.group):
            raise GroupUnavailable("the worker group serves another model than before")
        epoch = max(self._state.epoch, status.epoch) + 1
        regain_group(self._state, self._limits_of(status.info), epoch)
        self.frontends.group = status.info
        self._given_up = ""
        self._stream = self._group.open()
        self._num_recoveries += 1
        self._woken.set()
        log.info("the group is back", epoch=epoch, after_s=round(time.monotonic() - lost_at, 3))

    def _give_up(self) -> None:
        self._given_up = f"the worker group is away for more than {self._recovery_timeout_s:g} s"
        log.error("the group did not come back in time", sequences=len(self._state.sequences))
        self._fail_all(self._given_up)

    def _fail_all(self, reason: str) -> None:
        for sequence in list(self._state.sequences.values()):
            end(self._state, sequence)
            unavailable = Refused(reason, grpc.StatusCode.UNAVAILABLE)
            self._refuse(sequence.frontend, sequence.sequence_id, unavailable)

    async def _find_lost_messages(self) -> None:
        """A plan or result that got lost shows by the next one; where none comes, by what the leader says."""
        last_suspect: tuple[int, int] | None = None
        while True:
            await asyncio.sleep(_SUSPECT_LOSS_AFTER_S)
            stream = self._stream
            if stream is None or self._progress.waited_s(time.monotonic()) < _SUSPECT_LOSS_AFTER_S:
                continue
            try:
                status = await self._group.status()
            except GroupUnavailable:
                continue  # the stream will tell
            suspect = _find_lost(self._state, status)
            if suspect is not None and suspect == last_suspect and stream is self._stream:
                stream.fail(f"messages about step {suspect[1]} are lost")
                self._lose_group(f"messages about step {suspect[1]} are lost")
            last_suspect = suspect

    # Health and figures.

    async def _watch(self, health: Health) -> None:
        was_serving = False
        while True:
            now = time.monotonic()
            if not self._state.sequences:
                self._progress.idle(now)
            is_serving = self._stream is not None and not self._progress.is_stalled(now)
            if is_serving is not was_serving:
                await health.set_serving(is_serving)
                log.info("health", serving=is_serving, waited_s=round(self._progress.waited_s(now), 3))
            was_serving = is_serving
            self.frontends.drop_stuck(now)
            self.frontends.post_load(
                frontend_pb2.Load(
                    num_running=self._state.num_running,
                    num_waiting=self._state.num_waiting,
                    num_used_blocks=self._state.pool.num_held,
                    is_serving=is_serving,
                )
            )
            await asyncio.sleep(_WATCH_INTERVAL_S)

    def _make_metrics(self) -> Readings:
        state = self._state
        return Readings(
            gauges={
                "albireo_running_sequences": ("Sequences that own a slot", lambda: state.num_running),
                "albireo_waiting_sequences": ("Sequences in the queue", lambda: state.num_waiting),
                "albireo_kv_blocks_used": ("KV blocks held by sequences", lambda: state.pool.num_held),
                "albireo_kv_blocks": ("KV blocks in all", lambda: state.pool.num_blocks),
                "albireo_steps_in_flight": ("Plans sent without a result yet", lambda: len(state.in_flight)),
                "albireo_frontends": ("Front ends attached", lambda: len(self.frontends)),
            },
            counters={
                "albireo_planned_steps": ("Steps planned", lambda: self._num_steps),
                "albireo_output_tokens": ("Output tokens committed", lambda: self._num_tokens),
                "albireo_preemptions": ("Sequences preempted", lambda: self._num_preemptions),
                "albireo_recoveries": ("Times that a lost group came back", lambda: self._num_recoveries),
            },
        )


def _find_lost(state: PlannerState, status: plan_pb2.GroupStatus) -> tuple[int, int] | None:
    """(epoch, step) whose plan has not reached the leader or whose result has not reached us; None when the group is
    at work on the oldest step in flight. Messages may only be slow: the same answer twice means lost."""
    if not state.in_flight:
        return None
    oldest = state.in_flight[0].step_id
    plans_are_there = status.epoch == state.epoch and status.next_step_id == state.next_step_id
    is_at_work = plans_are_there and oldest >= status.next_step_id - status.num_queued
    return None if is_at_work else (state.epoch, oldest)


def _model_of(info: plan_pb2.GroupInfo) -> tuple[object, ...]:
    """What must not change while sequences live."""
    return info.vocab_size, info.max_model_len, tuple(info.eos_token_ids)


def _ended_message(ended: Ended, now_ns: int) -> frontend_pb2.Ended:
    sequence: Sequence = ended.sequence
    scheduled_ns = sequence.scheduled_ns or now_ns
    first_token_ns = sequence.first_token_ns or now_ns
    return frontend_pb2.Ended(
        sequence_id=sequence.sequence_id,
        reason=_REASONS[ended.reason],
        matched_token_id=ended.matched_token_id,
        num_output_tokens=len(sequence.token_ids) - sequence.num_prompt_tokens,
        timings=generation_pb2.Timings(
            queue_s=(scheduled_ns - sequence.submitted_ns) / 1e9,
            prefill_s=(first_token_ns - scheduled_ns) / 1e9,
            decode_s=(now_ns - first_token_ns) / 1e9,
            num_preemptions=sequence.num_preemptions,
        ),
    )
