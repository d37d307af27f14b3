"""What the index keeps of blocks, of those who hold them, and of the arena's segments."""

from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from albireo.kv.fingerprint import Namespace

# Blocks that nobody holds, least recently used first.
Idle = OrderedDict["Block", None]


@dataclass(eq=False, slots=True)
class Tenant:
    """What one tenant has in the arena, in all namespaces."""

    name: str
    num_blocks: int = 0
    num_bytes: int = 0
    idle_bytes: int = 0
    idle: Idle = field(default_factory=OrderedDict)


@dataclass(eq=False, slots=True)
class Shelf:
    """The blocks of one namespace by their hashes."""

    namespace: Namespace
    blocks: dict[bytes, "Block"] = field(default_factory=dict)
    idle: Idle = field(default_factory=OrderedDict)
    num_sessions: int = 0
    num_frames: int = 0
    num_segments: int = 0


@dataclass(eq=False, slots=True)
class Block:
    """A block in the arena.

    Attributes:
        frame: where it begins in the arena, bytes.
        anchor: 8 bytes that place it in Redis; empty: it never gets there.
        num_users: pins, and one while it is written or fetched; idle at 0.
        is_ready: its parts are complete.
        is_listed: can be found by its hash; if not, its frame is free when the last user leaves.
        is_stored: in Redis, or on the way there.
    """

    block_hash: bytes
    shelf: Shelf
    tenant: Tenant
    frame: int
    anchor: bytes
    expires_at: float
    durable: bool = False
    num_users: int = 1
    is_ready: bool = False
    is_listed: bool = True
    is_stored: bool = False
    num_hits: int = 0
    last_used: int = 0

    @property
    def is_worth_storing(self) -> bool:
        return bool(self.anchor) and not self.is_stored and (self.durable or self.num_hits >= 2)


@dataclass(eq=False, slots=True)
class Hold:
    """What one Acquire or Reserve of a session holds.

    Attributes:
        blocks: in the order of their chain; each is pinned, or one of the session's `writes`.
        is_open: a reservation that awaits Commit or Abort.
    """

    blocks: list[Block] = field(default_factory=list)
    keeps: bool = False
    is_open: bool = False


@dataclass(eq=False, slots=True)
class Session:
    """A planner's lease: pins and reservations, by the ids that it gave them.

    Attributes:
        held_bytes: of all frames that it keeps from eviction; at most credit_bytes.
        writes: reserved, and not committed yet.
        may_write: frames given up while its ranks may still write there; they stay out of use.
    """

    lease: int
    name: str
    epoch: int
    shelf: Shelf
    credit_bytes: int
    held_bytes: int = 0
    holds: dict[int, Hold] = field(default_factory=dict)
    pins: Counter[Block] = field(default_factory=Counter)
    writes: set[Block] = field(default_factory=set)
    may_write: list[int] = field(default_factory=list)

    @property
    def namespace(self) -> Namespace:
        return self.shelf.namespace


@dataclass(eq=False, slots=True)
class Segment:
    """A piece of the arena that belongs to one shelf at a time.

    Attributes:
        free: frames that may be taken.
        blocks: by frame; frames in quarantine are neither here nor free.
        last_used: the index's count of uses, when a block of it was last let go.
    """

    base: int
    shelf: Shelf | None = None
    free: list[int] = field(default_factory=list)
    blocks: dict[int, Block] = field(default_factory=dict)
    num_frames: int = 0
    num_idle: int = 0
    last_used: int = 0

    @property
    def is_idle(self) -> bool:
        """All that is in it may be evicted, and then it is empty."""
        return self.num_idle + len(self.free) == self.num_frames
