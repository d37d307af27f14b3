"""A front end that follows the prefix cache knows what can be found, as soon as it has read all that waits for it."""

import hashlib

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from albireo.arrays import unpack_int32
from albireo.block_hash import chain_hashes, root_hash
from albireo.cache_events import Cached, Reset, Stored, apply_change, decode, encode
from scheduler_svc.planner.block_pool import BlockPool
from scheduler_svc.planner.cache_follower import CacheFollower
from simulation import Simulation

NUM_BLOCKS = 8
BLOCK_SIZE = 2


class Mirror:
    """A front end's side."""

    def __init__(self) -> None:
        self.follower = CacheFollower(lambda: None)
        self.blocks: Cached = {}
        self.num_changes = 0

    def read(self, num: int) -> int:
        """Reads one message of so many changes at most, by way of the wire."""
        changes = decode(encode(self.follower.take(num)))
        for change in changes:
            apply_change(self.blocks, change)
        self.num_changes += len(changes)
        return len(changes)

    def read_all(self) -> int:
        before = self.num_changes
        while self.read(3):
            pass
        return self.num_changes - before


class FollowedPool(RuleBasedStateMachine):
    """Sequences of two tenants come and go in a pool, its group is lost; front ends follow it, or do not read."""

    @initialize()
    def begin(self) -> None:
        self.pool = BlockPool(NUM_BLOCKS)
        self.held: list[list[int]] = []  # by sequence
        self.mirrors: dict[int, Mirror] = {}
        self.num_mirrors = 0
        self.step = 0

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=4), tenant=st.sampled_from("ab"))
    def run(self, tokens: list[int], tenant: str) -> None:
        """A sequence starts, with the blocks that it finds, and publishes the rest."""
        token_ids = np.repeat(np.array(tokens, dtype=np.int32), BLOCK_SIZE)
        hashes = chain_hashes(root_hash(tenant), token_ids, BLOCK_SIZE)
        found = self.pool.find(hashes[:-1])
        num_new = len(hashes) - len(found)
        if num_new + self.pool.num_free_among(found) > self.pool.num_free:
            return
        self.pool.hold(found)
        blocks = found + self.pool.allocate(num_new)
        start = len(found)
        parent = hashes[start - 1] if start else b""
        self.pool.publish(blocks[start:], hashes[start:], parent, token_ids[start * BLOCK_SIZE :])
        self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), fence=st.booleans())
    def end(self, data: st.DataObject, fence: bool) -> None:
        blocks = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.give_back(blocks, self.step if fence else self.step - 1)

    @rule()
    def complete_step(self) -> None:
        self.pool.release(self.step)
        self.step += 1

    @rule()
    def flush(self) -> None:
        self.pool.forget_cache()

    @rule(num_blocks=st.integers(4, NUM_BLOCKS))
    def lose_group(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, self.pool.followers)
        self.held.clear()

    @precondition(lambda self: len(self.mirrors) < 3)
    @rule()
    def follow(self) -> None:
        mirror = self.mirrors[self.num_mirrors] = Mirror()
        self.pool.follow(self.num_mirrors, mirror.follower)
        self.num_mirrors += 1

    @precondition(lambda self: self.mirrors)
    @rule(data=st.data())
    def follow_again(self, data: st.DataObject) -> None:
        """Without a word that it stopped, and with whatever it knows already."""
        index = data.draw(st.sampled_from(sorted(self.mirrors)))
        mirror = self.mirrors[index]
        mirror.follower = CacheFollower(lambda: None)
        self.pool.follow(index, mirror.follower)

    @precondition(lambda self: self.mirrors)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from(sorted(self.mirrors)))
        del self.mirrors[index], self.pool.followers[index]

    @precondition(lambda self: self.mirrors)
    @rule(data=st.data(), num=st.integers(1, 5))
    def read(self, data: st.DataObject, num: int) -> None:
        self.mirrors[data.draw(st.sampled_from(sorted(self.mirrors)))].read(num)

    @precondition(lambda self: self.mirrors)
    @rule(data=st.data())
    def read_all(self, data: st.DataObject) -> None:
        """What had to be read is bounded, whatever has happened since the last time."""
        mirror = self.mirrors[data.draw(st.sampled_from(sorted(self.mirrors)))]
        assert mirror.read_all() <= 1 + 4 * NUM_BLOCKS
        assert mirror.blocks == self.pool._contents

    @invariant()
    def what_is_stored_is_what_can_be_found(self) -> None:
        if hasattr(self, "pool"):
            assert self.pool._contents.keys() == self.pool._blocks.keys()

    def teardown(self) -> None:
        for mirror in getattr(self, "mirrors", {}).values():
            mirror.read_all()
            assert mirror.blocks == self.pool._contents


TestFollowedPool = FollowedPool.TestCase
TestFollowedPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_blocks_name_their_tokens_and_their_parents() -> None:
    """Of a prompt computed in chunks, and of what was generated after it."""
    world = Simulation(max_num_batched_tokens=6)
    mirror = Mirror()
    world.state.pool.follow(0, mirror.follower)
    prompt = list(range(3, 16))
    key = world.submit(prompt, 8, ignore_eos=True, tenant="a")
    world.finish()
    mirror.read_all()
    history = prompt + world.expected[key].got
    parent, told = b"", list(mirror.blocks.items())
    for index, block_hash in enumerate(chain_hashes(root_hash("a"), np.array(history[:20], dtype=np.int32), 4)):
        told_hash, (told_parent, token_ids) = told[index]
        assert (told_hash, told_parent) == (block_hash, parent)
        assert unpack_int32(token_ids).tolist() == history[4 * index : 4 * index + 4]
        parent = block_hash
    assert len(told) == 5


def test_blocks_can_be_found_when_the_plan_that_computes_them_is_made() -> None:
    """Routing may count on them from then on."""
    world = Simulation()
    mirror = Mirror()
    world.state.pool.follow(0, mirror.follower)
    world.submit(list(range(3, 16)), 4)
    assert world.plan()
    mirror.read_all()
    assert len(mirror.blocks) == 3
    world.finish()


def test_a_loss_of_the_group_is_a_reset() -> None:
    world = Simulation()
    mirror = Mirror()
    world.state.pool.follow(0, mirror.follower)
    world.submit(list(range(3, 16)), 4)
    assert world.plan()
    mirror.read_all()
    world.lose_group()
    assert mirror.follower.take(10) == [Reset()]
    world.finish()
    mirror.read_all()
    assert mirror.blocks == world.state.pool._contents


def test_a_block_that_comes_and_goes_unread_is_not_told() -> None:
    follower = CacheFollower(lambda: None)
    follower.begin({})
    assert follower.take(10) == [Reset()]
    block = Stored(hashlib.sha256(b"").digest(), b"", b"")
    follower.store(block)
    follower.remove(block.block_hash)
    assert follower.take(10) == []
