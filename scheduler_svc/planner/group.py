"""The planner's end of the plan stream."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import grpc
import structlog
from grpc import aio

from albireo.errors import GroupUnavailable
from albireo.plan import StepPlan, StepResult, decode_result, encode_plan
from albireo.rpc import make_channel
from albireo.v1 import plan_pb2, plan_pb2_grpc

_STATUS_TIMEOUT_S = 5.0
_POLL_S = 0.1

log = structlog.get_logger()


class GroupLink:
    """One worker group: its status, and the stream of plans and results. `send` never waits."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._channel = make_channel(target)
        self._plans: asyncio.Queue[bytes] = asyncio.Queue()

    async def wait_until_ready(self) -> plan_pb2.GroupStatus:
        """Waits while the group starts and loads, for as long as that takes: its own supervisor knows when it died."""
        stub: plan_pb2_grpc.WorkerGroupAsyncStub = plan_pb2_grpc.WorkerGroupStub(self._channel)
        logged_at = time.monotonic()
        while True:
            try:
                status = await stub.GetStatus(plan_pb2.GetStatusRequest(), timeout=_STATUS_TIMEOUT_S)
                if status.state == plan_pb2.GroupStatus.STATE_READY:
                    return status
                stage = f"{status.stage} {status.progress:.0%}"
            except aio.AioRpcError as error:
                stage = error.code().name
            if time.monotonic() - logged_at > 10:
                log.info("waiting for the worker group", target=self._target, stage=stage)
                logged_at = time.monotonic()
            await asyncio.sleep(_POLL_S)

    def send(self, plan: StepPlan) -> None:
        self._plans.put_nowait(encode_plan(plan))

    async def run(self, on_result: Callable[[StepResult], None]) -> None:
        """Keeps the plan stream until it breaks; then raises GroupUnavailable."""
        # No serialisers: plans and results are coded here.
        run = self._channel.stream_stream("/albireo.v1.WorkerGroup/Run", None, None)
        call = run(self._requests())
        try:
            async for data in call:
                on_result(decode_result(data))
        except aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.CANCELLED:
                raise GroupUnavailable("another planner took over the worker group") from error
            raise GroupUnavailable(f"the plan stream broke: {error.code().name}: {error.details()}") from error
        raise GroupUnavailable("the worker group ended the plan stream")

    async def close(self) -> None:
        await self._channel.close(grace=None)

    async def _requests(self) -> AsyncIterator[bytes]:
        while True:
            yield await self._plans.get()
