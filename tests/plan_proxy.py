"""A proxy in front of a worker group's leader that loses, holds up or doubles messages of the plan stream on demand."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import grpc
from grpc import aio

from albireo.rpc import make_channel, make_server

Action = Literal["drop", "delay", "duplicate"]
Place = Literal["plan", "result"]

_PLAN_STREAM = "/albireo.v1.WorkerGroup/Run"


@dataclass
class _Armed:
    """What happens to the next message."""

    action: Action
    delay_s: float
    applied: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class PlanProxy(grpc.GenericRpcHandler):
    """Forwards every call as it is: bytes, ends of streams, cancellations, deadlines, status codes and their details.

    It outlives the leader behind it: calls made meanwhile end as they would without a proxy. An async context manager.
    """

    def __init__(self, listen: str, target: str) -> None:
        self._server = make_server(for_peers=True)
        self._server.add_generic_rpc_handlers((self,))
        self._server.add_insecure_port(listen)
        self._channel = make_channel(target, to_peer=True)
        self._armed: dict[Place, list[_Armed]] = {"plan": [], "result": []}

    async def __aenter__(self) -> "PlanProxy":
        await self._server.start()
        return self

    async def __aexit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._server.stop(grace=None)
        await self._channel.close()

    async def inject(self, action: Action, place: Place, delay_s: float = 0.0) -> None:
        """Does ``action`` to the next plan or result; returns when it has come, and a delay has begun."""
        armed = _Armed(action, delay_s)
        self._armed[place].append(armed)
        try:
            await armed.applied
        finally:
            if armed in self._armed[place]:
                self._armed[place].remove(armed)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """Called by gRPC. On the wire, a unary call is a stream of one message."""
        method = details.method

        async def forward(messages: AsyncIterator[bytes], context: "aio.ServicerContext[Any, Any]") -> None:
            await self._forward(method, messages, context)

        return grpc.stream_stream_rpc_method_handler(forward)

    async def _forward(
        self, method: str, messages: AsyncIterator[bytes], context: "aio.ServicerContext[Any, Any]"
    ) -> None:
        call = self._channel.stream_stream(method)(timeout=context.time_remaining())
        sending = asyncio.create_task(self._send_all(method, messages, call))
        try:
            async for message in call:
                await self._pass_on("result" if method == _PLAN_STREAM else None, message, context.write)
            code, details = await call.code(), await call.details()
        except aio.AioRpcError as error:
            code, details = error.code(), error.details()
        finally:
            sending.cancel()
            call.cancel()
        if code is not grpc.StatusCode.OK:
            await context.abort(code, details or "")

    async def _send_all(self, method: str, messages: AsyncIterator[bytes], call: Any) -> None:
        # The reader of the call sees why it ended.
        with contextlib.suppress(aio.AioRpcError, asyncio.InvalidStateError):
            async for message in messages:
                await self._pass_on("plan" if method == _PLAN_STREAM else None, message, call.write)
            await call.done_writing()

    async def _pass_on(self, place: Place | None, message: bytes, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Writes a message as often as it shall arrive. What follows waits for it: order is kept."""
        armed = self._armed[place].pop(0) if place and self._armed[place] else None
        if armed is None:
            await write(message)
            return
        if not armed.applied.done():
            armed.applied.set_result(None)
        if armed.action == "delay":
            await asyncio.sleep(armed.delay_s)
        for _ in range({"drop": 0, "delay": 1, "duplicate": 2}[armed.action]):
            await write(message)
