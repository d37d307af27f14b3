"""What the planner asks of the KV store, and what it answers."""

from typing import NamedTuple

from albireo.arrays import UInt64Array


class Reserve(NamedTuple):
    """Room for blocks. ``keeps``: they stay, with those that the store has already, until they are released."""

    request_id: int
    hashes: list[bytes]
    anchors: list[bytes]
    tenant: str
    keeps: bool


class Acquire(NamedTuple):
    """As many leading blocks as can be read within ``wait_s``; they stay until they are released."""

    request_id: int
    hashes: list[bytes]
    anchors: list[bytes]
    tenant: str
    priority: int
    wait_s: float


class Commit(NamedTuple):
    """``succeeded``: by new block of the reservation, whether it was written. ``keeps``: a release will follow."""

    request_id: int
    succeeded: list[bool]
    keeps: bool


class Abort(NamedTuple):
    """A reservation is given up; nobody writes there any more."""

    request_id: int


class Release(NamedTuple):
    request_id: int


Request = Reserve | Acquire | Commit | Abort | Release


class BlockState(NamedTuple):
    """Of one block of a reservation. ``is_new``: ours to write; else it exists, or somebody is writing it."""

    is_new: bool
    is_ready: bool


class Reserved(NamedTuple):
    """``states``: by block; ``offsets``: [number of new ones, parts of a block]."""

    request_id: int
    states: list[BlockState]
    offsets: UInt64Array


class Acquired(NamedTuple):
    """``offsets``: [blocks that can be read, parts of a block]; nothing of an empty one needs a release."""

    request_id: int
    offsets: UInt64Array


class Denied(NamedTuple):
    """Refused, or not answered in time: the request has had no effect that lasts."""

    request_id: int


Reply = Reserved | Acquired | Denied
