"""Blocks on their way to and from the KV store: who may have them meanwhile, when moving pays, and that tokens are
exact whatever gets lost."""

import random

import numpy as np
import pytest

from albireo.arrays import EMPTY_INT32
from albireo.transfers import KvLease
from albireo.v1 import plan_pb2
from scheduler_svc.planner.block_pool import BlockPool
from scheduler_svc.planner.rates import StepRates
from scheduler_svc.planner.sequence import Place, Sequence
from scheduler_svc.planner.state import preempt
from scheduler_svc.planner.stores import store_history
from scheduler_svc.planner.swap_policy import Bandwidth, SwapMode, TransferRates, is_quicker, wait_s
from scheduler_svc.planner.transfers import TransferLimits, Transfers
from simulation import Simulation
from swap_simulation import SwapSimulation

HASHES = [bytes([i]) * 32 for i in range(4)]


def published(num: int) -> tuple[BlockPool, list[int]]:
    """A pool of 4 blocks, of which ``num`` are held and can be found."""
    pool = BlockPool(4)
    blocks = pool.allocate(num)
    pool.publish(blocks, HASHES[:num], b"", EMPTY_INT32)
    return pool, blocks


def test_what_a_transfer_reads_is_free_when_step_and_transfer_are_over():
    for transfer_is_first in (True, False):
        pool, blocks = published(2)
        pool.fence(blocks)
        pool.give_back(blocks, last_step=5)
        assert (pool.num_free, pool.num_fenced, pool.num_held) == (2, 2, 0)
        ends = [lambda pool=pool, blocks=blocks: pool.unfence(blocks), lambda pool=pool: pool.release(5)]
        first, last = ends if transfer_is_first else reversed(ends)
        first()
        assert (pool.num_free, pool.num_fenced) == (2, 2)
        last()
        assert (pool.num_free, pool.num_fenced) == (4, 0)


def test_what_a_transfer_reads_can_be_held_again_meanwhile():
    pool, blocks = published(2)
    pool.fence(blocks)
    pool.give_back(blocks, last_step=-1)
    pool.hold(pool.find(HASHES[:2]))
    pool.unfence(blocks)
    assert pool.num_held == 2
    pool.give_back(blocks, last_step=-1)
    assert pool.num_free == 4


def test_a_free_block_that_is_stored_is_not_handed_out():
    pool, blocks = published(1)
    pool.give_back(blocks, last_step=-1)
    pool.fence(blocks)
    assert (pool.num_free, pool.num_fenced) == (3, 1)
    assert not set(pool.allocate(3)) & set(blocks)
    pool.unfence(blocks)
    assert pool.find(HASHES[:1]) == blocks


def test_a_block_that_two_transfers_read_waits_for_both():
    pool, blocks = published(1)
    pool.fence(blocks)
    pool.fence(blocks)
    pool.give_back(blocks, last_step=-1)
    pool.unfence(blocks)
    assert pool.num_fenced == 1
    pool.unfence(blocks)
    assert pool.num_free == 4


def test_moving_pays_where_it_is_quicker_by_a_fifth():
    assert is_quicker(SwapMode.AUTO, transfer_s=0.99, compute_s=1.2)
    assert not is_quicker(SwapMode.AUTO, transfer_s=1.01, compute_s=1.2)
    assert not is_quicker(SwapMode.NEVER, transfer_s=1.01, compute_s=1.2)
    assert is_quicker(SwapMode.ALWAYS, transfer_s=100, compute_s=1.2)
    assert is_quicker(SwapMode.AUTO, transfer_s=100, compute_s=None), "nothing is measured yet"


def test_a_load_takes_the_round_trip_the_queue_and_the_copy():
    rates = TransferRates()
    rates.inward.observe(num_bytes=4_000_000, duration_s=2.0)
    rates.outward.observe(num_bytes=4_000_000, duration_s=1.0)
    for _ in range(200):
        rates.observe_rtt(0.5)
    assert rates.load_s(num_bytes=1_000_000, num_queued_bytes=3_000_000) == pytest.approx(2.5)
    assert rates.store_s(num_bytes=1_000_000, num_queued_bytes=3_000_000) == pytest.approx(1.5)


