"""Subscribers of the KV feed know what can be found, whenever they come and however slowly they read."""

import contextlib
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from albireo.arrays import pack_int32
from albireo.cache_events import Change, Removed, Reset, Stored
from albireo.errors import GroupUnavailable, Overloaded
from scheduler_svc.frontend import kv_feed
from scheduler_svc.frontend.kv_feed import KvFeed, Subscription

TOKENS = [7, 8]


class FakeLink:
    """A planner with a cache of its own: what a link tells while it is followed."""

    def __init__(self) -> None:
        self.on_cache_changes: Any = None
        self.on_load: Any = None
        self.blocks: dict[bytes, Stored] = {}
        self.is_followed = False

    def follow_cache(self, follows: bool) -> None:
        self.is_followed = follows
        if follows:
            self.tell([Reset(), *self.blocks.values()])

    def store(self, *names: int) -> None:
        """Each block is the child of the one before it."""
        new = [stored(name, parent) for name, parent in zip(names, [None, *names], strict=False)]
        new = [block for block in new if block.block_hash not in self.blocks]
        self.blocks |= {block.block_hash: block for block in new}
        self.tell(new)

    def remove(self, name: int) -> None:
        if self.blocks.pop(block_hash(name), None) is not None:
            self.tell([Removed(block_hash(name))])

    def lose(self, keeps: Sequence[int] = ()) -> None:
        """There is another planner, which has other blocks."""
        self.blocks = {block_hash(name): stored(name) for name in keeps}
        if self.is_followed:
            self.follow_cache(True)

    def tell(self, changes: list[Change]) -> None:
        if self.is_followed and changes:
            self.on_cache_changes(changes)


def block_hash(name: int) -> bytes:
    return hashlib.sha256(b"%d" % name).digest()


def short(data: bytes) -> int:
    return int.from_bytes(data[:8], "little", signed=True)


def stored(name: int, parent: int | None = None) -> Stored:
    return Stored(block_hash(name), b"" if parent is None else block_hash(parent), pack_int32(TOKENS))


class Reader:
    """What a gateway makes of the batches that it gets.

    Attributes:
        cursor: number of the last batch.
    """

    def __init__(self, feed: KvFeed, cursor: int | None = None) -> None:
        self.subscription = Subscription(feed, 0 if cursor is None else cursor + 1)
        self.cursor = cursor
        self.blocks: set[int] = set()
        self.snapshots: list[tuple[int, int]] = []
        self.event_ids: list[int] = []

    def read(self) -> bool:
        batch = self.subscription.take()
        if batch is None:
            return False
        if batch.HasField("snapshot"):
            self.snapshots.append((batch.snapshot.index, batch.snapshot.count))
            if batch.snapshot.index:
                assert batch.sequence_number == self.cursor + 1
            else:
                assert batch.sequence_number >= 1
                assert batch.events[0].HasField("cleared")
        else:
            assert self.cursor is not None, "it knew nothing"
            assert batch.sequence_number == self.cursor + 1
        self.cursor = batch.sequence_number
        for event in batch.events:
            if not batch.HasField("snapshot"):
                self.event_ids.append(event.event_id)
            self._apply(event)
        return True

    def _apply(self, event: Any) -> None:
        which = event.WhichOneof("data")
        if which == "stored":
            for block in event.stored.blocks:
                assert (list(block.token_ids), block.block_size) == (TOKENS, len(TOKENS))
                self.blocks.add(block.block_hash)
        elif which == "removed":
            self.blocks.difference_update(event.removed.block_hashes)
        else:
            assert which == "cleared"
            self.blocks.clear()

    def read_all(self) -> None:
        while self.read():
            pass


