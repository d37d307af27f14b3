"""The life of a block: made, used, idle, evicted. Pure, like the index above it."""

import sys
from collections.abc import Iterable, Iterator

from kvstore_svc.blocks import Block, Segment, Shelf, Tenant
from kvstore_svc.frames import Frames

_TTL_JITTER = 0.1


class Room:
    """Frames, and the blocks in them, with the order in which idle ones go.

    Args:
        tenant_bytes: what one tenant may have; 0: all.
        ttl_s: of blocks that come without one; 0: for ever.
    """

    def __init__(self, frames: Frames, tenant_bytes: int, ttl_s: float) -> None:
        self.frames = frames
        self.tenants: dict[str, Tenant] = {}
        self.num_evicted = 0
        self._tenant_bytes = tenant_bytes or sys.maxsize
        self._ttl_s = ttl_s
        self._num_uses = 0
        self._next_swept = 0

    def shortage(self, shelf: Shelf, tenant_name: str, num: int) -> str:
        """Why ``num`` more blocks cannot be made; empty: they can."""
        need = num * shelf.namespace.frame_bytes
        tenant = self.tenants.get(tenant_name)
        in_use = tenant.num_bytes - tenant.idle_bytes if tenant else 0
        if in_use + need > self._tenant_bytes:
            return f"tenant {tenant_name!r} has {in_use} bytes in use and asks for {need} more: {self._tenant_bytes}"
        room = self.frames.num_free(shelf) + len(shelf.idle)
        if room < num:
            room += len(self.frames.idle_elsewhere(shelf)) * self.frames.per_segment(shelf)
        return "" if num <= room else f"{num} blocks: the arena has room for {room}, the rest is in use"

    def make(self, shelf: Shelf, tenant_name: str, block_hash: bytes, anchor: bytes, now: float, ttl_s: float) -> Block:
        """A new block with one user, listed and not ready. The caller has asked for `shortage`."""
        frame_bytes = shelf.namespace.frame_bytes
        tenant = self.tenants.setdefault(tenant_name, Tenant(tenant_name))
        while tenant.num_bytes + frame_bytes > self._tenant_bytes:
            self._evict(next(iter(tenant.idle)))
        frame = self.frames.take(shelf)
        if frame is None:
            self._make_room(shelf)
            frame = self.frames.take(shelf)
        assert frame is not None
        self.tenants[tenant_name] = tenant  # it may have lost its last block just now
        block = Block(block_hash, shelf, tenant, frame, anchor, self._expiry(block_hash, now, ttl_s))
        tenant.num_blocks += 1
        tenant.num_bytes += frame_bytes
        shelf.blocks[block_hash] = block
        self.frames.place(block)
        return block

    def add_user(self, block: Block) -> None:
        if block.num_users == 0:
            self._take_from_idle(block)
        block.num_users += 1

    def drop_user(self, block: Block) -> None:
        block.num_users -= 1
        if block.num_users:
            return
        if not (block.is_listed and block.is_ready):
            self.frames.give_back(self.detach(block))
            return
        self._num_uses += 1
        block.shelf.idle[block] = None
        block.tenant.idle[block] = None
        block.tenant.idle_bytes += block.shelf.namespace.frame_bytes
        segment = self.frames.segment_of(block.frame)
        segment.num_idle += 1
        segment.last_used = block.last_used = self._num_uses

    def unlist(self, block: Block) -> None:
        """Its hash finds it no more."""
        if block.is_listed:
            block.is_listed = False
            del block.shelf.blocks[block.block_hash]

    def forget(self, block: Block) -> None:
        """At once for look-ups; its frame is free when its last user leaves."""
        self.unlist(block)
        if block.num_users == 0:
            self._take_from_idle(block)
            self.frames.give_back(self.detach(block))

    def detach(self, block: Block) -> int:
        """Parts a block from its frame, which is returned: to be given back, now or later."""
        self.unlist(block)
        self.frames.remove(block)
        tenant = block.tenant
        tenant.num_blocks -= 1
        tenant.num_bytes -= block.shelf.namespace.frame_bytes
        if tenant.num_blocks == 0:
            del self.tenants[tenant.name]
        return block.frame

    def drop_expired(self, blocks: Iterable[Block], now: float) -> None:
        for block in list(blocks):
            if block.is_listed and block.is_ready and block.expires_at <= now:
                self.forget(block)

    def sweep(self, now: float, num_segments: int) -> None:
        """Frees what has expired in the next few segments, so that no call takes long."""
        segments = self.frames.segments
        for _ in range(min(num_segments, len(segments))):
            self._next_swept = (self._next_swept + 1) % len(segments)
            self.drop_expired(segments[self._next_swept].blocks.values(), now)

    def _make_room(self, shelf: Shelf) -> None:
        """Evicts the block of the shelf that was used least recently, or a whole segment of another shelf if all of it
        was used before that."""
        oldest = next(iter(shelf.idle), None)
        elsewhere: Segment | None = min(
            self.frames.idle_elsewhere(shelf), key=lambda segment: segment.last_used, default=None
        )
        if elsewhere is not None and (oldest is None or elsewhere.last_used < oldest.last_used):
            for block in list(elsewhere.blocks.values()):
                self._evict(block)
        elif oldest is not None:
            self._evict(oldest)

    def _evict(self, block: Block) -> None:
        self.num_evicted += 1
        self.forget(block)

    def _take_from_idle(self, block: Block) -> None:
        del block.shelf.idle[block]
        del block.tenant.idle[block]
        block.tenant.idle_bytes -= block.shelf.namespace.frame_bytes
        self.frames.segment_of(block.frame).num_idle -= 1

    def _expiry(self, block_hash: bytes, now: float, ttl_s: float) -> float:
        """A little earlier for some blocks than for others, so that not all of a burst expire at once."""
        ttl_s = ttl_s or self._ttl_s
        return now + ttl_s * (1 - _TTL_JITTER * block_hash[0] / 255) if ttl_s else float("inf")


def ready_prefix(shelf: Shelf, hashes: Iterable[bytes], now: float) -> Iterator[Block]:
    """The blocks of the longest prefix that is ready."""
    for each in hashes:
        block = shelf.blocks.get(each)
        if block is None or not block.is_ready or block.expires_at <= now:
            return
        yield block
