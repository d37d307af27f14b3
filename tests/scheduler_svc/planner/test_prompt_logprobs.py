"""Prompts that are scored, on the truth machine: the simulation compares each logprob that comes, and when it comes."""

import pytest

from albireo.plan import decode_plan, encode_plan
from albireo.v1 import frontend_pb2, plan_pb2
from scheduler_svc.planner.arrivals import apply_message
from scheduler_svc.planner.policy import plan_step
from simulation import Simulation

PROMPT = [(5 * i + 1) % 53 for i in range(40)]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_all_tokens_of_a_prompt_but_the_first_are_scored_before_its_first_output(depth, tp_size):
    simulation = Simulation(tp_size, depth)
    key = simulation.submit(PROMPT, 5, num_prompt_logprobs=3, num_logprobs=2)
    simulation.finish()
    assert simulation.expected[key].is_scored
    assert simulation.num_scored_tokens == len(PROMPT) - 1


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_shortest_prompts(length):
    """Nothing follows the first token of a prompt that has no other."""
    simulation = Simulation()
    key = simulation.submit(PROMPT[:length], 4, num_prompt_logprobs=0)
    simulation.finish()
    assert simulation.expected[key].is_scored
    assert simulation.num_scored_tokens == length - 1


def test_a_chunk_scores_what_the_group_samples_for_in_a_step():
    """Four sequences at most, and so four tokens sampled or scored; each running sequence has one of them."""
    simulation = Simulation(max_num_seqs=4, max_num_batched_tokens=16)
    simulation.submit(PROMPT, 3, num_prompt_logprobs=1)
    assert _planned_counts(simulation) == [4]
    simulation.submit(PROMPT[:6], 9, ignore_eos=True)
    assert _planned_counts(simulation) == [4], "the first one has taken all there is"
    for _ in range(2):
        simulation.run_device()
        simulation.commit()
    simulation.finish()


def test_a_full_house_still_gets_on():
    """One token in each step where all slots are taken."""
    simulation = Simulation(depth=1, max_num_seqs=2, max_num_batched_tokens=16)
    simulation.submit(PROMPT[:2], 60, ignore_eos=True)
    _turn(simulation)
    scored = simulation.submit(PROMPT[:20], 2, num_prompt_logprobs=1)
    assert _planned_counts(simulation) == [1, 1]
    simulation.run_device()
    simulation.commit()
    while not simulation.expected[scored].is_scored:
        _turn(simulation)
    simulation.finish()


def test_prompts_that_are_not_scored_go_beside():
    """They need one place each, for the token that they end with."""
    simulation = Simulation(max_num_seqs=4, max_num_batched_tokens=64)
    simulation.submit(PROMPT[:30], 3)
    simulation.submit(PROMPT[::-1], 3, num_prompt_logprobs=1)
    assert _planned_counts(simulation) == [30, 3]
    for _ in range(2):
        simulation.run_device()
        simulation.commit()
    simulation.finish()


def test_what_is_cached_is_computed_again_where_it_is_scored():
    """The blocks that it computes can be found by others, and those that are there already stay."""
    simulation = Simulation()
    simulation.submit(PROMPT, 3)
    simulation.finish()
    before = simulation.num_computed_tokens
    key = simulation.submit(PROMPT, 3, num_prompt_logprobs=2)
    simulation.finish()
    assert simulation.expected[key].is_scored
    assert simulation.num_computed_tokens - before >= len(PROMPT)
    before = simulation.num_computed_tokens
    simulation.submit(PROMPT, 3)
    simulation.finish()
    assert simulation.num_computed_tokens - before < len(PROMPT) // 2


def test_completions_that_do_not_score_share_what_the_first_computes():
    simulation = Simulation()
    first = simulation.submit(PROMPT, 4, seed=1, temperature=1.0, num_prompt_logprobs=2)
    for seed in (2, 3):
        simulation.submit(PROMPT, 4, seed=seed, temperature=1.0)
    simulation.finish()
    assert simulation.expected[first].is_scored
    assert simulation.num_computed_tokens < 2 * len(PROMPT)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_preempted_prompt_is_not_scored_twice(depth):
    """A sequence of higher priority needs the blocks; steps that were in flight still count."""
    simulation = Simulation(depth=depth, block_size=4, num_blocks=16, max_num_seqs=3, caches_prefixes=False)
    scored = simulation.submit(PROMPT, 4, num_prompt_logprobs=2)
    for _ in range(5):
        _turn(simulation)
    simulation.submit([7] * 12, 50, priority=1, ignore_eos=True)
    simulation.finish()
    assert simulation.num_preemptions
    assert simulation.expected[scored].is_scored
    assert simulation.num_scored_tokens == len(PROMPT) - 1


@pytest.mark.parametrize("loss", ["lose_group", "lose_planner"])
@pytest.mark.parametrize("num_turns", [0, 1, 3, 8])
def test_after_a_loss_only_what_has_not_come_is_scored(loss, num_turns):
    """What came is found in no block, and is computed again all the same."""
    simulation = Simulation(depth=1)
    key = simulation.submit(PROMPT, 4, num_prompt_logprobs=2)
    for _ in range(num_turns):
        _turn(simulation)
    getattr(simulation, loss)()
    simulation.finish()
    assert simulation.expected[key].is_scored
    assert simulation.num_scored_tokens == len(PROMPT) - 1


def test_what_is_in_flight_for_a_sequence_that_ended_is_dropped():
    """The simulation would not take it."""
    simulation = Simulation(depth=3)
    key = simulation.submit(PROMPT, 4, num_prompt_logprobs=2)
    while simulation.plan():
        pass
    simulation.cancel(key)
    simulation.finish()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_prompt_logprobs": 21}, "num_prompt_logprobs 21; 20 at most"),
        ({"num_scored_tokens": 4}, "num_scored_tokens 4, where the prompt has 3"),
    ],
)
def test_what_no_front_end_may_ask_for_is_refused(fields, message):
    simulation = Simulation()
    submit = frontend_pb2.Submit(
        sequence_id=1, token_ids=bytes(12), max_tokens=1, sampling=plan_pb2.Sampling(top_p=1), **fields
    )
    arrived = apply_message(
        simulation.state, 0, frontend_pb2.FrontendMessage(submits=[submit]), 0, now_ns=0, rates=simulation.rates
    )
    assert [str(refused) for _, refused in arrived.refused] == [message]


def test_the_plan_tells_which_rows_score():
    simulation = Simulation(max_num_seqs=4, max_num_batched_tokens=64)
    simulation.submit(PROMPT[:2], 9)
    simulation.submit(PROMPT[5:8], 9, num_prompt_logprobs=7)
    plan = decode_plan(encode_plan(plan_step(simulation.state).plan))
    assert [new.num_prompt_logprobs for new in plan.new_sequences] == [None, 7]
    assert plan.rows.samples.tolist() == [True, True]
    assert plan.rows.scores.tolist() == [False, True]


def _turn(simulation: Simulation) -> None:
    simulation.plan()
    simulation.run_device()
    simulation.commit()


def _planned_counts(simulation: Simulation) -> list[int]:
    """Plans a step; how many tokens each of its rows has."""
    assert simulation.plan()
    _, (batch, *_) = simulation.planned[-1]
    counts: list[int] = (batch.query_starts[1:] - batch.query_starts[:-1]).tolist()
    return counts
