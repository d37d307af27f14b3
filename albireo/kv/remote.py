"""A rank's way to the arena of another host: parts as bytes on the store's Data stream."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import grpc
import numpy as np
import structlog
from grpc import aio

from albireo.kv.arena import PartCopy
from albireo.kv.part import read_part, write_part
from albireo.kv.wire import DATA_METHOD, DATA_REPLY, DATA_REQUEST, Operation, Status
from albireo.rpc import make_channel
from albireo.security import OPEN, Security

_TIMEOUT_S = 10.0

log = structlog.get_logger()


class RemoteArena:
    """The same as `LocalArena`, for ranks that cannot map it. Of threads other than the loop's.

    Args:
        lease: of the session, as the store told it.
        loop: runs in another thread; the process's only one with gRPC.
        timeout_s: of one call of `read` or `write`; what has not come by then is a miss.
    """

    def __init__(
        self,
        target: str,
        lease: int,
        loop: asyncio.AbstractEventLoop,
        security: Security = OPEN,
        timeout_s: float = _TIMEOUT_S,
    ) -> None:
        self._lease = lease
        self._loop = loop
        self._timeout_s = timeout_s
        self._is_lost = False
        self._channel = asyncio.run_coroutine_threadsafe(_make_channel(target, security), loop).result()

    @property
    def is_lost(self) -> bool:
        return self._is_lost

    def write(self, copies: Sequence[PartCopy]) -> list[bool]:
        requests = [self._request(i, copy, Operation.WRITE) for i, copy in enumerate(copies)]
        return [reply is not None for reply in self._exchange(requests)]

    def read(self, copies: Sequence[PartCopy]) -> list[bool]:
        requests = [self._request(i, copy, Operation.READ) for i, copy in enumerate(copies)]
        return [
            reply is not None and read_part(np.frombuffer(reply, dtype=np.uint8), copy.name, copy.pieces)
            for copy, reply in zip(copies, self._exchange(requests), strict=True)
        ]

    def close(self) -> None:
        self._is_lost = True
        asyncio.run_coroutine_threadsafe(self._channel.close(grace=None), self._loop).result()

    def _request(self, index: int, copy: PartCopy, operation: Operation) -> bytes:
        header = DATA_REQUEST.pack(index, self._lease, copy.offset, copy.num_bytes, operation)
        if operation is Operation.READ:
            return header
        message = np.empty(len(header) + copy.num_bytes, dtype=np.uint8)
        message[: len(header)] = np.frombuffer(header, dtype=np.uint8)
        write_part(message[len(header) :], copy.name, copy.pieces)
        return message.tobytes()

    def _exchange(self, requests: Sequence[bytes]) -> list[memoryview | None]:
        """For each request what came back; None: it was refused, or nothing came."""
        if self._is_lost:
            return [None] * len(requests)
        return asyncio.run_coroutine_threadsafe(self._run(requests), self._loop).result()

    async def _run(self, requests: Sequence[bytes]) -> list[memoryview | None]:
        replies: list[memoryview | None] = [None] * len(requests)
        call = self._channel.stream_stream(DATA_METHOD, None, None)(_each(requests), timeout=self._timeout_s)
        try:
            async for reply in call:
                index, status = DATA_REPLY.unpack_from(reply)
                if status == Status.OK:
                    replies[index] = memoryview(reply)[DATA_REPLY.size :]
                self._is_lost = self._is_lost or status == Status.ENDED
        except aio.AioRpcError as error:
            log.warning("parts did not come", status=error.code().name, reason=error.details())
            self._is_lost = error.code() is grpc.StatusCode.UNAVAILABLE or self._is_lost
        return replies


async def _make_channel(target: str, security: Security) -> aio.Channel:
    return make_channel(target, to_peer=True, security=security)


async def _each(requests: Sequence[bytes]) -> AsyncIterator[bytes]:
    for request in requests:
        yield request
