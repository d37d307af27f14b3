"""The service of a worker group: its status and the plan stream. Runs on the leader's I/O loop.

A plan is prepared and handed to our own engine first, then relayed: the other ranks launch a moment later instead of
everyone. Plans and results pass as bytes, so that each is coded only once.

Transfers of a stream do not outlive it: the next one is not read from before they have ended on all ranks.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import structlog
from grpc import aio

from albireo.errors import GroupError
from albireo.metrics import Readings
from albireo.plan import StepResult, decode_plan, encode_result, transfers_result
from albireo.tracing import Tracer
from albireo.transfers import TransferResult
from albireo.v1 import plan_pb2
from worker_svc.batch import BatchState
from worker_svc.compute import StepQueue
from worker_svc.device_spans import DeviceSpans
from worker_svc.intake import Intake
from worker_svc.relay import Kind
from worker_svc.transfer_board import TransferBoard
from worker_svc.transfers import Transfers

SERVICE_NAME = "albireo.v1.WorkerGroup"

# A planner has a few plans in flight; one that sends more does not wait for results, and memory would not bound it.
MAX_PLANS_QUEUED = 16
_ABANDON_WITHIN_S = 5.0

log = structlog.get_logger()


class _PlanStream:
    """One planner's stream."""

    def __init__(self, intake: Intake) -> None:
        self.intake = intake  # with a state of this stream alone: nothing of a plan that was half applied survives it
        self.epoch = 0
        self.num_taken = self.num_left = 0  # steps taken; their results that have left
        self.results: asyncio.Queue[StepResult | None] = asyncio.Queue()  # None ends it
        self.status: grpc.StatusCode | None = None
        self.reason = ""

    @property
    def num_queued(self) -> int:
        return self.num_taken - self.num_left if self.status is None else 0

    def end(self, status: grpc.StatusCode, reason: str = "") -> None:
        """Results that are there still leave. The first end counts."""
        if self.status is None:
            self.status, self.reason = status, reason
            self.results.put_nowait(None)


