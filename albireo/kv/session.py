"""A planner's session with the KV store: names and places of blocks, over one stream.

    session = await open_session(channel, "planner-0", epoch, namespace)
    found = await session.lookup(hashes)
    acquired = await session.acquire(hashes, anchors, tenant, wait_s=0.05)
    ...                                         # ranks read acquired.offsets
    session.release(acquired.hold)
    reserved = await session.reserve(hashes, anchors, tenant)
    ...                                         # ranks write reserved.offsets
    session.commit(reserved.hold, succeeded)

When the stream ends, so does all that the session holds; the ranks of its lease let go of the arena.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import structlog
from grpc import aio

from albireo.arrays import UInt64Array, unpack_uint64
from albireo.errors import InvalidRequest, Overloaded, StoreUnavailable
from albireo.kv.arena import Lease
from albireo.kv.fingerprint import Namespace
from albireo.v1 import kvstore_pb2 as pb

_ANSWER_WITHIN_S = 2.0  # beside what the request itself may take
_STREAM = "/albireo.v1.KvStore/Session"

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Found:
    """Of a prefix: ready; after those, being written or fetched; after those, only in Redis."""

    num_ready: int
    num_pending: int
    num_remote: int
    eta_s: float


@dataclass(frozen=True, slots=True)
class Acquired:
    """The pinned prefix. ``offsets``: [num_blocks, num_parts], of each part's header in the arena."""

    hold: int
    num_blocks: int
    offsets: UInt64Array


@dataclass(frozen=True, slots=True)
class Reserved:
    """``states``: one `KvBlockState` per hash. ``offsets``: [number of NEW ones, num_parts]."""

    hold: int
    states: bytes
    offsets: UInt64Array


class KvSession:
    """Made by `open_session`. Of one event loop.

    Attributes:
        lease: for the ranks, so that they find the arena.
        credit_bytes: the session may hold; past it requests raise Overloaded.
        max_blocks: of one `acquire` or `reserve`.
    """

    def __init__(
        self,
        call: "aio.StreamStreamCall[pb.KvRequest, pb.KvReply]",
        namespace: Namespace,
        welcome: pb.KvReply.Welcome,
    ) -> None:
        self.namespace = namespace
        self.lease = Lease(welcome.arena_id, welcome.arena_socket, welcome.arena_bytes, welcome.lease)
        self.credit_bytes = welcome.credit_bytes
        self.max_blocks = welcome.max_blocks
        self._call = call
        self._ids = itertools.count(1)
        self._requests: asyncio.Queue[pb.KvRequest] = asyncio.Queue()
        self._answers: dict[int, asyncio.Future[pb.KvReply]] = {}
        self._ended = asyncio.get_running_loop().create_future()
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]

    @property
    def is_open(self) -> bool:
        return not self._ended.done()

    async def wait_until_ended(self) -> str:
        """Returns why it ended."""
        return str(await asyncio.shield(self._ended))

    async def close(self) -> None:
        """Ends the lease."""
        self._end("closed")
        self._call.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def lookup(
        self, hashes: Sequence[bytes], anchors: Sequence[bytes] = (), *, asks_redis: bool = False
    ) -> Found:
        """How long a prefix is there; uses and moves nothing.

        Raises:
            StoreUnavailable, Overloaded, InvalidRequest: as all requests do.
        """
        lookup = pb.KvRequest.Lookup(hashes=b"".join(hashes), anchors=b"".join(anchors), asks_redis=asks_redis)
        reply = await self._ask(pb.KvRequest(id=next(self._ids), lookup=lookup), 0.0)
        found = reply.found
        return Found(found.num_ready, found.num_pending, found.num_remote, found.eta_s)

    async def acquire(
        self,
        hashes: Sequence[bytes],
        anchors: Sequence[bytes] = (),
        tenant: str = "",
        *,
        priority: int = 0,
        wait_s: float = 0.0,
    ) -> Acquired:
        """Pins the longest prefix that is ready, or is within ``wait_s``, until `release`."""
        acquire = pb.KvRequest.Acquire(
            hashes=b"".join(hashes), anchors=b"".join(anchors), tenant=tenant, priority=priority, wait_s=wait_s
        )
        hold = next(self._ids)
        try:
            reply = await self._ask(pb.KvRequest(id=hold, acquire=acquire), wait_s)
        except (asyncio.CancelledError, StoreUnavailable):
            self.release(hold)  # it may be granted yet
            raise
        return Acquired(hold, reply.acquired.num_blocks, self._offsets(reply.acquired.offsets))

    def release(self, hold: int) -> None:
        """Unpins what an `acquire`, or a `reserve` that keeps, has pinned. The ranks have read it."""
        self._send(pb.KvRequest(id=hold, release=pb.KvRequest.Release()))

    async def reserve(
        self,
        hashes: Sequence[bytes],
        anchors: Sequence[bytes] = (),
        tenant: str = "",
        *,
        keeps: bool = False,
        ttl_s: float = 0.0,
        durable: bool = False,
    ) -> Reserved:
        """Room for the blocks that do not exist. Ends with `commit` or `abort`.

        Args:
            hashes: of a chain from its beginning on: what exists counts as used.
            keeps: pinned after `commit` until `release`, with those that existed.
            durable: written to Redis at once.
        """
        reserve = pb.KvRequest.Reserve(
            hashes=b"".join(hashes),
            anchors=b"".join(anchors),
            tenant=tenant,
            keeps=keeps,
            ttl_s=ttl_s,
            durable=durable,
        )
        hold = next(self._ids)
        reply = await self._ask(pb.KvRequest(id=hold, reserve=reserve), 0.0)
        return Reserved(hold, reply.reserved.states, self._offsets(reply.reserved.offsets))

    def commit(self, hold: int, succeeded: Sequence[bool]) -> None:
        """One entry per new block, in order: all of its parts are written."""
        self._send(pb.KvRequest(id=hold, commit=pb.KvRequest.Commit(succeeded=bytes(succeeded))))

    def abort(self, hold: int, *, ranks_may_write: bool = False) -> None:
        """Gives a reservation up. Where ranks may still write, the places stay out of use until the session's end."""
        self._send(pb.KvRequest(id=hold, abort=pb.KvRequest.Abort(ranks_may_write=ranks_may_write)))

    def _offsets(self, packed: bytes) -> UInt64Array:
        return unpack_uint64(packed).reshape(-1, self.namespace.num_parts)

    def _send(self, request: pb.KvRequest) -> None:
        self._requests.put_nowait(request)

    async def _ask(self, request: pb.KvRequest, wait_s: float) -> pb.KvReply:
        """A reply that comes when nobody waits any more is settled in `_settle_late`."""
        if not self.is_open:
            raise StoreUnavailable(f"the session with the KV store has ended: {self._ended.result()}")
        answer: asyncio.Future[pb.KvReply] = asyncio.get_running_loop().create_future()
        self._answers[request.id] = answer
        self._send(request)
        try:
            async with asyncio.timeout(wait_s + _ANSWER_WITHIN_S):
                reply = await answer
        except TimeoutError as error:
            raise StoreUnavailable(f"the KV store did not answer within {wait_s + _ANSWER_WITHIN_S:g} s") from error
        finally:
            del self._answers[request.id]
        if reply.HasField("refused"):
            if not reply.refused.retry_after_s:
                raise InvalidRequest(reply.refused.reason)
            raise Overloaded(reply.refused.reason, reply.refused.retry_after_s)
        return reply

    async def _read(self) -> None:
        reason = "the store ended it"
        try:
            async for reply in self._call:
                answer = self._answers.get(reply.id)
                if answer is None or answer.done():
                    self._settle_late(reply)
                else:
                    answer.set_result(reply)
        except aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        finally:
            self._end(reason)

    def _settle_late(self, reply: pb.KvReply) -> None:
        """Nobody has told a rank of these places. An Acquire has been released when its caller gave up."""
        if reply.HasField("reserved"):
            self.abort(reply.id)

    async def _write(self) -> None:
        with contextlib.suppress(aio.AioRpcError, asyncio.InvalidStateError):  # the reader sees why
            while True:
                await self._call.write(await self._requests.get())

    def _end(self, reason: str) -> None:
        if self._ended.done():
            return
        self._ended.set_result(reason)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(StoreUnavailable(f"the session with the KV store has ended: {reason}"))