class Feed(RuleBasedStateMachine):
    """A small feed: batches of 3 changes, 10 of which are kept."""

    @initialize()
    def begin(self) -> None:
        self.stack = contextlib.ExitStack()
        patch = self.stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(kv_feed, "_MAX_CHANGES", 3)
        patch.setattr(kv_feed, "_MAX_KEPT_CHANGES", 10)
        self.link = FakeLink()
        self.feed = KvFeed(self.link)  # type: ignore[arg-type]  # of a link only this
        self.readers: dict[Reader, contextlib.ExitStack] = {}
        self.bygone: list[Reader] = []

    @rule(first=st.integers(0, 20), num=st.integers(1, 8))
    def store(self, first: int, num: int) -> None:
        self.link.store(*range(first, first + num))

    @rule(name=st.integers(0, 20))
    def remove(self, name: int) -> None:
        self.link.remove(name)

    @rule(keeps=st.lists(st.integers(0, 20), max_size=5, unique=True))
    def lose_planner(self, keeps: list[int]) -> None:
        self.link.lose(keeps)

    @precondition(lambda self: len(self.readers) < 3)
    @rule()
    def subscribe(self) -> None:
        self._enter(Reader(self.feed))

    @precondition(lambda self: self.bygone)
    @rule(data=st.data())
    def come_again(self, data: st.DataObject) -> None:
        """With what it knew when it left."""
        before = self.bygone.pop(data.draw(st.integers(0, len(self.bygone) - 1)))
        reader = Reader(self.feed, before.cursor)
        reader.blocks = before.blocks
        self._enter(reader)

    @rule(cursor=st.integers(50, 2**64 - 2))
    def come_from_elsewhere(self, cursor: int) -> None:
        """Another front end has told it a number that is none here."""
        if cursor > self.feed.last:
            reader = Reader(self.feed, cursor)
            with self.feed.subscribe():
                reader.read_all()
            assert reader.snapshots
            assert reader.blocks == self._known()

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        reader = self._one(data)
        self.readers.pop(reader).close()
        if reader.cursor is not None:
            self.bygone.append(reader)

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        self._one(data).read()

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def read_all(self, data: st.DataObject) -> None:
        reader = self._one(data)
        reader.read_all()
        assert reader.blocks == self._known()

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            for reader, subscribed in self.readers.items():
                reader.read_all()
                assert reader.blocks == self._known()
                assert reader.event_ids == sorted(set(reader.event_ids))
                subscribed.close()
            assert not self.link.is_followed
            self.stack.close()

    def _enter(self, reader: Reader) -> None:
        subscribed = contextlib.ExitStack()
        subscribed.enter_context(self.feed.subscribe())
        self.readers[reader] = subscribed

    def _one(self, data: st.DataObject) -> Reader:
        return data.draw(st.sampled_from(list(self.readers)))

    def _known(self) -> set[int]:
        return {short(each) for each in self.link.blocks}


TestFeed = Feed.TestCase
TestFeed.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.fixture
def link() -> FakeLink:
    return FakeLink()


@pytest.fixture
def feed(link: FakeLink) -> KvFeed:
    return KvFeed(link)  # type: ignore[arg-type]  # of a link only this


def test_the_first_batch_is_number_one(feed: KvFeed, link: FakeLink) -> None:
    """The state, then what changes, each with the number that follows."""
    link.store(1, 2)
    with feed.subscribe():
        subscription = Subscription(feed, 0)
        state = subscription.take()
        assert (state.sequence_number, state.snapshot.count, state.snapshot.blocks) == (1, 1, 2)
        link.store(1, 2, 3)
        link.remove(3)
        first, second = subscription.take(), subscription.take()
    assert [first.sequence_number, second.sequence_number] == [2, 3]
    (block,) = first.events[0].stored.blocks
    assert block.block_hash == short(block_hash(3))
    assert first.events[0].stored.parent_block_hash == short(block_hash(2))
    assert not state.events[1].stored.HasField("parent_block_hash")
    assert list(second.events[0].removed.block_hashes) == [short(block_hash(3))]


def test_hashes_are_signed(feed: KvFeed, link: FakeLink) -> None:
    names = range(40)
    for name in names:
        link.store(name)
    with feed.subscribe():
        events = Subscription(feed, 0).take().events
    hashes = {block.block_hash for event in events for block in event.stored.blocks}
    assert hashes == set(np.array([short(block_hash(name)) for name in names], dtype=np.int64).tolist())
    assert min(hashes) < 0 < max(hashes)


def test_a_large_state_comes_in_chunks(feed: KvFeed, link: FakeLink) -> None:
    """Their numbers lead up to the one that the state was taken at."""
    link.store(*range(1300))
    with feed.subscribe():
        reader = Reader(feed)
        reader.read_all()
    assert reader.snapshots == [(0, 3), (1, 3), (2, 3)]
    assert reader.cursor == feed.last == 3
    assert len(reader.blocks) == 1300


def test_nothing_is_known_before_the_planner_answers(feed: KvFeed, link: FakeLink) -> None:
    """What comes from an earlier time is no part of the state."""
    link.follow_cache = lambda follows: setattr(link, "is_followed", follows)  # type: ignore[method-assign]
    with feed.subscribe():
        subscription = Subscription(feed, 0)
        assert subscription.take() is None
        link.store(1)
        assert subscription.take() is None
        link.tell([Removed(block_hash(1)), Reset(), stored(2)])
        batch = subscription.take()
    assert [event.WhichOneof("data") for event in batch.events] == ["cleared", "stored"]


async def test_subscribers_are_woken(feed: KvFeed, link: FakeLink) -> None:
    with feed.subscribe() as news, feed.subscribe() as others:
        for event in (news, others):
            event.clear()
        link.store(1)
        assert news.is_set()
        assert others.is_set()
        news.clear()
        link.on_load()
        assert news.is_set()
        feed.check_open()
        news.clear()
        feed.close()
        assert news.is_set()
        with pytest.raises(GroupUnavailable):
            feed.check_open()


def test_there_is_a_bound_on_subscribers(feed: KvFeed) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(64):
            stack.enter_context(feed.subscribe())
        with pytest.raises(Overloaded, match="64 subscribers"):
            stack.enter_context(feed.subscribe())
