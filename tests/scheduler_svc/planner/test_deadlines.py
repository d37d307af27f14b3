"""Deadlines at the planner: refused, dropped or met. Times are the test's own."""

import math
import random

import grpc
import pytest

from albireo.arrays import pack_int32
from albireo.v1 import frontend_pb2, plan_pb2
from scheduler_svc.planner.arrivals import Arrived, apply_message
from scheduler_svc.planner.commit import commit_step
from scheduler_svc.planner.deadlines import drop_overdue
from scheduler_svc.planner.rates import StepRates
from simulation import Simulation

S = 1_000_000_000


def measured(base_s: float = 0.01, s_per_token: float = 0.001) -> StepRates:
    rates = StepRates()
    rng = random.Random(1)
    for _ in range(200):
        num = rng.choice([0, 0, 0, 64, 128])
        rates.observe(num, base_s + num * s_per_token)
    return rates


def submit(world: Simulation, sequence_id: int, rates: StepRates, now_ns: int = 0, **fields: object) -> Arrived:
    fields = {"token_ids": pack_int32(range(3, 43)), "max_tokens": 20, "ignore_eos": True, **fields}
    request = frontend_pb2.Submit(sequence_id=sequence_id, sampling=plan_pb2.Sampling(top_p=1), **fields)
    return apply_message(world.state, 0, frontend_pb2.FrontendMessage(submits=[request]), sequence_id, now_ns, rates)


def test_rates_tell_the_cost_of_prompts_from_the_rest() -> None:
    rates = measured()
    assert rates.base_s == pytest.approx(0.01, rel=0.01)
    assert rates.s_per_prefill_token == pytest.approx(0.001, rel=0.01)
    assert rates.least_s(300, 11, 100) == pytest.approx(3 * 0.01 + 0.3 + 10 * 0.01, rel=0.01)
    assert rates.prefill_tokens_within(0.05) == pytest.approx(40, abs=1)
    assert rates.prefill_tokens_within(0.005) == 0


def test_rates_without_a_prompt_say_nothing_of_prompts() -> None:
    rates = StepRates()
    assert rates.least_s(1000, 1000, 100) == 0
    for _ in range(50):
        rates.observe(0, 0.02)
    assert rates.least_s(1000, 1, 100) == pytest.approx(10 * 0.02)
    assert rates.prefill_tokens_within(0.1) > 1000


def test_rates_follow_a_change() -> None:
    rates = measured(base_s=0.01)
    for _ in range(300):
        rates.observe(0, 0.05)
    assert rates.base_s == pytest.approx(0.05, rel=0.05)


def test_what_cannot_be_met_is_refused_with_the_numbers() -> None:
    world = Simulation(max_model_len=64)
    arrived = submit(world, 1, measured(), remaining_s=0.2, min_output_tokens=20)
    ((sequence_id, refused),) = arrived.refused
    assert sequence_id == 1
    assert refused.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "40 prompt tokens and 20 output tokens" in str(refused)
    assert "0.2 s are left" in str(refused)
    assert world.state.is_idle


@pytest.mark.parametrize("fields", [{"remaining_s": 0.3}, {"remaining_s": 3.0, "min_output_tokens": 20}, {}])
def test_what_may_be_met_is_taken(fields: dict[str, float]) -> None:
    """Whatever a sequence may end with early counts for it: only the least is held against it."""
    world = Simulation(max_model_len=64)
    assert not submit(world, 1, measured(), **fields).refused
    assert len(world.state.sequences) == 1


def test_with_nothing_measured_nothing_is_refused() -> None:
    world = Simulation(max_model_len=64)
    assert not submit(world, 1, StepRates(), remaining_s=1e-6).refused


def test_a_cached_prompt_takes_less() -> None:
    world = Simulation(max_model_len=64, num_blocks=60)
    world.submit(list(range(3, 43)), 2, ignore_eos=True)
    world.finish()
    rates = measured(s_per_token=0.01)
    assert submit(world, 7, rates, remaining_s=0.2, token_ids=pack_int32(range(4, 44))).refused
    assert not submit(world, 8, rates, remaining_s=0.2).refused


@pytest.mark.parametrize("remaining_s", [-1.0, math.nan, math.inf, 1e12])
def test_a_deadline_that_makes_no_sense_is_refused(remaining_s: float) -> None:
    world = Simulation(max_model_len=64)
    ((_, refused),) = submit(world, 1, StepRates(), remaining_s=remaining_s).refused
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "remaining_s" in str(refused)


def test_one_that_waits_is_dropped_as_soon_as_it_is_too_late_to_begin() -> None:
    world = Simulation(max_num_seqs=1, max_model_len=64)
    rates = measured()
    submit(world, 1, rates)
    world.plan()
    submit(world, 2, rates, remaining_s=1.0, min_output_tokens=20)
    assert drop_overdue(world.state, int(0.6 * S)) == []
    (dropped,) = drop_overdue(world.state, int(0.8 * S))
    assert dropped.sequence_id == 2
    assert [sequence.sequence_id for sequence in world.state.sequences.values()] == [1]
    assert world.state.queue.num_waiting == 0


def test_one_that_runs_is_dropped_at_its_deadline_and_gives_everything_back() -> None:
    world = Simulation(max_model_len=64)
    submit(world, 1, measured(), remaining_s=1.0, min_output_tokens=20)
    world.plan()
    assert drop_overdue(world.state, int(0.9 * S)) == []
    (dropped,) = drop_overdue(world.state, int(1.1 * S))
    assert dropped.sequence_id == 1
    while world.run_device() or world.state.in_flight:
        result = world.results.popleft()
        assert len(commit_step(world.state, result.step_id, result.token_ids).token_ids) == 0
    assert world.state.is_idle
    assert world.state.pool.num_free == world.state.pool.num_blocks


def test_deadlines_of_sequences_that_ended_are_not_kept() -> None:
    world = Simulation(max_model_len=64)
    for sequence_id in range(1, 5000):
        submit(world, sequence_id, StepRates(), remaining_s=3600.0)
        world.send(0, cancels=[sequence_id])
    assert len(world.state.deadlines) < 2000