async def open_session(
    channel: aio.Channel, name: str, epoch: int, namespace: Namespace, timeout_s: float = 5.0
) -> KvSession:
    """Begins a session.

    Args:
        epoch: greater than any before under this name; an older session of it ends.
    Raises:
        StoreUnavailable: the store is not there.
        InvalidRequest: it does not take the epoch or the namespace.
    """
    method = channel.stream_stream(
        _STREAM, request_serializer=pb.KvRequest.SerializeToString, response_deserializer=pb.KvReply.FromString
    )
    call: aio.StreamStreamCall[pb.KvRequest, pb.KvReply] = method()  # type: ignore[call-arg]  # stubs know only iterators
    hello = pb.KvRequest.Hello(
        name=name,
        epoch=epoch,
        fingerprint=namespace.fingerprint,
        num_parts=namespace.num_parts,
        part_bytes=namespace.part_bytes,
    )
    try:
        async with asyncio.timeout(timeout_s):
            # What is written to a call that has been refused makes gRPC forget the reason.
            await call.initial_metadata()
            await call.write(pb.KvRequest(hello=hello))
            reply = await anext(aiter(call))
    except (aio.AioRpcError, asyncio.InvalidStateError) as error:
        call.cancel()
        status = await call.code(), await call.details()
        if status[0] is grpc.StatusCode.INVALID_ARGUMENT:
            raise InvalidRequest(str(status[1])) from error
        raise StoreUnavailable(f"the KV store: {status[0].name}: {status[1]}") from error
    except (TimeoutError, StopAsyncIteration) as error:
        call.cancel()
        raise StoreUnavailable(f"the KV store does not answer within {timeout_s:g} s") from error
    return KvSession(call, namespace, reply.welcome)
