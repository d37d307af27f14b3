"""The planner's end of the plan stream."""

import asyncio
import contextlib
import time
from collections.abc import Callable

import grpc
import structlog
from grpc import aio

from albireo.errors import AlbireoError, GroupError, GroupUnavailable
from albireo.plan import StepPlan, StepResult, decode_result, encode_plan
from albireo.rpc import make_channel
from albireo.security import OPEN, Security
from albireo.v1 import ledger_pb2, ledger_pb2_grpc, plan_pb2, plan_pb2_grpc

_STATUS_TIMEOUT_S = 2.0
_POLL_S = 0.1

log = structlog.get_logger()


class Superseded(AlbireoError):
    """Another planner has taken over the worker group."""


class PlanStream:
    """One stream of plans and results, for one epoch. `send` never waits."""

    def __init__(self, channel: aio.Channel) -> None:
        # No serialisers: plans and results are coded here.
        self._open = channel.stream_stream("/albireo.v1.WorkerGroup/Run", None, None)
        self._plans: asyncio.Queue[bytes] = asyncio.Queue()
        self._failed = asyncio.Event()
        self._failure = ""

    def send(self, plan: StepPlan) -> None:
        self._plans.put_nowait(encode_plan(plan))

    def fail(self, reason: str) -> None:
        """Gives the stream up; `run` raises."""
        self._failure = reason
        self._failed.set()

    async def run(self, on_begin: Callable[[], None], on_result: Callable[[StepResult], None]) -> None:
        """Keeps the stream until it breaks. Raises GroupUnavailable then, or Superseded. ``on_begin``: nothing of the
        epochs before runs any more."""
        call = self._open()  # type: ignore[call-arg]  # stubs know only iterators
        reading = asyncio.create_task(self._read(call, on_begin, on_result))
        writing = asyncio.create_task(self._write(call))
        failing = asyncio.create_task(self._failed.wait())
        try:
            await asyncio.wait({reading, failing}, return_when=asyncio.FIRST_COMPLETED)
            if self._failed.is_set():
                raise GroupUnavailable(self._failure)
            await reading
        finally:
            for task in (reading, writing, failing):
                task.cancel()
            call.cancel()
            await asyncio.gather(reading, writing, failing, return_exceptions=True)
        raise GroupUnavailable("the worker group ended the plan stream")

    async def _read(
        self,
        call: "aio.StreamStreamCall[bytes, bytes]",
        on_begin: Callable[[], None],
        on_result: Callable[[StepResult], None],
    ) -> None:
        try:
            await call.initial_metadata()
            if not call.done():
                on_begin()
            async for data in call:
                on_result(decode_result(data))
        except GroupError as error:
            raise GroupUnavailable(str(error)) from error
        except aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.ABORTED:
                raise Superseded(error.details()) from error
            raise GroupUnavailable(f"the plan stream broke: {error.code().name}: {error.details()}") from error

    async def _write(self, call: "aio.StreamStreamCall[bytes, bytes]") -> None:
        with contextlib.suppress(aio.AioRpcError, asyncio.InvalidStateError):  # the reader sees why
            while True:
                await call.write(await self._plans.get())


class GroupLink:
    """One worker group: its status, and its plan streams."""

    def __init__(self, target: str, security: Security = OPEN) -> None:
        self._target = target
        self._channel = make_channel(target, to_peer=True, security=security)
        self._stub: plan_pb2_grpc.WorkerGroupAsyncStub = plan_pb2_grpc.WorkerGroupStub(self._channel)
        self._ledger: ledger_pb2_grpc.LedgerAsyncStub = ledger_pb2_grpc.LedgerStub(self._channel)

    def open(self) -> PlanStream:
        return PlanStream(self._channel)

    async def status(self) -> plan_pb2.GroupStatus:
        """Raises GroupUnavailable when the leader does not answer in time."""
        try:
            return await self._stub.GetStatus(plan_pb2.GetStatusRequest(), timeout=_STATUS_TIMEOUT_S)
        except aio.AioRpcError as error:
            raise GroupUnavailable(error.code().name) from error

    async def read_ledger(self, request: ledger_pb2.ReadLedgerRequest) -> ledger_pb2.LedgerPages:
        """The ranks' pages; none when the leader does not answer in time."""
        try:
            return await self._ledger.Read(request, timeout=_STATUS_TIMEOUT_S)
        except aio.AioRpcError as error:
            log.info("the group's ledger cannot be read", reason=error.code().name)
            return ledger_pb2.LedgerPages()

    async def wait_until_ready(self) -> plan_pb2.GroupStatus:
        """Waits while the group starts, loads or forms again, for as long as that takes: its own supervisor knows when
        it died."""
        logged_at = time.monotonic()
        while True:
            try:
                status = await self.status()
                if status.state == plan_pb2.GroupStatus.STATE_READY:
                    return status
                stage = f"{status.stage} {status.progress:.0%}"
            except GroupUnavailable as error:
                stage = str(error)
            if time.monotonic() - logged_at > 10:
                log.info("waiting for the worker group", target=self._target, stage=stage)
                logged_at = time.monotonic()
            await asyncio.sleep(_POLL_S)

    async def close(self) -> None:
        await self._channel.close(grace=None)
