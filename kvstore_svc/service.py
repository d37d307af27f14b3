"""The store: one index, one arena, and everybody who has a lease. Runs on one event loop."""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from grpc import aio

from albireo.kv.fingerprint import Namespace
from albireo.v1 import kvstore_pb2 as pb
from kvstore_svc.blocks import Block, Session, Shelf
from kvstore_svc.counts import Counts, register_metrics
from kvstore_svc.data import DataStream
from kvstore_svc.index import Index
from kvstore_svc.memory import Memory
from kvstore_svc.ranks import Ranks
from kvstore_svc.tier import Tier

SERVICE_NAME = "albireo.v1.KvStore"

_MAX_MESSAGE_BYTES = 32 << 20  # of blocks in one Acquire or Reserve
_SWEEP_EVERY_S = 1.0
_SWEEPS = 60  # until all segments have been looked at


class Store:
    """What the streams share.

    Args:
        credit_bytes: what one session may hold.

    Attributes:
        arena_id: 16 random bytes, new with each start.
        tier: Redis; None: there is none.
    """

    def __init__(self, index: Index, memory: Memory, arena_socket: str, credit_bytes: int, counts: Counts) -> None:
        self.arena_id = secrets.token_bytes(16)
        self.arena_socket = arena_socket
        self.index = index
        self.memory = memory
        self.credit_bytes = credit_bytes
        self.counts = counts
        self.tier: Tier | None = None
        self.ranks = Ranks(memory, self.arena_id, self._end_quarantine)
        self._changed = asyncio.Event()
        self._closers: dict[int, Callable[[str], None]] = {}  # by lease
        self._metrics = register_metrics(counts, *self._readings())

    # Sessions.

    def open_session(self, hello: pb.KvRequest.Hello, close: Callable[[str], None]) -> Session:
        """Begins a lease, and ends an older one of the same name.

        Args:
            close: ends the session's stream; takes the reason.
        Raises:
            InvalidRequest, ValueError: a field of ``hello``.
        """
        namespace = Namespace(hello.fingerprint, hello.num_parts, hello.part_bytes)
        lease = secrets.randbits(64)
        session = self.index.open_session(lease, hello.name, hello.epoch, namespace, self.credit_bytes)
        for older in list(self.index.sessions.values()):
            if older.name == hello.name and older is not session:
                self._closers[older.lease](f"epoch {hello.epoch} of {hello.name!r} has begun")
        self._closers[lease] = close
        self.ranks.open(lease)
        return session

    def close_session(self, session: Session) -> None:
        """Everything that it held falls; what its ranks may still write to waits for them."""
        if self.index.sessions.get(session.lease) is not session:
            return
        del self._closers[session.lease]
        self.index.close_session(session)
        self.ranks.close(session.lease)
        self.tell_change()

    def welcome(self, session: Session) -> pb.KvReply.Welcome:
        return pb.KvReply.Welcome(
            arena_id=self.arena_id,
            arena_socket=self.arena_socket,
            credit_bytes=session.credit_bytes,
            arena_bytes=len(self.memory.bytes),
            lease=session.lease,
            max_blocks=max_blocks(session.shelf),
        )

    def _end_quarantine(self, lease: int) -> None:
        self.index.end_quarantine(lease)
        self.tell_change()

    # Blocks that come.

    def tell_change(self) -> None:
        """Blocks may be ready, or gone: whoever waits for some looks again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_for_change(self) -> None:
        await self._changed.wait()

    def store_if_worth(self, blocks: Sequence[Block]) -> None:
        """Hands to Redis what is durable or has been hit twice."""
        if self.tier is not None:
            self.tier.store([block for block in blocks if block.is_worth_storing])

    async def keep_sweeping(self) -> None:
        num_segments = len(self.index.frames.segments)
        while True:
            self.index.room.sweep(time.monotonic(), -(-num_segments // _SWEEPS))
            await asyncio.sleep(_SWEEP_EVERY_S)

    # Operators.

    async def get_stats(self, _request: pb.GetKvStatsRequest, _context: "aio.ServicerContext[Any, Any]") -> pb.KvStats:
        index = self.index
        tenants = sorted(index.room.tenants.values(), key=lambda tenant: tenant.name)
        return pb.KvStats(
            arena_id=self.arena_id,
            arena_bytes=len(self.memory.bytes),
            used_bytes=index.used_bytes,
            pinned_bytes=self._pinned_bytes(),
            quarantined_bytes=index.quarantined_bytes,
            num_sessions=len(index.sessions),
            num_ranks=self.ranks.num_attached,
            tenants=[
                pb.KvStats.Tenant(tenant=each.name, num_blocks=each.num_blocks, num_bytes=each.num_bytes)
                for each in tenants
            ],
            num_hits=index.num_hits,
            num_misses=self.counts.num_misses,
            num_evicted=index.room.num_evicted,
            num_redis_workers=self.tier.num_alive if self.tier else 0,
        )

    async def flush(self, request: pb.FlushKvRequest, _context: "aio.ServicerContext[Any, Any]") -> pb.FlushKvReply:
        num_blocks = self.index.flush(
            request.tenant if request.HasField("tenant") else None,
            request.fingerprint if request.HasField("fingerprint") else None,
        )
        self.tell_change()
        return pb.FlushKvReply(num_blocks=num_blocks)

    def handlers(self, run_session: Callable[..., Any]) -> "grpc.GenericRpcHandler[Any, Any]":
        """``run_session``: serves one Session stream."""
        data = DataStream(self.index, self.memory.bytes, self.counts)
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Session": grpc.stream_stream_rpc_method_handler(
                    run_session,
                    request_deserializer=pb.KvRequest.FromString,
                    response_serializer=pb.KvReply.SerializeToString,
                ),
                "Data": grpc.stream_stream_rpc_method_handler(data.run),
                "GetStats": grpc.unary_unary_rpc_method_handler(
                    self.get_stats,
                    request_deserializer=pb.GetKvStatsRequest.FromString,
                    response_serializer=pb.KvStats.SerializeToString,
                ),
                "Flush": grpc.unary_unary_rpc_method_handler(
                    self.flush,
                    request_deserializer=pb.FlushKvRequest.FromString,
                    response_serializer=pb.FlushKvReply.SerializeToString,
                ),
            },
        )

    def _pinned_bytes(self) -> int:
        index = self.index
        return index.used_bytes - index.idle_bytes - index.quarantined_bytes

    def _readings(self) -> tuple[dict[str, Any], dict[str, Any]]:
        index = self.index
        gauges = {
            "albireo_kv_arena_bytes": ("Size of the arena", lambda: len(self.memory.bytes)),
            "albireo_kv_used_bytes": ("Bytes of frames with blocks", lambda: index.used_bytes),
            "albireo_kv_pinned_bytes": ("Of them, not to be evicted now", self._pinned_bytes),
            "albireo_kv_quarantined_bytes": ("Given up, but a rank may write", lambda: index.quarantined_bytes),
            "albireo_kv_sessions": ("Planners attached", lambda: len(index.sessions)),
            "albireo_kv_ranks": ("Ranks that have mapped the arena", lambda: self.ranks.num_attached),
            "albireo_kv_redis_workers": ("Redis workers that run", lambda: self.tier.num_alive if self.tier else 0),
            "albireo_kv_redis_queued_bytes": (
                "Waiting to be written",
                lambda: self.tier.queued_bytes if self.tier else 0,
            ),
        }
        counters = {
            "albireo_kv_hits": ("Blocks asked for and pinned", lambda: index.num_hits),
            "albireo_kv_evictions": ("Blocks evicted", lambda: index.room.num_evicted),
        }
        return gauges, counters


def max_blocks(shelf: Shelf) -> int:
    """Of one Acquire or Reserve."""
    return max(1, _MAX_MESSAGE_BYTES // shelf.namespace.frame_bytes)