def test_bandwidth_follows_what_is_measured_and_forgets_nothing_for_a_failed_transfer():
    bandwidth = Bandwidth()
    bandwidth.observe(100, 1.0)
    bandwidth.observe(0, 50.0)
    assert bandwidth.bytes_per_s == pytest.approx(100)
    for _ in range(100):
        bandwidth.observe(300, 1.0)
    assert bandwidth.bytes_per_s == pytest.approx(300, rel=0.01)


def test_the_store_gets_as_long_as_loading_stays_quicker():
    assert wait_s(SwapMode.AUTO, transfer_s=0.1, compute_s=0.6, most_s=1.0) == pytest.approx(0.4)
    assert wait_s(SwapMode.AUTO, transfer_s=0.1, compute_s=6.0, most_s=1.0) == 1.0
    assert wait_s(SwapMode.AUTO, transfer_s=0.1, compute_s=0.06, most_s=1.0) == 0.0
    assert wait_s(SwapMode.ALWAYS, transfer_s=0.1, compute_s=0.06, most_s=1.0) == 1.0


@pytest.mark.parametrize(("keeps", "num_asked"), [(True, 4), (False, 1)])
def test_the_half_second_is_for_what_ended_sequences_leave(keeps: bool, num_asked: int):
    """Two blocks take a second to the store, and nothing says what computing takes: a preempted sequence's all go."""
    transfers = Transfers(TransferLimits(SwapMode.AUTO, block_bytes=100), StepRates())
    transfers.meet_store(KvLease(bytes(16), arena_bytes=1000, lease=1), max_blocks=4)
    transfers.rates.outward.observe(num_bytes=200, duration_s=1.0)
    pool, _ = published(4)
    sampling, tokens = plan_pb2.Sampling(), np.zeros(128, dtype=np.int32)
    sequence = Sequence(0, 0, "", tokens, 8, 256, sampling, Place(0, 0), block_hashes=HASHES)
    store_history(transfers, pool, sequence, 4, 32, "", keeps)
    assert [len(request.hashes) for request in transfers.take_requests()] == [num_asked]
    assert transfers.counts.num_blocks_not_stored == 4 - num_asked


SMALL = {"block_size": 2, "num_blocks": 32, "max_num_seqs": 6, "max_model_len": 64, "max_num_batched_tokens": 16}


def submit_crowd(simulation: Simulation, seed: int) -> list[Sequence]:
    """Short prompts with long answers: many can start, one fits at its end."""
    rng = random.Random(seed)
    keys = []
    for _ in range(10):
        prompt = [rng.randrange(3, simulation.limits.vocab_size) for _ in range(rng.randrange(1, 4))]
        temperature, tenant = rng.choice([0.0, 1.0]), rng.choice(["", "a", "b"])
        key = simulation.submit(
            prompt, 48, ignore_eos=True, temperature=temperature, seed=rng.getrandbits(63), tenant=tenant
        )
        keys.append(key)
    return [simulation.state.sequences[key] for key in keys]


def crowd(simulation: SwapSimulation, seed: int) -> SwapSimulation:
    submit_crowd(simulation, seed)
    simulation.finish()
    return simulation


def let_move(simulation: SwapSimulation) -> bool:
    """One thing happens, if anything can."""
    return simulation.plan() or simulation.run_device() or simulation.commit()


@pytest.mark.parametrize(("tp_size", "depth"), [(1, 1), (4, 3)])
def test_swapped_sequences_compute_less_and_go_on_exactly(tp_size: int, depth: int):
    computed = Simulation(tp_size, depth, **SMALL)
    submit_crowd(computed, 0)
    computed.finish()
    swapped = crowd(SwapSimulation(tp_size, depth, **SMALL), 0)
    assert swapped.num_preemptions >= 5
    assert swapped.num_blocks_in > 40
    assert swapped.num_computed_tokens < 0.8 * computed.num_computed_tokens


