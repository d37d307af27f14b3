"""The step loop, and the worker group that it must not lose.

Each turn of the loop takes everything that has come in, then: commit, plan, send to the group, deliver to the front
ends. It awaits nothing but its wake-up: plans leave through a `PlanStream`, tokens through an outbox per front end.

Whatever goes wrong with the group or its stream has one cure: all sequences wait again with the tokens known so far,
and a new stream begins a new epoch as soon as the group is complete.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import structlog

from albireo.arrays import BoolArray, Int32Array
from albireo.errors import GroupError, GroupUnavailable
from albireo.kv.fingerprint import Namespace
from albireo.logprobs import places_where
from albireo.plan import StepResult
from albireo.rpc import Health
from albireo.security import Security
from albireo.tracing import Tracer
from albireo.v1 import frontend_pb2, plan_pb2
from scheduler_svc.planner.answers import apply_result
from scheduler_svc.planner.arrivals import abort_labelled, apply_message, end_all_of
from scheduler_svc.planner.commit import Committed, Ended, commit_step
from scheduler_svc.planner.deadlines import drop_overdue
from scheduler_svc.planner.frontends import FrontEnds
from scheduler_svc.planner.group import GroupLink, PlanStream
from scheduler_svc.planner.messages import Refused, ended_message, refusal_message
from scheduler_svc.planner.metrics import Counts, register_metrics
from scheduler_svc.planner.policy import plan_step
from scheduler_svc.planner.progress import Progress
from scheduler_svc.planner.rates import StepRates
from scheduler_svc.planner.sequence import EndReason
from scheduler_svc.planner.spans import SequenceSpans
from scheduler_svc.planner.state import Limits, PlannerState, end, lose_group, regain_group
from scheduler_svc.planner.store_link import StoreLink
from scheduler_svc.planner.swap_policy import SwapMode
from scheduler_svc.planner.throughput import Throughput
from scheduler_svc.planner.timeline import Timeline
from scheduler_svc.planner.transfer_metrics import register_transfer_metrics
from scheduler_svc.planner.transfers import TransferLimits, Transfers

_WATCH_INTERVAL_S = 0.25
_SUSPECT_LOSS_AFTER_S = 1.0
_RETRY_AFTER_S = (1.0, 30.0)  # what a refused client is told, at least and at most

log = structlog.get_logger()


class Planner:
    """One planner with one worker group.

    Args:
        status: of the group, which is ready.
        limits_of: what a group can hold, as the planner may use it.
        recovery_timeout_s: so long may a lost group stay away before its sequences fail.
        max_itl_s: prompts are computed in chunks so small that sequences which decode need not wait longer for their
            next token; 0: in chunks as large as the group takes.

    Attributes:
        frontends: the servicer that front ends attach to.
        timeline, counts: what traces and metrics are made of.
    """

    def __init__(
        self,
        group: GroupLink,
        status: plan_pb2.GroupStatus,
        limits_of: Callable[[plan_pb2.GroupInfo], Limits],
        recovery_timeout_s: float,
        max_itl_s: float = 0.0,
        tracer: Tracer | None = None,
    ) -> None:
        self._group = group
        self._limits_of = limits_of
        self._recovery_timeout_s = recovery_timeout_s
        self._max_itl_s = max_itl_s
        self._state = PlannerState.make(limits_of(status.info), epoch=status.epoch + 1)
        self._spans = SequenceSpans(tracer, self._state) if tracer is not None else None
        self._stream: PlanStream | None = group.open()  # None: the group is lost
        self._given_up = ""  # why sequences are refused: the group is away for too long
        self.frontends = FrontEnds(status.info, self._on_message)
        self._messages: deque[tuple[int, frontend_pb2.FrontendMessage | None]] = deque()  # None: it is gone
        self._results: deque[tuple[int, StepResult]] = deque()  # with the time of their arrival
        self._woken = asyncio.Event()
        self._progress = Progress()
        self._rates = StepRates()
        self._throughput = Throughput()
        self.timeline = Timeline()
        self._last_queue_s = 0.0
        self._num_arrivals = 0
        self.counts = Counts()
        self._store: StoreLink | None = None
        self._histograms = register_metrics(self._state, self.counts, self.frontends, self.timeline.ledger)

    def use_store(self, address: str, name: str, mode: SwapMode, security: Security) -> None:
        """From `run` on, blocks go to the KV store at ``address`` and come from it, if the group's can be stored.
        ``name``: ours, the same after a restart."""
        layout = self.frontends.group.kv_layout
        if not layout.num_parts:
            log.warning("the group's blocks cannot be stored", engine=self.frontends.group.engine, kv_store=address)
            return
        limits = TransferLimits(mode, block_bytes=layout.num_parts * layout.part_bytes)
        transfers = self._state.transfers = Transfers(limits, self._rates)
        register_transfer_metrics(transfers)
        namespace = Namespace(layout.fingerprint, layout.num_parts, layout.part_bytes)
        self._store = StoreLink(address, name, namespace, self._state, transfers, self._woken.set, security)

    async def run(self, health: Health) -> None:
        """Runs until another planner takes the group over (raises Superseded) or something fails."""
        work = [self._keep_group(), self._step_loop(), self._watch(health), self._find_lost_messages()]
        if self._store is not None:
            work += [self._store.run(), self._store.find_lost_transfers(self._fail_group)]
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
        self._results.append((time.monotonic_ns(), result))
        self._woken.set()

    def _on_begin(self) -> None:
        if self._state.transfers is not None:
            self._state.transfers.begin_epoch()
            self._woken.set()

    async def _step_loop(self) -> None:
        while True:
            await self._woken.wait()
            self._woken.clear()
            self._take_turn(time.monotonic_ns())

    def _take_turn(self, now_ns: int) -> None:
        """Commit, plan, send, deliver. Requests come before plans, so that they join the very next one."""
        self.timeline.begin_turn()
        messages, self._messages = self._messages, deque()
        committed = self._commit(now_ns)
        for index, message in messages:
            self._apply(index, message, now_ns)
        if self._state.deadlines:
            self._drop_overdue(now_ns)
        if self._stream is not None:
            self._plan(self._stream, now_ns)
        if self._store is not None:
            self._store.send(self._stream)
        deliver_start_ns = time.monotonic_ns()
        for one in committed:
            self._deliver(one, now_ns)
        if self._spans is not None:
            self._spans.keep_up(now_ns)
        self.timeline.end_turn(deliver_start_ns)

    def _commit(self, now_ns: int) -> list[Committed]:
        results, self._results = self._results, deque()
        committed = []
        for result_ns, result in results:
            if self._stream is None or result.epoch != self._state.epoch:
                continue
            start_ns = time.monotonic_ns()
            try:
                for transfer in result.transfers:
                    apply_result(self._state, transfer)
                if result.only_transfers:
                    if not self._state.in_flight:
                        self._progress.idle(result_ns / 1e9)  # those who wait for blocks get on
                    continue
                step_id, token_ids = result.step_id, result.token_ids
                committed.append(commit_step(self._state, step_id, token_ids, result.logprobs, result.prompt_logprobs))
            except GroupError as error:
                self._fail_group(str(error))
            else:
                num_prefill_tokens, duration_s = self._progress.completed(result_ns / 1e9)
                self._rates.observe(num_prefill_tokens, duration_s)
                self.timeline.committed(result_ns, start_ns)
        return committed

    def _plan(self, stream: PlanStream, now_ns: int) -> None:
        if self._max_itl_s:
            # At least a block, so that prompts get on whatever the limit.
            allowed = self._rates.prefill_tokens_within(self._max_itl_s)
            self._state.max_prefill_tokens = max(allowed, self._state.limits.block_size)
        start_ns = time.monotonic_ns()
        while (planned := plan_step(self._state)) is not None:
            stream.send(planned.plan)
            self._progress.planned(planned.num_tokens, planned.num_prefill_tokens, start_ns / 1e9)
            self.timeline.planned(planned.plan.step_id, start_ns, planned.num_rows, planned.num_tokens)
            start_ns = time.monotonic_ns()
            self.counts.num_steps += 1
            for sequence in planned.started:
                if not sequence.scheduled_ns:
                    sequence.scheduled_ns = now_ns
                    self._last_queue_s = (now_ns - sequence.submitted_ns) / 1e9
                    self.counts.num_prompt_tokens += sequence.num_prompt_tokens
                    self.counts.num_cached_tokens += sequence.num_cached_tokens

    def _apply(self, index: int, message: frontend_pb2.FrontendMessage | None, now_ns: int) -> None:
        if message is None:
            end_all_of(self._state, index)
            self._state.pool.followers.pop(index, None)
            return
        if message.HasField("follows_cache"):
            self._follow_cache(index, message.follows_cache)
        arrived = apply_message(self._state, index, message, self._num_arrivals, now_ns, self._rates)
        self._num_arrivals += len(message.submits)
        for sequence_id, refused in arrived.refused:
            self._refuse(index, sequence_id, refused)
        for ended in arrived.ended:
            self._post_ended(ended, now_ns)
        if self._given_up:
            self._fail_all(self._given_up)
        for sequence in abort_labelled(self._state, message.aborts) if message.aborts else ():
            self._post_ended(Ended(sequence, EndReason.ABORT), now_ns)

    def _follow_cache(self, index: int, follows: bool) -> None:
        self._state.pool.followers.pop(index, None)
        follower = self.frontends.follow_cache(index, follows)
        if follower is not None:
            self._state.pool.follow(index, follower)

    def _deliver(self, committed: Committed, now_ns: int) -> None:
        self.counts.num_tokens += len(committed.token_ids)
        for sequence in committed.beginners:
            sequence.first_token_ns = now_ns
            self.frontends.post_started(sequence.frontend, sequence.sequence_id, sequence.num_cached_tokens)
        for sequence, first_position, of_prompt in committed.scored:
            self.frontends.post_prompt_logprobs(sequence.frontend, sequence.sequence_id, first_position, of_prompt)
        for index, mine in _by_frontend(committed.frontends):
            logprobs = committed.logprobs
            if logprobs is not None and not isinstance(mine, slice):
                logprobs = logprobs.of_tokens(places_where(mine))
            self.frontends.post_tokens(index, committed.sequence_ids[mine], committed.token_ids[mine], logprobs)
        for ended in committed.ended:
            self._post_ended(ended, now_ns)

    def _post_ended(self, ended: Ended, now_ns: int) -> None:
        self.frontends.post_ended(ended.sequence.frontend, ended_message(ended, now_ns))

    def _refuse(self, index: int, sequence_id: int, refused: Refused) -> None:
        # Whoever comes now waits about as long as the one who has just started did.
        retry_after_s = min(max(self._last_queue_s, _RETRY_AFTER_S[0]), _RETRY_AFTER_S[1])
        self.frontends.post_ended(index, refusal_message(sequence_id, refused, retry_after_s))

    def _drop_overdue(self, now_ns: int) -> None:
        for sequence in drop_overdue(self._state, now_ns):
            self.counts.num_overdue += 1
            waited_s = (now_ns - sequence.submitted_ns) / 1e9
            state = "it ran out while the request ran" if sequence.scheduled_ns else "too late to begin"
            late = Refused(f"deadline: {state}, {waited_s:.3g} s after arrival", grpc.StatusCode.DEADLINE_EXCEEDED)
            self._refuse(sequence.frontend, sequence.sequence_id, late)
            self._woken.set()  # others may have its place

    # The group: lost and regained.

    async def _keep_group(self) -> None:
        while True:
            stream = self._stream
            assert stream is not None
            try:
                await stream.run(self._on_begin, self._on_result)
            except GroupUnavailable as error:
                self._lose_group(str(error))
            await self._regain_group()

    def _fail_group(self, reason: str) -> None:
        if self._stream is not None:
            self._stream.fail(reason)
            self._lose_group(reason)

    def _lose_group(self, reason: str) -> None:
        if self._stream is None:
            return
        self._stream = None
        log.warning("the group is lost", reason=reason, epoch=self._state.epoch, running=self._state.table.num_running)
        self._progress.forget_steps(time.monotonic())
        self.timeline.forget_steps()
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
        self.counts.num_recoveries += 1
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
                self._fail_group(f"messages about step {suspect[1]} are lost")
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
            self._drop_overdue(time.monotonic_ns())  # where no step's end is near
            if self._spans is not None:
                self._spans.keep_up(time.monotonic_ns())  # as well
            self._state.buckets.settle(self._state.tenants.take_tokens(), time.monotonic_ns())
            self._histograms.fold()
            self.frontends.post_load(self._load(is_serving, now))
            await asyncio.sleep(_WATCH_INTERVAL_S)

    def _load(self, is_serving: bool, now: float) -> frontend_pb2.Load:
        return frontend_pb2.Load(
            num_running=self._state.table.num_running,
            num_waiting=self._state.queue.num_waiting,
            num_used_blocks=self._state.pool.num_held,
            is_serving=is_serving,
            num_waiting_tokens=self._state.queue.num_waiting_tokens,
            tokens_per_s=self._throughput.observe(self.counts.num_tokens, now),
            cache_hit_rate=self.counts.num_cached_tokens / max(1, self.counts.num_prompt_tokens),
        )


def _by_frontend(frontends: Int32Array) -> Iterator[tuple[int, BoolArray | slice]]:
    """Whose tokens are whose; with one front end, all are its without looking twice."""
    if len(frontends) and (frontends == frontends[0]).all():
        yield int(frontends[0]), slice(None)
        return
    for index in np.unique(frontends).tolist():
        yield index, frontends == index


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
    layout = info.kv_layout
    blocks = layout.fingerprint, layout.num_parts, layout.part_bytes
    return info.vocab_size, info.max_model_len, tuple(info.eos_token_ids), blocks
