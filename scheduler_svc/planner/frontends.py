"""The front ends that are attached: their streams, and what waits for each of them."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import structlog
from grpc import aio

from albireo.arrays import Int32Array, Int64Array
from albireo.logprobs import Logprobs
from albireo.v1 import frontend_pb2, plan_pb2
from scheduler_svc.planner.cache_follower import CacheFollower
from scheduler_svc.planner.outbox import Outbox

SERVICE_NAME = "albireo.v1.Planner"

# A front end this far behind is dead: 256 streams of a 5 ms step for a minute.
_MAX_BACKLOG_TOKENS = 3_000_000
_MAX_WRITE_S = 10.0
_HELLO_TIMEOUT_S = 5.0

log = structlog.get_logger()

# What a front end says, by its index; None: it is gone.
OnMessage = Callable[[int, frontend_pb2.FrontendMessage | None], None]


@dataclass(slots=True)
class _FrontEnd:
    name: str
    handler: "asyncio.Task[Any]"
    outbox: Outbox = field(default_factory=Outbox)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    writing_since: float = 0.0  # 0: no write is pending

    def is_stuck(self, now: float) -> bool:
        waits_too_long = self.writing_since and now - self.writing_since > _MAX_WRITE_S
        return bool(waits_too_long or self.outbox.backlog_tokens > _MAX_BACKLOG_TOKENS)


class FrontEnds:
    """Servicer of albireo.v1.Planner. Posting to a front end that is gone does nothing.

    Attributes:
        group: what front ends are told of the worker group.
        load: the latest figures.
    """

    def __init__(self, group: plan_pb2.GroupInfo, on_message: OnMessage) -> None:
        self.group = group
        self.load = frontend_pb2.Load()
        self._on_message = on_message
        self._attached: dict[int, _FrontEnd] = {}
        self._next_index = 0

    def __len__(self) -> int:
        return len(self._attached)

    async def Attach(  # gRPC's name
        self,
        messages: AsyncIterator[frontend_pb2.FrontendMessage],
        context: "aio.ServicerContext[frontend_pb2.FrontendMessage, frontend_pb2.PlannerMessage]",
    ) -> AsyncIterator[frontend_pb2.PlannerMessage]:
        """A front end's stream: its messages in, its tokens out; its end gives back all its sequences."""
        hello = await _first_of(messages)
        if hello is None or not hello.HasField("hello"):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message is a hello")
        assert hello is not None
        handler = asyncio.current_task()
        assert handler is not None
        index, self._next_index = self._next_index, self._next_index + 1
        frontend = self._attached[index] = _FrontEnd(hello.hello.name, handler)
        log.info("front end attached", frontend=frontend.name)
        reader = asyncio.create_task(self._read(index, frontend, messages))
        try:
            yield frontend_pb2.PlannerMessage(welcome=frontend_pb2.Welcome(group=self.group), load=self.load)
            while not frontend.gone.is_set():
                message = await frontend.outbox.take()
                frontend.writing_since = time.monotonic()
                yield message
                frontend.writing_since = 0.0
        finally:
            reader.cancel()
            del self._attached[index]
            self._on_message(index, None)
            log.info("front end detached", frontend=frontend.name)

    async def _read(
        self, index: int, frontend: _FrontEnd, messages: AsyncIterator[frontend_pb2.FrontendMessage]
    ) -> None:
        with contextlib.suppress(aio.AioRpcError, asyncio.CancelledError):
            async for message in messages:
                self._on_message(index, message)
        frontend.gone.set()
        frontend.outbox.wake()

    def post_tokens(
        self, index: int, sequence_ids: Int64Array, token_ids: Int32Array, logprobs: Logprobs | None
    ) -> None:
        """Two parallel arrays, in the order sampled; logprobs of some of the tokens."""
        frontend = self._attached.get(index)
        if frontend is not None:
            frontend.outbox.add_tokens(sequence_ids, token_ids, logprobs)

    def post_prompt_logprobs(self, index: int, sequence_id: int, first_position: int, logprobs: Logprobs) -> None:
        """Of consecutive tokens of a prompt."""
        frontend = self._attached.get(index)
        if frontend is not None:
            frontend.outbox.add_prompt_logprobs(sequence_id, first_position, logprobs)

    def post_started(self, index: int, sequence_id: int, num_cached_tokens: int) -> None:
        frontend = self._attached.get(index)
        if frontend is not None:
            frontend.outbox.add_started(sequence_id, num_cached_tokens)

    def post_ended(self, index: int, ended: frontend_pb2.Ended) -> None:
        frontend = self._attached.get(index)
        if frontend is not None:
            frontend.outbox.add_ended(ended)

    def post_load(self, load: frontend_pb2.Load) -> None:
        """To all, when it has changed."""
        if load != self.load:
            self.load = load
            for frontend in self._attached.values():
                frontend.outbox.set_load(load)

    def follow_cache(self, index: int, follows: bool) -> CacheFollower | None:
        """From now on: whether a front end is told what a new follower is told. Returns it; None where it is not."""
        frontend = self._attached.get(index)
        return None if frontend is None else frontend.outbox.follow_cache(follows)

    def drop_stuck(self, now: float) -> None:
        """Ends the streams of front ends that do not read. They attach again if they live."""
        for frontend in self._attached.values():
            if frontend.is_stuck(now) and not frontend.gone.is_set():
                log.error("front end does not read", frontend=frontend.name, backlog=frontend.outbox.backlog_tokens)
                frontend.gone.set()
                frontend.handler.cancel()  # it may wait in a write


async def _first_of(messages: AsyncIterator[frontend_pb2.FrontendMessage]) -> frontend_pb2.FrontendMessage | None:
    with contextlib.suppress(TimeoutError, StopAsyncIteration):
        async with asyncio.timeout(_HELLO_TIMEOUT_S):
            return await anext(aiter(messages))
    return None
