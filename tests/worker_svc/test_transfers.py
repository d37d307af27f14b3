"""The copying thread of a rank: when a transfer begins, what becomes of it, and that it ends when it must."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from arena_server import ArenaServer, places, transfer
from transfer_ranks import WAIT_S, TransferRank, run_all, transfers_plan

from albireo.arrays import EMPTY_INT32
from albireo.errors import GroupError, StoreUnavailable
from albireo.kv.arena import PartCopy
from albireo.kv.part import HEADER_BYTES, read_part, slot_bytes, write_part
from albireo.plan import StepPlan, decode_rows
from albireo.transfers import KvLease, Transfer, TransferKind
from worker_svc.kv_parts import HostCopies, cut_blocks
from worker_svc.transfers import MAX_TRANSFERS_QUEUED

NUM_BLOCKS, NUM_HEADS = 8, 4
SHAPE = cut_blocks("words", 1, NUM_HEADS, 256, range(NUM_HEADS), writes=True)
STORE, LOAD = TransferKind.STORE, TransferKind.LOAD
LEASE = KvLease(bytes(16), 1 << 20, 1)


class MemoryArena:
    """An arena whose copies wait for the test where it wants that."""

    def __init__(self) -> None:
        self.memory = np.zeros(1 << 20, dtype=np.uint8)
        self.may_copy = threading.Event()
        self.may_copy.set()
        self.began = threading.Semaphore(0)
        self.is_lost = False
        self.is_there = True
        self.answers = threading.Event()
        self.answers.set()
        self.asked = threading.Event()
        self.num_attached = 0

    def attach(self, _lease: KvLease) -> "MemoryArena":
        self.asked.set()
        assert self.answers.wait(WAIT_S)
        if not self.is_there:
            raise StoreUnavailable("nobody there")
        self.is_lost = False
        self.num_attached += 1
        return self

    def write(self, copies: Sequence[PartCopy]) -> list[bool]:
        self._wait()
        for copy in copies:
            write_part(self._slot(copy), copy.name, copy.pieces)
        return [not self.is_lost for _ in copies]

    def read(self, copies: Sequence[PartCopy]) -> list[bool]:
        self._wait()
        return [not self.is_lost and read_part(self._slot(copy), copy.name, copy.pieces) for copy in copies]

    def close(self) -> None:
        self.num_attached -= 1

    def _wait(self) -> None:
        self.began.release()
        assert self.may_copy.wait(WAIT_S)

    def _slot(self, copy: PartCopy) -> np.ndarray:
        return self.memory[copy.offset : copy.offset + copy.num_bytes]


@pytest.fixture
def arena() -> MemoryArena:
    return MemoryArena()


@pytest.fixture
def cache() -> np.ndarray:
    generator = np.random.default_rng(5)
    return generator.integers(0, 2**63, (1, NUM_BLOCKS, 32, NUM_HEADS), dtype=np.uint64)


@pytest.fixture
def rank(arena: MemoryArena, cache: np.ndarray):
    rank = TransferRank(SHAPE, HostCopies(SHAPE, [cache], head_axis=3), NUM_BLOCKS, arena.attach)
    yield rank
    arena.may_copy.set()
    rank.close()


def move(kind: TransferKind, blocks: Sequence[int], after_step: int = -1, first: int = 0) -> Transfer:
    """Blocks to or from the places from ``first`` on, under the numbers of these places."""
    names = list(range(first, first + len(blocks)))
    offsets = places(first, len(blocks), SHAPE.num_parts, SHAPE.part_bytes)
    return transfer(kind, list(blocks), names, offsets, LEASE, after_step)


def step_plan(step_id: int, *transfers: Transfer, epoch: int = 1) -> StepPlan:
    return StepPlan(epoch, step_id, decode_rows(EMPTY_INT32), transfers=transfers)


def test_a_block_that_was_stored_is_loaded_elsewhere(rank: TransferRank, cache: np.ndarray):
    stored = cache[:, [3, 0]].copy()
    result = run_all([rank], move(STORE, [3, 0]))
    assert (result.succeeded.tolist(), result.num_bytes) == ([True, True], 2 * NUM_HEADS * 256)
    assert result.duration_ns > 0
    assert run_all([rank], move(LOAD, [6, 7])).succeeded.all()
    assert (cache[:, [6, 7]] == stored).all()


@pytest.mark.parametrize("place", [0, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 255])
def test_damage_is_told_of_its_block_alone(place: int, rank: TransferRank, arena: MemoryArena, cache: np.ndarray):
    """A bit of a part of the second of three blocks flips."""
    run_all([rank], move(STORE, [0, 1, 2]))
    arena.memory[(NUM_HEADS + 2) * slot_bytes(256) + place] ^= 4
    assert run_all([rank], move(LOAD, [3, 4, 5])).succeeded.tolist() == [True, False, True]
    assert (cache[:, [3, 5]] == cache[:, [0, 2]]).all()


def test_another_block_s_part_is_none_of_ours(rank: TransferRank):
    run_all([rank], move(STORE, [0, 1]))
    swapped = move(LOAD, [2, 3])
    swapped = swapped._replace(offsets=swapped.offsets[::-1])
    assert not run_all([rank], swapped).succeeded.any()


def test_a_transfer_waits_for_its_step_and_later_ones_for_it(rank: TransferRank, arena: MemoryArena):
    for step_id in (7, 8):
        rank.take(step_plan(step_id))
    rank.take(step_plan(9, move(STORE, [0], after_step=8), move(STORE, [1], after_step=6, first=1)))
    assert rank.transfers.step_completed() == 0
    assert not arena.began.acquire(timeout=0.05)
    rank.transfers.step_completed()
    first, second = rank.result(), rank.result()
    assert first.transfer_id < second.transfer_id
    assert rank.transfers.step_completed() > 0
    assert rank.transfers.step_completed() == 0


def test_steps_of_older_epochs_complete_first(rank: TransferRank, arena: MemoryArena):
    """They may still write into the blocks."""
    for step_id in range(3):
        rank.take(step_plan(step_id))
    rank.take(transfers_plan([move(LOAD, [0])], epoch=2, step_id=50))
    for _ in range(2):
        rank.transfers.step_completed()
    assert not arena.began.acquire(timeout=0.05)
    rank.transfers.step_completed()
    assert not rank.result().succeeded.any()  # nothing is there


def test_what_is_abandoned_fails_and_the_next_goes_on(rank: TransferRank, arena: MemoryArena):
    """Of the one under way what is through stays; no byte moves after that."""
    arena.may_copy.clear()
    rank.take(transfers_plan([move(STORE, [0, 1, 2]), move(STORE, [3], first=3)]))
    assert arena.began.acquire(timeout=WAIT_S)
    rank.transfers.abandon()
    arena.may_copy.set()
    assert [rank.result().succeeded.tolist() for _ in range(2)] == [[True, False, False], [False]]
    assert not arena.memory[NUM_HEADS * slot_bytes(256) :].any()
    assert arena.num_attached == 0
    assert run_all([rank], move(STORE, [4], first=4)).succeeded.all()


def test_at_the_end_the_copy_under_way_is_waited_for(rank: TransferRank, arena: MemoryArena):
    arena.may_copy.clear()
    rank.take(transfers_plan([move(STORE, [0, 1])]))
    assert arena.began.acquire(timeout=WAIT_S)
    rank.transfers.end()
    waiting = threading.Thread(target=rank.transfers.wait_until_ended)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    arena.may_copy.set()
    waiting.join(WAIT_S)
    assert not waiting.is_alive()
    assert rank.results.empty()
    assert not arena.memory[NUM_HEADS * slot_bytes(256) :].any()


def test_copies_rest_for_what_they_take_of_a_core_and_not_for_what_they_wait(arena: MemoryArena, cache: np.ndarray):
    """Beside a step, 99 times as long: for the wait of the first of two this would be longer than the test waits."""
    rank = TransferRank(SHAPE, HostCopies(SHAPE, [cache], head_axis=3), NUM_BLOCKS, arena.attach, share=0.01)
    arena.may_copy.clear()
    rank.take(step_plan(0, move(STORE, [0, 1])))
    assert arena.began.acquire(timeout=WAIT_S)
    time.sleep(1.5 * WAIT_S / 99)
    arena.may_copy.set()
    try:
        assert rank.result().succeeded.all()
    finally:
        rank.close()


def test_a_store_that_does_not_answer_delays_no_end(rank: TransferRank, arena: MemoryArena):
    """And when it does at last, nothing is copied any more."""
    arena.answers.clear()
    rank.take(transfers_plan([move(STORE, [0])]))
    assert arena.asked.wait(WAIT_S)
    rank.transfers.end()
    rank.transfers.wait_until_ended()
    arena.answers.set()
    (copying,) = (thread for thread in threading.enumerate() if thread.name == "kv-copies")
    copying.join(WAIT_S)
    assert (arena.num_attached, arena.memory.any(), rank.results.empty()) == (0, False, True)


def test_a_lost_store_fails_transfers_at_once_and_is_found_again(rank: TransferRank, arena: MemoryArena):
    arena.may_copy.clear()
    rank.take(transfers_plan([move(STORE, [0, 1])]))
    assert arena.began.acquire(timeout=WAIT_S)
    arena.is_lost, arena.is_there = True, False
    arena.may_copy.set()
    assert not rank.result().succeeded.any()
    began = time.monotonic()
    for _ in range(20):
        assert not run_all([rank], move(STORE, [0])).succeeded.any()
    assert time.monotonic() - began < 5
    arena.is_there = True
    back = move(STORE, [0])._replace(lease=LEASE._replace(arena_id=bytes(range(16))))
    assert run_all([rank], back).succeeded.all()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"blocks": np.array([0, NUM_BLOCKS], np.int32)}, "2 blocks, one twice or not of the 8"),
        ({"blocks": np.array([-1, 0], np.int32)}, "2 blocks, one twice or not of the 8"),
        ({"blocks": np.array([1, 1], np.int32)}, "2 blocks, one twice or not of the 8"),
        ({"offsets": np.zeros((2, 3), np.uint64)}, "3 parts of a block, which has 4"),
        ({"after_step": 5}, "after step 5 where step 5 follows"),
    ],
)
def test_transfers_that_do_not_fit_are_refused(changes: dict, reason: str, rank: TransferRank):
    with pytest.raises(GroupError, match=reason):
        rank.take(transfers_plan([move(STORE, [0, 1])._replace(**changes)], step_id=5))


def test_ids_grow(rank: TransferRank):
    first, second = move(STORE, [0]), move(STORE, [1], first=1)
    with pytest.raises(GroupError, match=r"transfer \d+ after transfer \d+"):
        rank.take(transfers_plan([second, first]))


def test_places_outside_of_the_arena_fail(tmp_path: Path, cache: np.ndarray):
    with ArenaServer(tmp_path / "arena.sock", 1 << 20) as server:
        rank = TransferRank(SHAPE, HostCopies(SHAPE, [cache], head_axis=3), NUM_BLOCKS, server.address)
        outside = move(STORE, [0])._replace(lease=server.open_lease())
        outside = outside._replace(offsets=outside.offsets + np.uint64(1 << 20))
        assert not run_all([rank], outside).succeeded.any()
        rank.close()


def test_no_more_are_queued_than_the_limit(rank: TransferRank, arena: MemoryArena):
    arena.may_copy.clear()
    rank.take(transfers_plan([move(STORE, [0])]))
    assert arena.began.acquire(timeout=WAIT_S)
    rank.take(transfers_plan([move(STORE, [0]) for _ in range(MAX_TRANSFERS_QUEUED)]))
    with pytest.raises(GroupError, match="1024 transfers are queued already; 1024 at most"):
        rank.take(transfers_plan([move(STORE, [0])]))


def test_a_lease_that_ends_is_let_go_of(tmp_path: Path, cache: np.ndarray):
    """The store learns that nobody writes under it any more, and the next lease is another attachment."""
    with ArenaServer(tmp_path / "arena.sock") as server:
        rank = TransferRank(SHAPE, HostCopies(SHAPE, [cache], head_axis=3), NUM_BLOCKS, server.address)
        old, new = server.open_lease(), server.open_lease()
        assert run_all([rank], move(STORE, [0])._replace(lease=old)).succeeded.all()
        server.close_lease(old)
        assert server.gone.acquire(timeout=WAIT_S)
        assert not run_all([rank], move(STORE, [1])._replace(lease=old)).succeeded.any()
        assert run_all([rank], move(LOAD, [1])._replace(lease=new)).succeeded.all()
        rank.close()