class WorkerGroup:
    """The servicer of albireo.v1.WorkerGroup. ``send`` relays to the other ranks."""

    def __init__(self, tp_size: int, send: Callable[[Kind, bytes], None], tracer: Tracer | None = None) -> None:
        self._tp_size = tp_size
        self._send = send
        self._spans = DeviceSpans(tracer) if tracer is not None else None
        self._stage, self._progress = "starting", 0.0
        self._info: plan_pb2.GroupInfo | None = None  # when ready
        self._steps = StepQueue()
        self._transfers: Transfers | None = None
        self._board = TransferBoard(tp_size)
        self._stream: _PlanStream | None = None
        self._epoch = self._next_step_id = 0
        self._num_formings = self._num_steps = self._num_tokens = 0
        self._metrics = self._make_metrics()

    def handlers(self) -> "grpc.GenericRpcHandler[Any, Any]":
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "GetStatus": grpc.unary_unary_rpc_method_handler(
                    self.get_status,
                    request_deserializer=plan_pb2.GetStatusRequest.FromString,
                    response_serializer=plan_pb2.GroupStatus.SerializeToString,
                ),
                "Run": grpc.stream_stream_rpc_method_handler(self.run),
            },
        )

    @property
    def is_ready(self) -> bool:
        return self._info is not None

    def report_progress(self, stage: str, progress: float) -> None:
        self._stage, self._progress = stage, progress

    def set_ready(self, info: plan_pb2.GroupInfo, steps: StepQueue, transfers: Transfers | None) -> None:
        self._info, self._steps, self._transfers = info, steps, transfers
        self._num_formings += 1

    def set_broken(self, reason: str) -> None:
        self._info = None
        self._board.clear()  # no rank comes to the next meeting before its transfers have ended
        self.report_progress("meeting the other ranks", 1.0)
        if self._stream is not None:
            self._stream.end(grpc.StatusCode.UNAVAILABLE, f"the worker group is broken: {reason}")

    def put_result(self, result: StepResult) -> None:
        """A step of ours has run; called in order."""
        self._num_steps += 1
        self._num_tokens += len(result.token_ids)
        if self._spans is not None:
            self._spans.ran(result.step_id)
        log.debug("step ran", step_id=result.step_id, num_tokens=len(result.token_ids), rank=0)
        if self._stream is not None and result.epoch == self._stream.epoch:  # others are for a planner that is gone
            self._stream.results.put_nowait(result)

    def put_transfer(self, result: TransferResult) -> None:
        """One of the ranks is through with a transfer."""
        combined = self._board.add(result)
        if combined is not None and self._stream is not None and self._stream.epoch == self._epoch:
            self._stream.results.put_nowait(transfers_result(self._stream.epoch, (combined,)))

    async def get_status(
        self, _request: plan_pb2.GetStatusRequest, _context: "aio.ServicerContext[Any, Any]"
    ) -> plan_pb2.GroupStatus:
        states = plan_pb2.GroupStatus
        return plan_pb2.GroupStatus(
            state=states.STATE_READY if self.is_ready else states.STATE_LOADING,
            stage="" if self.is_ready else self._stage,
            progress=1.0 if self.is_ready else self._progress,
            info=self._info,
            epoch=self._epoch,
            next_step_id=self._next_step_id,
            num_queued=self._stream.num_queued if self._stream is not None else 0,
        )

    async def run(self, plans: AsyncIterator[bytes], context: "aio.ServicerContext[Any, Any]") -> AsyncIterator[bytes]:
        """The plan stream. A second planner takes over: the first one's stream ends."""
        if self._info is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"the worker group is not complete: {self._stage}")
        if self._stream is not None:
            self._stream.end(grpc.StatusCode.ABORTED, "another planner took over")
        state = BatchState.of_group(self._info, self._info.num_blocks)
        stream = self._stream = _PlanStream(Intake(state, self._steps, self._transfers))
        if not await self._end_transfers():
            await context.abort(grpc.StatusCode.UNAVAILABLE, "transfers of the stream before have not ended")
        await context.send_initial_metadata(())
        reader = asyncio.create_task(self._read_plans(plans, stream))
        try:
            while (result := await stream.results.get()) is not None:
                yield encode_result(result)
                stream.num_left += not result.only_transfers
        finally:
            reader.cancel()
            stream.end(grpc.StatusCode.CANCELLED)
        if stream.status is not None and stream.status is not grpc.StatusCode.OK:
            await context.abort(stream.status, stream.reason)

    async def _end_transfers(self) -> bool:
        """Has all ranks abandon the transfers under way, and waits for that; whether it came to pass."""
        if self._transfers is not None and not self._board.is_clear.is_set():
            self._transfers.abandon()
            self._send(Kind.ABANDON, b"")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ABANDON_WITHIN_S):
                await self._board.is_clear.wait()
        return self._board.is_clear.is_set()

    async def _read_plans(self, plans: AsyncIterator[bytes], stream: _PlanStream) -> None:
        try:
            async for data in plans:
                received_at_ns = time.monotonic_ns()
                if stream.status is not None:
                    return
                self._take_plan(data, stream, received_at_ns)
            stream.end(grpc.StatusCode.OK)
        except GroupError as error:
            log.error("the plan stream cannot be followed", error=str(error))
            stream.end(grpc.StatusCode.INTERNAL, str(error))
        finally:
            stream.end(grpc.StatusCode.CANCELLED)

    def _take_plan(self, data: bytes, stream: _PlanStream, received_at_ns: int) -> None:
        plan = decode_plan(data)
        if not (plan.epoch == stream.epoch if stream.epoch else plan.epoch > self._epoch):
            raise GroupError(f"plan of epoch {plan.epoch} after epoch {self._epoch}")
        if stream.num_queued >= MAX_PLANS_QUEUED:
            raise GroupError(f"step {plan.step_id}: {stream.num_queued} plans are queued already")
        stream.intake.take(plan, received_at_ns)
        stream.epoch = self._epoch = plan.epoch
        self._next_step_id = plan.step_id + (not plan.only_transfers)
        stream.num_taken += not plan.only_transfers
        self._board.put(plan.transfers)
        self._send(Kind.PLAN, data)
        if self._spans is not None and not plan.only_transfers:
            self._spans.planned(plan, received_at_ns)

    def _make_metrics(self) -> Readings:
        counters: dict[str, tuple[str, Callable[[], float]]] = {
            "albireo_worker_formings": ("Times that the group has formed", lambda: self._num_formings),
            "albireo_worker_steps": ("Steps run", lambda: self._num_steps),
            "albireo_worker_sampled_tokens": ("Tokens sampled", lambda: self._num_tokens),
        }
        return Readings({}, counters)
