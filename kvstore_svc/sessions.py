"""One planner's Session stream: its requests in, replies out, in any order; its end is the end of its lease."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import numpy as np
import structlog
from grpc import aio

from albireo.arrays import pack_uint64
from albireo.errors import InvalidRequest, Overloaded
from albireo.kv.chain import ANCHOR_BYTES, HASH_BYTES, split
from albireo.v1 import kvstore_pb2 as pb
from kvstore_svc.blocks import Block, Session
from kvstore_svc.service import Store, max_blocks

_HELLO_TIMEOUT_S = 5.0
_MAX_LOOKUP_BLOCKS = 1 << 16
_MAX_REPLIES = 16_384  # unsent: the client does not read
_MAX_WAITING = 1024  # Acquires and Lookups that take their time
_MAX_WAIT_S = 60.0
_PROBE_TIMEOUT_S = 1.0

log = structlog.get_logger()


async def serve_session(
    store: Store, requests: AsyncIterator[pb.KvRequest], context: "aio.ServicerContext[Any, Any]"
) -> AsyncIterator[pb.KvReply]:
    """The handler of KvStore/Session. Its initial metadata say that the caller is let in."""
    await context.send_initial_metadata(())
    hello = await _first_of(requests)
    stream = _Stream(store)
    try:
        if hello is None or hello.WhichOneof("request") != "hello":
            raise InvalidRequest("the first message is a hello")
        session = store.open_session(hello.hello, stream.end_superseded)
    except (InvalidRequest, ValueError) as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        raise
    stream.session = session
    log.info("session begins", name=session.name, epoch=session.epoch, lease=f"{session.lease:#x}")
    reader = asyncio.create_task(stream.read(requests))
    try:
        yield pb.KvReply(id=hello.id, welcome=store.welcome(session))
        while (reply := await stream.replies.get()) is not None:
            yield reply
    finally:
        reader.cancel()
        stream.cancel_waiting()
        store.close_session(session)
        log.info("session ends", name=session.name, epoch=session.epoch, reason=stream.reason)
    if stream.status is not None:
        await context.abort(stream.status, stream.reason)


class _Stream:
    """Takes requests one by one; only those that wait for something become tasks."""

    session: Session

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: dict[int, asyncio.Task[None]] = {}  # by request id
        self.replies: asyncio.Queue[pb.KvReply | None] = asyncio.Queue()  # None ends it
        self.status: grpc.StatusCode | None = None
        self.reason = "the client is gone"

    def end(self, status: grpc.StatusCode, reason: str) -> None:
        if self.status is None:
            self.status, self.reason = status, reason
            self.replies.put_nowait(None)

    def end_superseded(self, reason: str) -> None:
        """The lease ends now: what comes later finds none."""
        self.cancel_waiting()
        self._store.close_session(self.session)
        self.end(grpc.StatusCode.ABORTED, reason)

    def cancel_waiting(self) -> None:
        for task in self._waiting.values():
            task.cancel()

    async def read(self, requests: AsyncIterator[pb.KvRequest]) -> None:
        with contextlib.suppress(aio.AioRpcError, asyncio.CancelledError):
            async for request in requests:
                if self.status is not None:
                    return
                self._take(request)
        self.replies.put_nowait(None)

    def _take(self, request: pb.KvRequest) -> None:
        kind = request.WhichOneof("request")
        try:
            if kind in ("commit", "abort", "release"):
                self._settle(request, kind)
            else:
                self._answer(request, kind)
        except Overloaded as error:
            self._refuse(request.id, str(error), error.retry_after_s)
        except (InvalidRequest, ValueError) as error:
            if kind in ("lookup", "acquire", "reserve"):
                self._refuse(request.id, str(error), 0.0)
            else:
                self.end(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        if self.replies.qsize() > _MAX_REPLIES:
            self.end(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{_MAX_REPLIES} replies wait: the client does not read")

    def _answer(self, request: pb.KvRequest, kind: str | None) -> None:
        if kind == "lookup":
            lookup = request.lookup
            hashes, anchors = _chain(lookup.hashes, lookup.anchors, _MAX_LOOKUP_BLOCKS)
            if lookup.asks_redis and self._store.tier is not None:
                self._wait(request.id, self._look_further(request.id, hashes, anchors))
            else:
                self._send(pb.KvReply(id=request.id, found=self._found(hashes)))
        elif kind == "acquire":
            acquire = request.acquire
            if not 0 <= acquire.wait_s <= _MAX_WAIT_S:
                raise InvalidRequest(f"wait_s {acquire.wait_s:g}: 0 to {_MAX_WAIT_S:g}")
            hashes, anchors = _chain(acquire.hashes, acquire.anchors, max_blocks(self.session.shelf))
            if request.id in self._waiting:
                raise InvalidRequest(f"id {request.id}: in use")
            blocks = self._store.index.acquire(self.session, request.id, hashes, time.monotonic())
            if len(blocks) == len(hashes) or not acquire.wait_s:
                self._grant(request.id, blocks, len(hashes))
            else:
                self._wait(request.id, self._acquire_later(request.id, acquire, hashes, anchors))
        elif kind == "reserve":
            self._reserve(request.id, request.reserve)
        else:
            raise InvalidRequest(f"request {kind or 'unknown'!r}: not after the first message")

    def _settle(self, request: pb.KvRequest, kind: str) -> None:
        index = self._store.index
        if kind == "commit":
            ready = index.commit(self.session, request.id, [bool(each) for each in request.commit.succeeded])
            self._store.counts.committed_bytes += len(ready) * self.session.namespace.frame_bytes
            self._store.store_if_worth(ready)
        elif kind == "abort":
            index.abort(self.session, request.id, request.abort.ranks_may_write)
        else:
            waiting = self._waiting.pop(request.id, None)
            if waiting is not None:
                waiting.cancel()
            index.release(self.session, request.id)
        self._store.tell_change()

    # Lookup.

    def _found(self, hashes: Sequence[bytes]) -> pb.KvReply.Found:
        num_ready, num_pending = self._store.index.lookup(self.session, hashes, time.monotonic())
        return pb.KvReply.Found(num_ready=num_ready, num_pending=num_pending)

    async def _look_further(self, request_id: int, hashes: Sequence[bytes], anchors: Sequence[bytes]) -> None:
        found = self._found(hashes)
        start = found.num_ready + found.num_pending
        tier = self._store.tier
        if tier is not None and anchors and start < len(hashes):
            shelf = self.session.shelf
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PROBE_TIMEOUT_S):
                    found.num_remote = await tier.probe(shelf, hashes[start:], anchors[start:])
            found.eta_s = tier.eta_s(found.num_remote * shelf.namespace.frame_bytes)
        self._send(pb.KvReply(id=request_id, found=found))

    # Acquire.

    async def _acquire_later(
        self, request_id: int, acquire: pb.KvRequest.Acquire, hashes: Sequence[bytes], anchors: Sequence[bytes]
    ) -> None:
        """Waits for blocks that are being written or fetched, and has fetched what Redis has, until the deadline."""
        blocks: list[Block] = []
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(acquire.wait_s):
                    await self._bring(request_id, acquire, hashes, anchors)
            blocks = self._store.index.acquire(self.session, request_id, hashes, time.monotonic())
        except Overloaded as error:
            self._store.index.release(self.session, request_id)
            self._refuse(request_id, str(error), error.retry_after_s)
            return
        self._grant(request_id, blocks, len(hashes))

    async def _bring(
        self, request_id: int, acquire: pb.KvRequest.Acquire, hashes: Sequence[bytes], anchors: Sequence[bytes]
    ) -> None:
        """Returns when all is pinned, or what comes next is neither there nor coming."""
        store, session = self._store, self.session
        has_asked = store.tier is None or not anchors
        while True:
            now = time.monotonic()
            start = len(store.index.acquire(session, request_id, hashes, now))
            if start == len(hashes):
                return
            if store.index.lookup(session, hashes[start:], now)[1]:
                await store.wait_for_change()
            elif has_asked or store.tier is None:
                return
            else:
                has_asked = True
                num = await store.tier.probe(session.shelf, hashes[start:], anchors[start:])
                rest = slice(start, start + num)
                found = store.index.begin_load(
                    session.shelf, hashes[rest], anchors[rest], acquire.tenant, time.monotonic()
                )
                store.tier.load(found, acquire.priority)

    def _grant(self, request_id: int, blocks: Sequence[Block], num_asked: int) -> None:
        counts = self._store.counts
        counts.num_misses += num_asked - len(blocks)
        counts.acquired_bytes += len(blocks) * self.session.namespace.frame_bytes
        self._store.store_if_worth(blocks)
        acquired = pb.KvReply.Acquired(num_blocks=len(blocks), offsets=self._offsets(blocks))
        self._send(pb.KvReply(id=request_id, acquired=acquired))

    # Reserve.

    def _reserve(self, request_id: int, reserve: pb.KvRequest.Reserve) -> None:
        if not reserve.ttl_s >= 0:
            raise InvalidRequest(f"ttl_s {reserve.ttl_s:g}: not negative")
        hashes, anchors = _chain(reserve.hashes, reserve.anchors, max_blocks(self.session.shelf))
        reserved = self._store.index.reserve(
            self.session,
            request_id,
            hashes,
            anchors,
            reserve.tenant,
            time.monotonic(),
            keeps=reserve.keeps,
            ttl_s=reserve.ttl_s,
            durable=reserve.durable,
        )
        # What exists was found in a device's own cache, if it was not written twice.
        used = [self.session.shelf.blocks.get(each) for each in hashes]
        self._store.store_if_worth([block for block in used if block is not None and block.is_ready])
        reply = pb.KvReply.Reserved(states=bytes(reserved.states), offsets=self._offsets(reserved.blocks))
        self._send(pb.KvReply(id=request_id, reserved=reply))

    # Replies.

    def _offsets(self, blocks: Sequence[Block]) -> bytes:
        """uint64 [blocks, num_parts]."""
        namespace = self.session.namespace
        frames = np.array([block.frame for block in blocks], dtype=np.uint64)
        places = np.arange(namespace.num_parts, dtype=np.uint64) * np.uint64(namespace.slot_bytes)
        return pack_uint64(frames[:, None] + places)

    def _refuse(self, request_id: int, reason: str, retry_after_s: float) -> None:
        self._store.counts.num_refused += 1
        self._send(pb.KvReply(id=request_id, refused=pb.KvReply.Refused(reason=reason, retry_after_s=retry_after_s)))

    def _send(self, reply: pb.KvReply) -> None:
        self.replies.put_nowait(reply)

    def _wait(self, request_id: int, work: Any) -> None:
        if len(self._waiting) >= _MAX_WAITING:
            work.close()
            raise Overloaded(f"{_MAX_WAITING} requests of this session wait", _PROBE_TIMEOUT_S)
        task = self._waiting[request_id] = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._done(request_id, task))

    def _done(self, request_id: int, task: "asyncio.Task[None]") -> None:
        if self._waiting.get(request_id) is task:
            del self._waiting[request_id]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a request failed", error=repr(error))
            self.end(grpc.StatusCode.INTERNAL, repr(error))


def _chain(packed_hashes: bytes, packed_anchors: bytes, max_num: int) -> tuple[list[bytes], list[bytes]]:
    """Hashes, and as many anchors or none. Raises InvalidRequest or ValueError."""
    hashes, anchors = split(packed_hashes, HASH_BYTES), split(packed_anchors, ANCHOR_BYTES)
    if not 1 <= len(hashes) <= max_num:
        raise InvalidRequest(f"{len(hashes)} hashes: 1 to {max_num}")
    if anchors and len(anchors) != len(hashes):
        raise InvalidRequest(f"{len(anchors)} anchors: none, or one for each of {len(hashes)} hashes")
    return hashes, anchors


async def _first_of(requests: AsyncIterator[pb.KvRequest]) -> pb.KvRequest | None:
    with contextlib.suppress(TimeoutError, StopAsyncIteration):
        async with asyncio.timeout(_HELLO_TIMEOUT_S):
            return await anext(aiter(requests))
    return None
