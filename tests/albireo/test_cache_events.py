"""Changes of the prefix cache on their way from the planner to a front end."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo.arrays import pack_int32
from albireo.cache_events import (
    Cached,
    Change,
    Removed,
    Reset,
    Stored,
    apply_change,
    chains,
    decode,
    encode,
    parents_first,
)
from albireo.v1.frontend_pb2 import CacheEvent, StoredBlocks


def stored(name: int, parent: int | None = None) -> Stored:
    return Stored(block_hash(name), b"" if parent is None else block_hash(parent), pack_int32([name, name + 1]))


def block_hash(name: int) -> bytes:
    return hashlib.sha256(b"%d" % name).digest()


def cached(*changes: Change) -> Cached:
    blocks: Cached = {}
    for change in changes:
        apply_change(blocks, change)
    return blocks


changes = st.one_of(
    st.builds(stored, st.integers(0, 9), st.one_of(st.none(), st.integers(0, 9))),
    st.builds(Removed, st.integers(0, 9).map(block_hash)),
    st.just(Reset()),
)


@given(st.lists(changes))
def test_what_is_sent_arrives(sent: list[Change]) -> None:
    """A reset after a reset says nothing."""
    expected = [each for each, before in zip(sent, [None, *sent], strict=False) if (each, before) != (Reset(), Reset())]
    assert decode(encode(sent)) == expected


def test_chains_and_removals_in_a_row_are_one_event_each() -> None:
    sent = [stored(1), stored(2, 1), stored(3, 2), stored(4, 2), Removed(block_hash(1)), Removed(block_hash(2))]
    events = encode(sent)
    assert [event.WhichOneof("event") for event in events] == ["stored", "stored", "removed_hashes"]
    assert [len(event.stored.hashes) // 32 for event in events[:2]] == [3, 1]
    assert [event.stored.parent_hash for event in events[:2]] == [b"", block_hash(2)]
    assert len(events[2].removed_hashes) == 64


@given(st.lists(st.tuples(st.integers(0, 30), st.one_of(st.none(), st.integers(0, 30)))))
def test_parents_come_before_their_children(links: list[tuple[int, int | None]]) -> None:
    """Whatever the order in which blocks were stored, and where a parent is not among them as well."""
    blocks = cached(*(stored(n, parent) for n, parent in links if parent is None or parent < n))
    told = list(parents_first(blocks))
    assert cached(*told) == blocks
    assert len(told) == len(blocks)
    places = {block.block_hash: place for place, block in enumerate(told)}
    assert all(places.get(block.parent_hash, -1) < place for place, block in enumerate(told))


def test_a_tree_is_told_in_few_chains() -> None:
    """Two conversations with a common beginning."""
    first = [stored(0), *(stored(n, n - 1) for n in range(1, 20))]
    second = [stored(100, 4), *(stored(n, n - 1) for n in range(101, 120))]
    told = parents_first(cached(*first, *second))
    assert [len(chain) for chain in chains(told)] == [25, 15]


def test_applying_changes_keeps_what_can_be_found() -> None:
    blocks = cached(stored(1), stored(2, 1), Removed(block_hash(1)), Removed(block_hash(7)))
    assert blocks == {block_hash(2): (block_hash(1), stored(2).token_ids)}
    apply_change(blocks, Reset())
    assert not blocks


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (CacheEvent(removed_hashes=b"x" * 33), "removed_hashes has 33 bytes"),
        (CacheEvent(stored=StoredBlocks(hashes=b"x" * 31, token_ids=b"abcd")), "hashes has 31 bytes"),
        (CacheEvent(stored=StoredBlocks(token_ids=b"abcd")), "4 bytes of token_ids for 0 hashes"),
        (CacheEvent(stored=StoredBlocks(hashes=b"x" * 64, token_ids=b"abc")), "3 bytes of token_ids for 2 hashes"),
    ],
)
def test_an_event_that_cannot_be_read_is_refused(event: CacheEvent, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode([event])
