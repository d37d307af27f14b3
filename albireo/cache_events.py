"""Changes of the prefix cache, as the planner tells them to front ends that follow it."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple, TypeAlias

from albireo.v1 import frontend_pb2

HASH_BYTES = 32


class Stored(NamedTuple):
    """A block that can be found.

    Attributes:
        parent_hash: of the block before it; empty where it begins a prompt.
        token_ids: int32, packed.
    """

    block_hash: bytes
    parent_hash: bytes
    token_ids: bytes


class Removed(NamedTuple):
    """A block that cannot be found any more."""

    block_hash: bytes


class Reset(NamedTuple):
    """Nothing can be found any more."""


Change: TypeAlias = Stored | Removed | Reset

# What can be found: (parent_hash, token_ids) by block_hash. Plain tuples are made in a sixth of the time.
Cached: TypeAlias = dict[bytes, tuple[bytes, bytes]]


def apply_change(blocks: Cached, change: Change) -> None:
    """Keeps ``blocks`` what can be found."""
    if isinstance(change, Stored):
        blocks[change.block_hash] = (change.parent_hash, change.token_ids)
    elif isinstance(change, Removed):
        blocks.pop(change.block_hash, None)
    else:
        blocks.clear()


def parents_first(blocks: Cached) -> Iterator[Stored]:
    """All blocks, chain by chain; nothing is worked out ahead. ``blocks`` must not change meanwhile."""
    told: set[bytes] = set()
    # From the youngest back: walking up from the ends of chains makes them long.
    for block_hash in reversed(blocks):
        chain = []
        while block_hash not in told and (block := blocks.get(block_hash)) is not None:
            chain.append(Stored(block_hash, *block))
            told.add(block_hash)
            block_hash = block[0]  # noqa: PLW2901  # the way up
        yield from reversed(chain)


def chains(blocks: Iterable[Stored]) -> Iterator[list[Stored]]:
    """Cuts a row of blocks where one is not the child of the one before it."""
    chain: list[Stored] = []
    for block in blocks:
        if chain and block.parent_hash != chain[-1].block_hash:
            yield chain
            chain = []
        chain.append(block)
    if chain:
        yield chain


def runs(changes: Iterable[Change]) -> Iterator[list[Stored] | list[Removed] | Reset]:
    """Changes in order, those that fit into one event together: a chain, removals in a row, resets in a row."""
    for kind, alike in groupby(changes, type):
        if kind is Stored:
            yield from chains(each for each in alike if isinstance(each, Stored))
        elif kind is Removed:
            yield [each for each in alike if isinstance(each, Removed)]
        else:
            yield Reset()


def encode(changes: Iterable[Change]) -> list[frontend_pb2.CacheEvent]:
    return [_event(run) for run in runs(changes)]


def decode(events: Iterable[frontend_pb2.CacheEvent]) -> list[Change]:
    """Raises ValueError for an event that cannot be read."""
    return [change for event in events for change in _changes(event)]


def _event(run: list[Stored] | list[Removed] | Reset) -> frontend_pb2.CacheEvent:
    if isinstance(run, Reset):
        return frontend_pb2.CacheEvent(reset=True)
    hashes = b"".join(each.block_hash for each in run)
    stored = [each for each in run if isinstance(each, Stored)]
    if not stored:
        return frontend_pb2.CacheEvent(removed_hashes=hashes)
    token_ids = b"".join(each.token_ids for each in stored)
    return frontend_pb2.CacheEvent(
        stored=frontend_pb2.StoredBlocks(parent_hash=stored[0].parent_hash, hashes=hashes, token_ids=token_ids)
    )


def _changes(event: frontend_pb2.CacheEvent) -> Sequence[Change]:
    which = event.WhichOneof("event")
    if which == "stored":
        return _stored(event.stored)
    if which == "removed_hashes":
        return [Removed(each) for each in _split(event.removed_hashes, HASH_BYTES, "removed_hashes")]
    return [Reset()] if which == "reset" else []


def _stored(stored: frontend_pb2.StoredBlocks) -> list[Stored]:
    hashes = _split(stored.hashes, HASH_BYTES, "hashes")
    if not hashes or len(stored.token_ids) % len(hashes):
        raise ValueError(f"stored blocks: {len(stored.token_ids)} bytes of token_ids for {len(hashes)} hashes")
    tokens = _split(stored.token_ids, len(stored.token_ids) // len(hashes), "token_ids")
    return [Stored(*each) for each in zip(hashes, [stored.parent_hash, *hashes[:-1]], tokens, strict=True)]


def _split(data: bytes, size: int, name: str) -> list[bytes]:
    if not size or len(data) % size:
        raise ValueError(f"{name} has {len(data)} bytes; a multiple of {size} is needed")
    return [data[start : start + size] for start in range(0, len(data), size)]
