"""The leader of a group: the plan stream's server, and the relay to the other ranks of its host.

Runs on the I/O thread of rank 0. A plan is prepared and queued for our own compute thread first, then relayed: the
other ranks launch a moment later instead of everyone.
"""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import structlog
from grpc import aio

from albireo.errors import GroupError
from albireo.metrics import Readings
from albireo.plan import StepResult, decode_plan, encode_result
from albireo.v1 import plan_pb2
from worker_svc.batch import BatchState
from worker_svc.compute import StepQueue, prepare
from worker_svc.relay import Kind, frame, read_frame, to_int

SERVICE_NAME = "albireo.v1.WorkerGroup"

log = structlog.get_logger()


class Ranks:
    """The other ranks, as the leader sees them. ``on_lost`` is called when one goes away."""

    def __init__(self, num: int, on_lost: Callable[[int], None]) -> None:
        self._num = num
        self._on_lost = on_lost
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._inbox: asyncio.Queue[tuple[Kind, bytes]] = asyncio.Queue()
        self._server: asyncio.Server | None = None  # a reference: uvloop closes servers that nobody holds

    async def listen(self, path: Path) -> None:
        self._server = await asyncio.start_unix_server(self._serve_rank, path)

    async def gather(self, kind: Kind) -> list[bytes]:
        """One frame of ``kind`` from every rank."""
        frames = [await self._inbox.get() for _ in range(self._num)]
        if any(got is not kind for got, _ in frames):
            raise GroupError(f"a rank answered {[got.name for got, _ in frames]} where {kind.name} was expected")
        return [payload for _, payload in frames]

    def send_all(self, kind: Kind, payload: bytes | int) -> None:
        if self._writers:
            data = frame(kind, payload)
            for writer in self._writers.values():
                writer.write(data)

    async def _serve_rank(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, payload = await read_frame(reader)
        rank = to_int(payload)
        self._writers[rank] = writer
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                self._inbox.put_nowait(await read_frame(reader))
        self._on_lost(rank)


class WorkerGroup:
    """The servicer of albireo.v1.WorkerGroup; plans and results pass it as bytes, so that each is coded only once."""

    def __init__(self, ranks: Ranks, steps: StepQueue) -> None:
        self._ranks = ranks
        self._steps = steps
        self._status = plan_pb2.GroupStatus(state=plan_pb2.GroupStatus.STATE_LOADING)
        self._state: BatchState | None = None
        self._stream = _PlanStream()
        self._num_steps = self._num_tokens = 0
        self._seconds = dict.fromkeys(("prepare", "forward", "sample", "idle"), 0.0)
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

    def report_progress(self, stage: str, progress: float) -> None:
        self._status.stage, self._status.progress = stage, progress

    def set_ready(self, info: plan_pb2.GroupInfo) -> None:
        self._state = BatchState(info.max_num_seqs, info.max_model_len, info.block_size)
        self._status = plan_pb2.GroupStatus(state=plan_pb2.GroupStatus.STATE_READY, progress=1.0, info=info)

    def put_result(self, result: StepResult) -> None:
        """A step of ours has run; called on the I/O loop, in order."""
        self._num_steps += 1
        self._num_tokens += len(result.token_ids)
        for phase in self._seconds:
            self._seconds[phase] += getattr(result.timings, f"{phase}_ns") / 1e9
        log.debug("step ran", step_id=result.step_id, num_tokens=len(result.token_ids), rank=0)
        if result.epoch == self._stream.epoch:  # results for a planner that is gone are dropped
            self._stream.results.put_nowait(result)

    def _make_metrics(self) -> Readings:
        counters: dict[str, tuple[str, Callable[[], float]]] = {
            "albireo_worker_steps": ("Steps run", lambda: self._num_steps),
            "albireo_worker_sampled_tokens": ("Tokens sampled", lambda: self._num_tokens),
        }
        for phase in self._seconds:
            counters[f"albireo_worker_{phase}_seconds"] = (
                f"Time of all steps: {phase}",
                functools.partial(self._seconds.__getitem__, phase),
            )
        return Readings({}, counters)

    async def get_status(
        self, _request: plan_pb2.GetStatusRequest, _context: "aio.ServicerContext[Any, Any]"
    ) -> plan_pb2.GroupStatus:
        return self._status

    async def run(self, plans: AsyncIterator[bytes], context: "aio.ServicerContext[Any, Any]") -> AsyncIterator[bytes]:
        """The plan stream. A second planner takes over: the first one's stream ends."""
        if self._state is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the group is still loading")
        self._stream.results.put_nowait(None)
        stream = self._stream = _PlanStream()
        reader = asyncio.create_task(self._read_plans(plans, stream))
        try:
            while (result := await stream.results.get()) is not None:
                yield encode_result(result)
        finally:
            reader.cancel()
        if stream.error is not None:
            log.error("the plan stream cannot be followed", error=str(stream.error))
            await context.abort(stream.error.status, str(stream.error))

    async def _read_plans(self, plans: AsyncIterator[bytes], stream: "_PlanStream") -> None:
        assert self._state is not None
        try:
            async for data in plans:
                plan = decode_plan(data)
                stream.epoch = self._status.epoch = plan.epoch
                self._steps.put(prepare(self._state, plan))
                self._ranks.send_all(Kind.PLAN, data)
        except GroupError as error:
            stream.error = error
        finally:
            stream.results.put_nowait(None)


@dataclass(slots=True)
class _PlanStream:
    """One planner's stream; None in ``results`` ends it."""

    epoch: int = 0
    results: asyncio.Queue[StepResult | None] = field(default_factory=asyncio.Queue)
    error: GroupError | None = None
