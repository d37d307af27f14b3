"""Limits of tenants: how many of a tenant's sequences wait, how many tokens it is served, what is cached of it."""

import dataclasses

import grpc
import numpy as np
import pytest

from albireo.allowances import Allowance, Allowances
from albireo.arrays import pack_int32
from albireo.v1 import frontend_pb2
from scheduler_svc.planner.arrivals import Arrived, apply_message
from scheduler_svc.planner.block_pool import BlockPool
from scheduler_svc.planner.buckets import TokenBuckets
from scheduler_svc.planner.messages import refusal_message
from scheduler_svc.planner.rates import StepRates
from scheduler_svc.planner.state import PlannerState
from simulation import Simulation

SECOND_NS = 1_000_000_000
LIMITS = {
    "block_size": 8,
    "num_blocks": 400,
    "max_num_seqs": 4,
    "max_model_len": 256,
    "max_num_batched_tokens": 128,
    "vocab_size": 1009,
}


class LimitedSimulation(Simulation):
    """One where the tenant acme has limits."""

    def __init__(self, **of_acme: float) -> None:
        self._allowances = Allowances(Allowance(), {"acme": Allowance(**of_acme)})
        super().__init__(**LIMITS)

    def make_state(self) -> PlannerState:
        self.limits = dataclasses.replace(self.limits, allowances=self._allowances)
        return super().make_state()


def arrive(state: PlannerState, tenant: str, sequence_id: int, is_resumed: bool = False) -> Arrived:
    submit = frontend_pb2.Submit(
        sequence_id=sequence_id,
        token_ids=pack_int32([1, 2, 3]),
        max_tokens=4,
        tenant=tenant,
        is_resumed=is_resumed,
    )
    submit.sampling.top_p = 1.0
    return apply_message(state, 0, frontend_pb2.FrontendMessage(submits=[submit]), sequence_id, 0, StepRates())


def test_what_waits_past_a_tenants_limit_is_refused_and_others_are_taken():
    state = LimitedSimulation(max_waiting=2).state
    assert not any(arrive(state, "acme", index).refused for index in (1, 2))
    ((_, refused),) = arrive(state, "acme", 3).refused
    assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "max_waiting: 2 sequences of this tenant wait already" in str(refused)
    assert not arrive(state, "rival", 4).refused
    assert not arrive(state, "acme", 5, is_resumed=True).refused, "what was accepted once is not given up"


def test_a_tenants_place_in_the_queue_is_free_again_when_its_sequence_runs_or_ends():
    world = LimitedSimulation(max_waiting=1)
    world.submit([5] * 20, 4, tenant="acme")
    assert arrive(world.state, "acme", 1000).refused
    assert world.plan()
    assert not arrive(world.state, "acme", 1001).refused
    assert arrive(world.state, "acme", 1002).refused
    message = frontend_pb2.FrontendMessage(cancels=[1001])
    apply_message(world.state, 0, message, 0, 0, StepRates())
    assert not arrive(world.state, "acme", 1003).refused


