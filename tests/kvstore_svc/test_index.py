"""The index against a plain model: pins, reservations, eviction, quotas, expiry, leases."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from albireo.errors import InvalidRequest, Overloaded
from albireo.kv.fingerprint import Namespace
from kvstore_svc.blocks import Session
from kvstore_svc.index import BlockState, Index

SEGMENT = 4096
SMALL = Namespace(b"s" * 32, num_parts=1, part_bytes=960)  # 1024 bytes a frame: 4 in a segment
LARGE = Namespace(b"l" * 32, num_parts=2, part_bytes=448)  # the same in two parts
CHAINS = [[bytes([tenant, number]) * 16 for number in range(6)] for tenant in range(3)]


def make_index(num_segments: int = 2, **more: float) -> Index:
    return Index(num_segments * SEGMENT, SEGMENT, int(more.get("tenant_bytes", 0)), more.get("ttl_s", 0.0))


def open_session(
    index: Index, lease: int = 1, namespace: Namespace = SMALL, credit_bytes: int = 1 << 20, name: str = ""
) -> Session:
    return index.open_session(lease, name or f"p{lease}", lease, namespace, credit_bytes)


def put(index: Index, session: Session, chain: list[bytes], hold: int = 99, tenant: str = "t", **more: object) -> None:
    """Blocks that are ready and that nobody holds."""
    reserved = index.reserve(session, hold, chain, [], tenant, 0.0, **more)  # type: ignore[arg-type]
    index.commit(session, hold, [True] * len(reserved.blocks))


def num_ready(index: Index, session: Session, chain: list[bytes], now: float = 0.0) -> int:
    return index.lookup(session, chain, now)[0]


def hashes(letter: str, num: int) -> list[bytes]:
    return [f"{letter}{i:03}".encode() * 8 for i in range(num)]


def test_a_reserved_block_is_pending_and_ready_after_its_commit():
    index = make_index()
    session, other = open_session(index), open_session(index, 2)
    chain = hashes("a", 3)
    reserved = index.reserve(session, 1, chain, [], "t", 0.0)
    assert reserved.states == [BlockState.NEW] * 3
    assert index.lookup(other, chain, 0.0) == (0, 3)
    assert index.reserve(other, 1, chain, [], "t", 0.0).states == [BlockState.PENDING] * 3
    assert [block.block_hash for block in index.commit(session, 1, [True, False, True])] == [chain[0], chain[2]]
    assert index.lookup(other, chain, 0.0) == (1, 0)
    assert index.reserve(other, 2, chain, [], "t", 0.0).states == [BlockState.READY, BlockState.NEW, BlockState.READY]


def test_the_end_of_a_chain_goes_before_its_beginning():
    index = make_index()
    session = open_session(index)
    chain = hashes("a", 6)
    put(index, session, chain)
    for num_more, left in ((2, 6), (3, 5), (5, 3)):
        index.flush("u")
        put(index, session, hashes("b", num_more), tenant="u")
        assert num_ready(index, session, chain) == left


def test_what_is_used_stays():
    index = make_index()
    session = open_session(index)
    first, second = hashes("a", 4), hashes("b", 4)
    put(index, session, first)
    put(index, session, second)
    index.acquire(session, 1, first, 0.0)
    index.release(session, 1)
    put(index, session, hashes("c", 4))
    assert (num_ready(index, session, first), num_ready(index, session, second)) == (4, 0)


def test_a_lookup_is_no_use():
    index = make_index()
    session = open_session(index)
    put(index, session, hashes("a", 4))
    put(index, session, hashes("b", 4))
    assert num_ready(index, session, hashes("a", 4)) == 4
    put(index, session, hashes("c", 4))
    assert num_ready(index, session, hashes("a", 4)) == 0


def test_a_full_store_refuses_and_loses_nothing():
    """Nothing is evicted for a reservation that cannot be had as a whole."""
    index = make_index()
    session = open_session(index)
    put(index, session, hashes("a", 4), hold=1, keeps=True)
    put(index, session, hashes("b", 4))
    with pytest.raises(Overloaded, match="5 blocks: the arena has room for 4") as refused:
        index.reserve(session, 2, hashes("c", 5), [], "t", 0.0)
    assert refused.value.retry_after_s > 0
    assert num_ready(index, session, hashes("b", 4)) == 4
    put(index, session, hashes("c", 4))
    assert num_ready(index, session, hashes("a", 4)) == 4
    index.release(session, 1)
    put(index, session, hashes("d", 8))


def test_a_session_holds_no_more_than_its_credit():
    index = make_index()
    session = open_session(index, credit_bytes=3 * 1024)
    put(index, session, hashes("a", 3))
    put(index, session, hashes("b", 2))
    index.acquire(session, 1, hashes("a", 2), 0.0)
    with pytest.raises(Overloaded, match="holds 2048 bytes and asks for 2048 more: 3072"):
        index.acquire(session, 2, hashes("b", 2), 0.0)
    with pytest.raises(Overloaded, match="holds 2048 bytes"):
        index.reserve(session, 2, hashes("c", 2), [], "t", 0.0)
    index.release(session, 1)
    assert len(index.acquire(session, 2, hashes("b", 2), 0.0)) == 2


def test_a_tenant_over_its_quota_loses_its_own_blocks_first():
    index = make_index(tenant_bytes=4 * 1024)
    session = open_session(index)
    put(index, session, hashes("b", 4), tenant="quiet")
    put(index, session, hashes("a", 4), tenant="loud")
    put(index, session, hashes("c", 3), tenant="loud")
    assert num_ready(index, session, hashes("b", 4)) == 4
    assert num_ready(index, session, hashes("a", 4)) == 1
    with pytest.raises(Overloaded, match="tenant 'loud' has 0 bytes in use and asks for 5120 more: 4096"):
        index.reserve(session, 1, hashes("d", 5), [], "loud", 0.0)


def test_blocks_expire_not_all_at_once():
    index = make_index(ttl_s=100.0)
    session = open_session(index)
    early, late = [b"\xff" * 32], [b"\x00" * 32]
    put(index, session, early)
    put(index, session, late)
    assert (num_ready(index, session, early, 89.0), num_ready(index, session, early, 91.0)) == (1, 0)
    assert (num_ready(index, session, late, 99.0), num_ready(index, session, late, 101.0)) == (1, 0)
    index.room.sweep(95.0, 100)
    assert index.used_bytes == 1024
    index.room.sweep(101.0, 100)
    assert index.used_bytes == 0


def test_an_expired_block_is_written_anew():
    index = make_index(ttl_s=100.0)
    session = open_session(index)
    chain = [b"\xff" * 32]
    put(index, session, chain)
    assert index.reserve(session, 1, chain, [], "t", 89.0).states == [BlockState.READY]
    index.abort(session, 1, may_write=False)
    assert index.reserve(session, 1, chain, [], "t", 91.0).states == [BlockState.NEW]
    assert index.used_bytes == 1024


def test_a_reservation_does_not_evict_its_own_beginning():
    index = make_index()
    session = open_session(index)
    chain = hashes("a", 8)
    put(index, session, hashes("b", 4))
    put(index, session, chain[:4])
    index.acquire(session, 1, hashes("b", 4), 0.0)
    index.release(session, 1)
    reserved = index.reserve(session, 2, chain, [], "t", 0.0)
    assert reserved.states == [BlockState.READY] * 4 + [BlockState.NEW] * 4
    assert num_ready(index, session, chain) == 4


def test_a_pinned_block_outlives_its_time_and_is_not_found():
    index = make_index(ttl_s=100.0)
    session = open_session(index)
    chain = [b"\x00" * 32]
    put(index, session, chain)
    (block,) = index.acquire(session, 1, chain, 50.0)
    index.room.sweep(101.0, 100)
    assert index.used_bytes == 1024
    fresh = index.reserve(session, 2, chain, [], "t", 101.0)
    assert fresh.blocks[0].frame != block.frame
    index.release(session, 1)
    assert index.used_bytes == 1024


def test_frames_of_a_lost_session_wait_for_its_ranks():
    index = make_index()
    session, other = open_session(index), open_session(index, 2)
    lost = {block.frame for block in index.reserve(session, 1, hashes("a", 4), [], "t", 0.0).blocks}
    index.close_session(session)
    assert index.lookup(other, hashes("a", 4), 0.0) == (0, 0)
    reserved = index.reserve(other, 1, hashes("b", 4), [], "t", 0.0)
    assert not lost & {block.frame for block in reserved.blocks}
    with pytest.raises(Overloaded):
        index.reserve(other, 2, hashes("c", 1), [], "t", 0.0)
    index.end_quarantine(session.lease)
    again = index.reserve(other, 2, hashes("c", 4), [], "t", 0.0)
    assert {block.frame for block in again.blocks} == lost


def test_an_abort_while_ranks_may_write_waits_for_them_too():
    index = make_index()
    session, other = open_session(index, credit_bytes=4096), open_session(index, 2)
    index.reserve(session, 1, hashes("a", 4), [], "t", 0.0)
    index.abort(session, 1, may_write=True)
    assert index.lookup(other, hashes("a", 4), 0.0) == (0, 0)
    with pytest.raises(Overloaded):
        index.reserve(other, 1, hashes("b", 5), [], "t", 0.0)
    with pytest.raises(Overloaded, match="the session holds 4096"):
        index.reserve(session, 2, hashes("b", 1), [], "t", 0.0)
    index.close_session(session)
    index.end_quarantine(session.lease)
    index.reserve(other, 1, hashes("b", 8), [], "t", 0.0)


def test_an_empty_segment_goes_to_the_model_that_needs_it():
    index = make_index()
    one, two = open_session(index, 1, SMALL), open_session(index, 2, LARGE)
    put(index, one, hashes("a", 8))
    put(index, two, hashes("b", 3))
    assert (num_ready(index, one, hashes("a", 8)), num_ready(index, two, hashes("b", 3))) == (4, 3)
    index.acquire(two, 1, hashes("b", 1), 0.0)
    put(index, one, hashes("c", 4))
    assert num_ready(index, two, hashes("b", 3)) == 3, "a pin keeps a segment"


@pytest.mark.parametrize(
    ("namespace", "epoch", "message"),
    [
        (SMALL, 7, "epoch 7 of 'p1': more than 7"),
        (Namespace(SMALL.fingerprint, 1, 128), 8, "this fingerprint has 1 and 960"),
        (Namespace(b"x" * 32, 5, 960), 8, "blocks of 5120 bytes with headers; the store's segments have 4096"),
    ],
)
def test_sessions_that_do_not_fit_are_refused(namespace: Namespace, epoch: int, message: str):
    index = make_index()
    index.open_session(1, "p1", 7, SMALL, 1 << 20)
    with pytest.raises(InvalidRequest, match=message):
        index.open_session(2, "p1", epoch, namespace, 1 << 20)


def test_flush_forgets_one_tenant_and_frees_pinned_blocks_later():
    index = make_index()
    session = open_session(index)
    put(index, session, hashes("a", 2), tenant="t")
    put(index, session, hashes("b", 2), tenant="u")
    index.acquire(session, 1, hashes("a", 1), 0.0)
    assert index.flush("t") == 2
    assert (num_ready(index, session, hashes("a", 2)), num_ready(index, session, hashes("b", 2))) == (0, 2)
    assert index.used_bytes == 3 * 1024
    index.release(session, 1)
    assert index.used_bytes == 2 * 1024


@dataclass
class ModelHold:
    blocks: list[bytes]
    new: list[bytes] = field(default_factory=list)
    is_open: bool = False
    keeps: bool = False


class IndexMachine(RuleBasedStateMachine):
    """Sessions that come, ask, write and die. The model knows who may write and read which frame."""

    def __init__(self) -> None:
        super().__init__()
        self.index = make_index(num_segments=3, tenant_bytes=6 * 1024, ttl_s=50.0)
        self.now = 0.0
        self.next_lease = self.next_hold = 1
        self.sessions: dict[int, Session] = {}
        self.holds: dict[tuple[int, int], ModelHold] = {}
        self.written: dict[int, int] = {}  # frame -> lease that may write there, or may have a rank that does
        self.read: dict[tuple[int, int], list[int]] = {}  # frames that a hold reads
        self.dead: list[int] = []

    leases = st.runner().flatmap(lambda self: st.sampled_from(sorted(self.sessions)))
    chains = st.tuples(st.integers(0, 2), st.integers(1, 6)).map(lambda pair: CHAINS[pair[0]][: pair[1]])

    @rule(large=st.booleans())
    def begin(self, large: bool) -> None:
        if len(self.sessions) < 3:
            namespace = LARGE if large else SMALL
            session = open_session(self.index, self.next_lease, namespace, credit_bytes=7 * 1024)
            self.sessions[self.next_lease] = session
            self.next_lease += 1

    @precondition(lambda self: self.sessions)
    @rule(lease=leases, chain=chains, keeps=st.booleans())
    def reserve(self, lease: int, chain: list[bytes], keeps: bool) -> None:
        hold, session = self.next_hold, self.sessions[lease]
        before = num_ready(self.index, session, chain, self.now)
        try:
            reserved = self.index.reserve(session, hold, chain, [], f"t{chain[0][0]}", self.now, keeps=keeps)
        except Overloaded:
            return
        self.next_hold += 1
        assert all(state is BlockState.READY for state in reserved.states[:before])
        for block in reserved.blocks:
            assert block.frame not in self.written, "two may write there"
            assert not any(block.frame in frames for frames in self.read.values()), "somebody reads there"
            self.written[block.frame] = lease
        ready = [each for each, state in zip(chain, reserved.states, strict=True) if state is BlockState.READY]
        self.read[lease, hold] = [session.shelf.blocks[each].frame for each in ready]
        self.holds[lease, hold] = ModelHold(ready, [b.block_hash for b in reserved.blocks], True, keeps)

    @precondition(lambda self: any(hold.is_open for hold in self.holds.values()))
    @rule(data=st.data(), ends=st.sampled_from(["commit", "abort", "abort while writing"]))
    def settle(self, data: st.DataObject, ends: str) -> None:
        key = data.draw(st.sampled_from(sorted(key for key, hold in self.holds.items() if hold.is_open)))
        lease, hold_id = key
        session, hold = self.sessions[lease], self.holds[key]
        frames = {each: session.shelf.blocks[each].frame for each in hold.new if each in session.shelf.blocks}
        if ends == "commit":
            succeeded = data.draw(st.lists(st.booleans(), min_size=len(hold.new), max_size=len(hold.new)))
            committed = self.index.commit(session, hold_id, succeeded)
            good = [each for each, is_good in zip(hold.new, succeeded, strict=True) if is_good]
            assert [block.block_hash for block in committed] == good
            self._stop_writing(lease, hold, frames)
            if hold.keeps:
                hold.is_open, hold.blocks = False, hold.blocks + good
                self.read[key] += [block.frame for block in committed]
                return
        else:
            self.index.abort(session, hold_id, may_write=ends != "abort")
            if ends == "abort":
                self._stop_writing(lease, hold, frames)
        del self.holds[key], self.read[key]

    def _stop_writing(self, lease: int, hold: ModelHold, frames: dict[bytes, int]) -> None:
        for each in hold.new:
            # What was flushed meanwhile is not found by name: all of this hold's frames that the index does not cover.
            if each in frames:
                self.written.pop(frames[each], None)
        session = self.sessions[lease]
        still = {block.frame for block in session.writes} | set(session.may_write)
        for frame in [frame for frame, writer in self.written.items() if writer == lease and frame not in still]:
            del self.written[frame]

    @precondition(lambda self: self.sessions)
    @rule(lease=leases, chain=chains)
    def acquire(self, lease: int, chain: list[bytes]) -> None:
        hold, session = self.next_hold, self.sessions[lease]
        ready = num_ready(self.index, session, chain, self.now)
        try:
            blocks = self.index.acquire(session, hold, chain, self.now)
        except Overloaded:
            return
        self.next_hold += 1
        assert [block.block_hash for block in blocks] == chain[:ready]
        assert not any(block.frame in self.written for block in blocks), "read while it is written"
        if blocks:
            self.holds[lease, hold] = ModelHold(chain[:ready])
            self.read[lease, hold] = [block.frame for block in blocks]

    @precondition(lambda self: any(not hold.is_open for hold in self.holds.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(key for key, hold in self.holds.items() if not hold.is_open)))
        self.index.release(self.sessions[key[0]], key[1])
        del self.holds[key], self.read[key]

    @precondition(lambda self: self.sessions)
    @rule(lease=leases)
    def die(self, lease: int) -> None:
        self.index.close_session(self.sessions.pop(lease))
        for key in [key for key in self.holds if key[0] == lease]:
            del self.holds[key], self.read[key]
        self.dead.append(lease)

    @precondition(lambda self: self.dead)
    @rule()
    def ranks_are_gone(self) -> None:
        lease = self.dead.pop(0)
        self.index.end_quarantine(lease)
        self.written = {frame: writer for frame, writer in self.written.items() if writer != lease}

    @precondition(lambda self: self.sessions)
    @rule(lease=leases, chain=chains, succeeds=st.booleans())
    def load(self, lease: int, chain: list[bytes], succeeds: bool) -> None:
        blocks = self.index.begin_load(
            self.sessions[lease].shelf, chain, [b"a" * 8] * len(chain), f"t{chain[0][0]}", self.now
        )
        assert not any(block.frame in self.written for block in blocks)
        assert not any(block.frame in frames for block in blocks for frames in self.read.values())
        self.index.end_load(blocks, [succeeds] * len(blocks))

    @rule(seconds=st.floats(0, 30))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.index.room.sweep(self.now, 1)

    @rule(tenant=st.integers(0, 2))
    def flush(self, tenant: int) -> None:
        self.index.flush(f"t{tenant}")

    @invariant()
    def frames_have_one_owner(self) -> None:
        for segment in self.index.frames.segments:
            frames = [*segment.free, *segment.blocks]
            given_up = [frame for frame in self._given_up() if self.index.frames.segment_of(frame) is segment]
            assert len({*frames, *given_up}) == len(frames) + len(given_up) == segment.num_frames
            assert segment.num_idle == sum(block.num_users == 0 for block in segment.blocks.values())

    @invariant()
    def readers_find_what_they_pinned(self) -> None:
        for (lease, _), frames in self.read.items():
            for frame in frames:
                assert self.index.covers(self.sessions[lease], frame, 64, writes=False)
                assert not self.index.covers(self.sessions[lease], frame, 64, writes=True)

    @invariant()
    def tenants_are_counted(self) -> None:
        for tenant in self.index.room.tenants.values():
            blocks = [b for s in self.index.frames.segments for b in s.blocks.values() if b.tenant is tenant]
            assert (tenant.num_blocks, tenant.num_bytes) == (len(blocks), 1024 * len(blocks))
            assert tenant.num_bytes <= 6 * 1024
            assert tenant.idle_bytes == 1024 * sum(block.num_users == 0 for block in blocks)

    def _given_up(self) -> Iterator[int]:
        for session in self.sessions.values():
            yield from session.may_write
        yield from (frame for frame, lease in self.written.items() if lease in self.dead)

    def teardown(self) -> None:
        """Leases go back to zero: without sessions all that is left may be evicted."""
        for lease in list(self.sessions):
            self.die(lease)
        while self.dead:
            self.ranks_are_gone()
        assert self.index.quarantined_bytes == 0
        assert self.index.used_bytes == self.index.idle_bytes
        self.index.flush()
        assert self.index.used_bytes == 0


IndexMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40)
TestIndex = IndexMachine.TestCase
