"""The prefix cache as this front end follows it: numbered batches of changes, read by any number of subscribers.

The planner is followed only while somebody subscribes. Nothing is kept per subscriber: each reads the same batches at
its own pace, and one that has fallen behind all that are kept gets the state as it is.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from smg_grpc_proto.generated import common_pb2

from albireo.cache_events import Cached, Change, Reset, apply_change, parents_first
from albireo.errors import GroupUnavailable, Overloaded
from scheduler_svc.frontend.link import PlannerLink
from scheduler_svc.frontend.vllm_kv import kv_events

_MAX_CHANGES = 512  # of a batch: some 60 KiB
_MAX_KEPT_CHANGES = 1 << 15
_MAX_SUBSCRIBERS = 64


class Batch(NamedTuple):
    number: int
    timestamp: float  # seconds since the epoch
    num_changes: int
    events: list[Any]  # KvCacheEvents


class KvFeed:
    """One per front end. Batches have consecutive numbers, from 1, whether or not the planner was lost in between: what
    its successor has begins with a reset."""

    def __init__(self, link: PlannerLink) -> None:
        self._link = link
        self._kept: deque[Batch] = deque()
        self._num_kept_changes = 0
        self._num_events = 0
        self._blocks: Cached = {}  # as far as the batches tell
        self._is_synced = False  # the state is known: a reset has come since we began to follow
        self._is_closed = False
        self._subscribers: set[asyncio.Event] = set()
        self.last = 0  # number of the latest batch
        link.on_cache_changes = self._see
        link.on_load = self._wake

    @contextlib.contextmanager
    def subscribe(self) -> Iterator[asyncio.Event]:
        """An event that is set when there are batches or figures, or the feed is closed. Raises Overloaded."""
        if len(self._subscribers) >= _MAX_SUBSCRIBERS:
            raise Overloaded(f"{_MAX_SUBSCRIBERS} subscribers follow the KV cache, which is all that are served")
        news = asyncio.Event()
        self._subscribers.add(news)
        if len(self._subscribers) == 1:
            self._link.follow_cache(True)
        try:
            yield news
        finally:
            self._subscribers.remove(news)
            if not self._subscribers:
                self._link.follow_cache(False)
                self._is_synced = False
                self._blocks = {}

    def close(self) -> None:
        """Subscribers are told that the server ends."""
        self._is_closed = True
        self._wake()

    def check_open(self) -> None:
        """Raises GroupUnavailable when the feed is closed."""
        if self._is_closed:
            raise GroupUnavailable("the server is shutting down")

    def batch(self, number: int) -> Batch | None:
        """The batch with this number; None when it is not there: not yet, or not any more."""
        index = number - self.last - 1 + len(self._kept)
        return self._kept[index] if 0 <= index < len(self._kept) else None

    def can_go_on(self, number: int) -> bool:
        """Whether the batch with this number is there, or will be the next."""
        return self.last + 1 - len(self._kept) <= number <= self.last + 1

    def snapshot(self) -> Iterator[Any] | None:
        """The state as KvEventBatches, made one by one, the last with the number of the latest batch; None: it is not
        known yet."""
        return _snapshot(self._blocks.copy(), self.last) if self._is_synced else None

    def _see(self, changes: Sequence[Change]) -> None:
        if not self._subscribers:
            return
        if not self._is_synced:
            first = next((index for index, change in enumerate(changes) if isinstance(change, Reset)), None)
            if first is None:
                return  # of an earlier time
            self._is_synced, changes = True, changes[first:]
        for start in range(0, len(changes), _MAX_CHANGES):
            self._add(changes[start : start + _MAX_CHANGES])
        self._wake()

    def _add(self, changes: Sequence[Change]) -> None:
        for change in changes:
            apply_change(self._blocks, change)
        events = kv_events(changes, self._num_events + 1)
        self._num_events += len(events)
        self.last += 1
        self._kept.append(Batch(self.last, time.time(), len(changes), events))
        self._num_kept_changes += len(changes)
        while self._num_kept_changes > _MAX_KEPT_CHANGES:
            self._num_kept_changes -= self._kept.popleft().num_changes

    def _wake(self) -> None:
        for news in self._subscribers:
            news.set()


class Subscription:
    """Where one subscriber is.

    Args:
        start: the number of the batch to go on with; 0, or one that is not kept: the state comes first.
    """

    def __init__(self, feed: KvFeed, start: int) -> None:
        self._feed = feed
        self._next = start
        self._snapshot: Iterator[Any] = iter(())

    def take(self) -> Any:
        """The next KvEventBatch; None when there is none now."""
        if (chunk := next(self._snapshot, None)) is not None:
            return chunk
        if not (self._next and self._feed.can_go_on(self._next)):
            snapshot = self._feed.snapshot()
            if snapshot is None:
                return None
            self._snapshot, self._next = snapshot, self._feed.last + 1
            return next(snapshot)
        batch = self._feed.batch(self._next)
        if batch is None:
            return None
        self._next += 1
        return common_pb2.KvEventBatch(sequence_number=batch.number, timestamp=batch.timestamp, events=batch.events)


def _snapshot(blocks: Cached, last: int) -> Iterator[Any]:
    """KvEventBatches with numbers up to ``last``. There are never more than numbers: each batch before told as many."""
    now = time.time()
    stored = parents_first(blocks)
    count = max(1, -(-len(blocks) // _MAX_CHANGES))
    for index in range(count):
        changes: list[Change] = [Reset()] if index == 0 else []
        changes += islice(stored, _MAX_CHANGES)
        yield common_pb2.KvEventBatch(
            sequence_number=last - count + 1 + index,
            timestamp=now,
            events=kv_events(changes, None),
            snapshot=common_pb2.KvSnapshotChunk(index=index, count=count, blocks=len(blocks)),
        )