def test_a_bucket_lets_a_burst_through_and_then_its_rate():
    buckets = TokenBuckets(Allowances(Allowance(tokens_per_s=100)))
    buckets.settle({"acme": 399.0}, now_ns=0)
    assert buckets.debt_s("acme") == 0
    buckets.settle({"acme": 101.0}, now_ns=0)
    assert buckets.debt_s("acme") == pytest.approx(1.0)
    assert buckets.debt_s("rival") == 0
    buckets.settle({}, now_ns=SECOND_NS // 2)
    assert buckets.debt_s("acme") == pytest.approx(0.5)
    served, now_ns = 0.0, SECOND_NS // 2
    for _ in range(400):  # 100 s, a quarter each: whoever takes all it gets, gets its rate
        now_ns += SECOND_NS // 4
        tokens = 60.0 if buckets.debt_s("acme") == 0 else 0.0
        served += tokens
        buckets.settle({"acme": tokens}, now_ns)
    assert served == pytest.approx(100 * 100, rel=0.02)


def test_an_idle_tenant_saves_no_more_than_a_burst_up_and_is_forgotten():
    buckets = TokenBuckets(Allowances(Allowance(tokens_per_s=100)))
    buckets.settle({"acme": 10.0}, now_ns=0)
    buckets.settle({}, now_ns=1000 * SECOND_NS)
    assert not buckets._buckets
    buckets.settle({"acme": 500.0}, now_ns=1001 * SECOND_NS)
    assert buckets.debt_s("acme") == pytest.approx(1.0)


def test_prompts_and_outputs_count_and_who_is_in_debt_is_refused_until_it_is_paid():
    world = LimitedSimulation(tokens_per_s=10)
    world.submit([5] * 41, 9, tenant="acme", ignore_eos=True)
    world.finish()
    world.state.buckets.settle(world.state.tenants.take_tokens(), now_ns=0)
    ((_, refused),) = arrive(world.state, "acme", 1000).refused
    assert "tokens_per_s: this tenant is served 10 at most" in str(refused)
    told = refusal_message(1000, refused, retry_after_s=30.0)
    assert told.refusal.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert told.refusal.retry_after_s == pytest.approx((41 + 8 - 40) / 10)  # the prompt's step samples the first output
    assert not arrive(world.state, "rival", 1001).refused
    world.state.buckets.settle(world.state.tenants.take_tokens(), now_ns=SECOND_NS)
    assert not arrive(world.state, "acme", 1002).refused


def fill(pool: BlockPool, root: bytes, limit: int, num: int, first: int) -> list[bytes]:
    """Publishes blocks of a tenant and gives them back; returns their hashes in the order of last use."""
    blocks = pool.allocate(num)
    hashes = [bytes([first + index]) * 32 for index in range(num)]
    share = pool.share_of(root, limit) if limit else None
    pool.publish(blocks, hashes, b"", np.zeros(num, dtype=np.int32), share)
    for block in blocks:
        pool.give_back([block], -1)
    return hashes


def test_a_tenant_past_its_limit_loses_its_own_least_recently_used_blocks():
    pool = BlockPool(16)
    rivals = fill(pool, b"rival", 0, 4, first=100)
    hashes = fill(pool, b"acme", 3, 5, first=0)
    assert [bool(pool.find([each])) for each in hashes] == [False, False, True, True, True]
    assert all(pool.find([each]) for each in rivals)
    pool.hold(used := pool.find([hashes[2]]))
    more = fill(pool, b"acme", 3, 1, first=50)
    assert [bool(pool.find([each])) for each in [*hashes, *more]] == [False, False, True, True, True, True], "in use"
    pool.give_back(used, -1)
    assert [bool(pool.find([each])) for each in [*hashes, *more]] == [False, False, True, False, True, True]
    assert pool.num_free == 16
    assert len(pool.allocate(16)) == 16
    assert pool.num_cached == 0


def test_shares_of_bygone_tenants_are_forgotten():
    pool = BlockPool(4)
    for tenant in range(50):
        fill(pool, tenant.to_bytes(2, "big"), 2, 3, first=3 * tenant)
        assert len(pool._shares_by_root) <= 2
    pool.forget_cache()
    assert not pool._shares_by_root


def test_a_tenants_cache_stays_within_its_limit_while_it_is_served():
    world = LimitedSimulation(cache_blocks=5)
    for _ in range(6):
        prompt = world_prompt(world)
        for tenant in ("acme", "rival"):
            world.submit(prompt, 10, tenant=tenant)
            world.finish()
    share = world.state.pool.share_of(next(iter(world.state.pool._shares_by_root)), 5)
    assert len(share.blocks) == 5
    assert world.state.pool.num_cached > 6 * 6


def world_prompt(world: Simulation) -> list[int]:
    """Six blocks and a bit, never the same."""
    number = len(world.expected)
    return [3 + (number * 51 + index) % 1000 for index in range(51)]