@pytest.mark.parametrize("tp_size", [1, 2])
def test_exact_when_everyone_is_swapped_again_and_again(tp_size: int):
    """The pool forgets what is preempted, as it would if it were smaller still."""
    simulation = SwapSimulation(tp_size, 2, **{**SMALL, "num_blocks": 64})
    sequences = submit_crowd(simulation, tp_size)
    turn = 0
    while let_move(simulation):
        turn += 1
        if turn % 9 == 0 and simulation.state.table.running:
            victim = min(simulation.state.table.running, key=lambda one: one.num_preemptions)
            if victim.num_preemptions < 4:
                preempt(simulation.state, victim.slot)
        if turn % 15 == 0:
            simulation.state.pool.forget_cache()
    simulation.finish()
    assert min(sequence.num_preemptions for sequence in sequences) >= 3
    assert simulation.num_blocks_in > 40


def test_nothing_is_kept_for_preempted_sequences_when_they_are_never_swapped():
    swapped = SwapSimulation(1, 2, mode=SwapMode.NEVER, **SMALL)
    kept = []
    keep = swapped.store._pin
    swapped.store._pin = lambda request_id, block: (kept.append(block), keep(request_id, block))
    crowd(swapped, 0)
    assert swapped.num_preemptions > 0
    assert swapped.num_blocks_out > 0, "ended ones leave their prefixes"


@pytest.mark.parametrize("seed", range(3))
def test_exact_when_the_store_refuses_forgets_and_damages(seed: int):
    swapped = crowd(SwapSimulation(2, 2, p_trouble=0.2, capacity=30, seed=seed, **SMALL), seed)
    outcomes = swapped.transfers.counts.loads
    assert outcomes["damaged"] + outcomes["denied"] + outcomes["missed"] > 0


@pytest.mark.parametrize("what", ["lose_store", "lose_group", "lose_planner"])
def test_exact_when_somebody_is_lost_in_the_middle_of_transfers(what: str):
    num_lost = 0
    for seed in range(3):
        simulation = SwapSimulation(2, 2, seed=seed, **SMALL)
        submit_crowd(simulation, seed)
        while let_move(simulation):
            if simulation.transfers.moving and num_lost <= seed:
                getattr(simulation, what)()
                simulation.regain_store()
                num_lost += 1
        simulation.finish()
    assert num_lost == 3


def test_a_prefix_of_an_earlier_sequence_comes_from_the_store_and_counts_as_cached():
    """Ended sequences leave it there; the pool has long forgotten it. Another tenant's is another's."""
    simulation = SwapSimulation(1, 2, **SMALL)
    prompt = list(range(3, 23))
    simulation.submit(prompt, 4, ignore_eos=True, tenant="a")
    simulation.finish()
    simulation.state.pool.forget_cache()
    for tenant, num_cached in (("b", 0), ("a", 18)):
        key = simulation.submit([*prompt[:19], 50], 4, ignore_eos=True, tenant=tenant)
        sequence = simulation.state.sequences[key]
        simulation.finish()
        assert sequence.num_cached_tokens == num_cached


def test_sequences_with_the_same_beginning_load_it_once():
    simulation = SwapSimulation(1, 2, **SMALL)
    prompt = list(range(3, 23))
    simulation.submit(prompt, 4, ignore_eos=True)
    simulation.finish()
    simulation.state.pool.forget_cache()
    before = simulation.transfers.counts.num_blocks_in
    keys = [simulation.submit([*prompt, 30 + i], 4, ignore_eos=True) for i in range(4)]
    sequences = [simulation.state.sequences[key] for key in keys]
    simulation.finish()
    assert [sequence.num_cached_tokens for sequence in sequences] == [20] * 4
    assert simulation.transfers.counts.num_blocks_in - before == 10
