"""Sequences that begin alike share blocks, within a tenant and nowhere else. Tokens are the truth machine's: exact."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo.block_hash import chain_hashes, root_hash
from scheduler_svc.planner.block_pool import BlockPool
from simulation import Simulation

VOCAB_SIZE = 1009


def simulation(**limits: int) -> Simulation:
    defaults = {
        "block_size": 32,
        "num_blocks": 400,
        "max_num_seqs": 32,
        "max_model_len": 1024,
        "max_num_batched_tokens": 2048,
        "vocab_size": VOCAB_SIZE,
    }
    return Simulation(**{**defaults, **limits})


def text(seed: int, num: int) -> list[int]:
    return [random.Random(f"{seed} {i}").randrange(3, VOCAB_SIZE) for i in range(num)]


def start(simulation: Simulation, keys: list[tuple[int, int]]) -> list[int]:
    """Runs until all of ``keys``, just submitted, have begun; returns how many tokens of each were found."""
    sequences = [simulation.state.sequences[key] for key in keys]
    while any(sequence.num_cached_tokens < 0 for sequence in sequences):
        assert simulation.plan() or simulation.run_device() or simulation.commit()
    return [sequence.num_cached_tokens for sequence in sequences]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("budget", [64, 2048])
def test_sixteen_requests_compute_their_shared_prefix_once(depth: int, budget: int) -> None:
    """They come at the same moment: one computes the 512 tokens, fifteen wait for it, a step or a few."""
    world = simulation(depth=depth, max_num_batched_tokens=budget)
    keys = [world.submit(text(0, 512) + text(i, 20), 4, ignore_eos=True) for i in range(1, 17)]
    assert sorted(start(world, keys)) == [0] + [512] * 15
    world.finish()
    assert world.num_computed_tokens == 512 + 16 * (20 + 3)


def test_another_tenant_computes_the_same_text_itself() -> None:
    world = simulation()
    prompt = text(0, 512)
    world.submit(prompt, 4, ignore_eos=True, tenant="a")
    world.finish()
    first = world.num_computed_tokens
    key = world.submit(prompt, 4, ignore_eos=True, tenant="b")
    assert start(world, [key]) == [0]
    world.finish()
    assert world.num_computed_tokens == 2 * first == 2 * (512 + 3)
    key = world.submit(prompt, 4, ignore_eos=True, tenant="a")
    assert start(world, [key]) == [480], "all but the last block, of which a token must be computed"
    world.finish()


def test_completions_of_one_request_share_full_blocks_and_compute_the_partial_one() -> None:
    world = simulation()
    keys = [world.submit(text(0, 100), 40, ignore_eos=True, temperature=1.0, seed=i) for i in range(4)]
    assert start(world, keys) == [0, 96, 96, 96]
    held = world.state.pool.num_held
    assert held == 3 + 4, "three full blocks for all, a partial one each"
    world.finish()
    assert world.num_computed_tokens == 100 + 3 * 4 + 4 * 39


def test_a_conversation_finds_what_it_has_generated() -> None:
    """Generated blocks can be found once their sequence has left its slot."""
    world = simulation()
    key = world.submit(text(0, 40), 60, ignore_eos=True)
    world.finish()
    answer = world.expected[key].got
    key = world.submit(text(0, 40) + answer + text(1, 10), 4, ignore_eos=True)
    assert start(world, [key]) == [96]
    world.finish()


def test_what_follows_a_stop_string_is_not_found() -> None:
    """Published blocks are cut where the front end ended the sequence."""
    world = simulation()
    key = world.submit(text(0, 40), 400, ignore_eos=True)
    while len(world.expected[key].got) < 200:
        world.plan(), world.run_device(), world.commit()
    got = list(world.expected[key].got)
    world.truncate(key, 30)
    world.finish()
    key = world.submit(text(0, 40) + got, 4, ignore_eos=True)
    assert start(world, [key]) == [64]
    world.finish()


def test_a_preempted_sequence_finds_its_own_blocks() -> None:
    world = simulation(num_blocks=33, max_num_seqs=2, max_model_len=1024)
    world.submit(text(0, 500), 300, ignore_eos=True)
    world.submit(text(1, 400), 300, ignore_eos=True)
    world.finish()
    assert world.num_preemptions > 0
    wasted = world.num_computed_tokens - (900 + 2 * 299)
    assert wasted < 700 * world.num_preemptions
    assert world.checker.num_shared > 0


def test_without_the_cache_nothing_is_shared() -> None:
    world = simulation(caches_prefixes=False)
    for _ in range(3):
        world.submit(text(0, 512), 4, ignore_eos=True)
    world.finish()
    assert world.num_computed_tokens == 3 * (512 + 3)
    assert world.state.pool.num_cached == 0


def test_a_prefix_in_use_stays_while_others_are_evicted() -> None:
    """Least recently used goes first, and the ends of sequences before their beginnings."""
    world = simulation(num_blocks=40, max_num_seqs=2)
    for i in range(1, 12):
        world.submit(text(0, 256) + text(i, 300), 2, ignore_eos=True)
        world.finish()
    assert world.state.pool.num_evicted > 0
    key = world.submit(text(0, 256) + text(99, 10), 2, ignore_eos=True)
    assert start(world, [key]) == [256]
    world.finish()


def test_a_flushed_cache_finds_nothing_and_running_sequences_go_on() -> None:
    world = simulation()
    world.submit(text(0, 512), 4, ignore_eos=True)
    world.finish()
    world.submit(text(1, 512), 40, ignore_eos=True)
    for _ in range(5):
        world.plan(), world.run_device(), world.commit()
    world.send(0, flushes_cache=True)
    keys = [world.submit(text(0, 512), 4, ignore_eos=True), world.submit(text(1, 512), 4, ignore_eos=True)]
    assert start(world, keys) == [0, 0]
    world.check_pool()
    world.finish()


def test_hashes_name_the_whole_history_and_its_owner() -> None:
    tokens = np.arange(96, dtype=np.int32)
    hashes = chain_hashes(root_hash("a"), tokens, 32)
    assert len(hashes) == len(set(hashes)) == 3
    assert chain_hashes(hashes[0], tokens[32:], 32) == hashes[1:]
    assert chain_hashes(root_hash("a"), tokens[:95], 32) == hashes[:2]
    assert not set(chain_hashes(root_hash("b"), tokens, 32)) & set(hashes)
    changed = tokens.copy()
    changed[0] += 1
    assert not set(chain_hashes(root_hash("a"), changed, 32)) & set(hashes)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_pool_adds_up_whatever_happens(data: st.DataObject) -> None:
    """Blocks are held, fenced or free; a block found by its hash is the one that was published for it and has not been
    allocated since."""
    pool = BlockPool(12)
    held: list[list[int]] = []
    content: dict[int, bytes] = {}
    planned = completed = -1
    for _ in range(data.draw(st.integers(1, 60))):
        action = data.draw(st.sampled_from(["allocate", "plan", "complete", "give back", "publish", "find"]))
        if action == "allocate" and pool.num_free:
            blocks = pool.allocate(data.draw(st.integers(1, pool.num_free)))
            for block in blocks:
                content.pop(block, None)
            held.append(blocks)
        elif action == "plan":
            planned += 1
        elif action == "complete" and completed < planned:
            completed += 1
            pool.release(completed)
        elif action == "give back" and held:
            blocks = held.pop(data.draw(st.integers(0, len(held) - 1)))
            pool.give_back(blocks, data.draw(st.integers(-1, planned)))
        elif action == "publish" and held:
            blocks = data.draw(st.sampled_from(held))
            hashes = [data.draw(st.sampled_from([b"a", b"b", b"c", b"d", b"e"])) for _ in blocks]
            before = dict(pool._blocks)
            pool.publish(blocks, hashes, b"", np.zeros(len(blocks), dtype=np.int32))
            content |= {block: name for name, block in pool._blocks.items() if name not in before}
        elif action == "find":
            names = data.draw(st.lists(st.sampled_from([b"a", b"b", b"c", b"d", b"e"]), unique=True, max_size=4))
            found = pool.find(names)
            assert [content[block] for block in found] == names[: len(found)]
            if len(found):
                before = pool.num_free
                num = pool.num_free_among(found)
                pool.hold(found)
                assert pool.num_free == before - num
                held.append(found)
        assert pool._ref_counts == [sum(block in blocks for blocks in held) for block in range(12)]
        assert pool.num_held == sum(count > 0 for count in pool._ref_counts)
        assert pool.num_fenced == sum(pool._is_fenced)
    for blocks in held:
        pool.give_back(blocks, planned)
    while completed < planned:
        completed += 1
        pool.release(completed)
    assert pool.num_free == 12
