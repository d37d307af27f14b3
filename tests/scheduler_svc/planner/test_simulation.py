"""Scheduling on the truth machine: whatever happens in whatever order, tokens are exact and nothing leaks."""

import random

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from albireo.arrays import pack_float32, pack_int32, unpack_int32
from albireo.plan import decode_plan, encode_plan
from albireo.v1 import frontend_pb2, plan_pb2
from scheduler_svc.planner.arrivals import apply_message
from scheduler_svc.planner.block_pool import BlockPool
from scheduler_svc.planner.policy import plan_step
from scheduler_svc.planner.swap_policy import SwapMode
from simulation import EOS, Simulation, any_sampling, pack_mask
from swap_simulation import SwapSimulation

VOCAB_SIZE = 53
COMMON = [(7 * i + 3) % VOCAB_SIZE for i in range(40)]  # what many prompts begin with


class PlannerMachine(RuleBasedStateMachine):
    """Random arrivals, aborts, delays of results and pool exhaustion over planner, block pool and stub ranks; with a KV
    store, that also refuses, forgets, damages and goes away."""

    @initialize(
        tp_size=st.sampled_from([1, 2, 4]),
        depth=st.integers(1, 3),
        block_size=st.sampled_from([1, 4, 8]),
        spare_blocks=st.integers(0, 12),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(5, 24),
        store=st.one_of(
            st.none(),
            st.fixed_dictionaries(
                {
                    "mode": st.sampled_from(SwapMode),
                    "capacity": st.integers(1, 100),
                    "p_trouble": st.sampled_from([0.0, 0.1]),
                    "seed": st.integers(0, 2**32),
                }
            ),
        ),
    )
    def start(self, tp_size, depth, block_size, spare_blocks, max_num_seqs, budget, store):
        self.simulation = (Simulation if store is None else SwapSimulation)(
            **(store or {}),
            tp_size=tp_size,
            depth=depth,
            block_size=block_size,
            num_blocks=48 // block_size + spare_blocks,
            max_num_seqs=max_num_seqs,
            max_model_len=48,
            max_num_batched_tokens=budget,
            vocab_size=VOCAB_SIZE,
        )
        self.losses = 0

    @rule(
        beginning=st.integers(0, 40),
        prompt=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=47),
        num=st.sampled_from([1, 1, 1, 3]),
        max_tokens=st.integers(1, 60),
        tenant=st.sampled_from(["", "", "a", "b"]),
        frontend=st.integers(0, 1),
        priority=st.integers(-1, 1),
        stop_token_ids=st.sampled_from([(), (5,), (5, 6, 7)]),
        ignore_eos=st.booleans(),
        temperature=st.sampled_from([0.0, 0.7]),
        seed=st.integers(0, 2**64 - 1),
        min_tokens=st.integers(0, 12),
        edits=st.one_of(st.none(), st.integers(0, 2**32)),
        num_prompt_logprobs=st.sampled_from([None, None, 0, 3]),
    )
    def submit(self, beginning, prompt, num, max_tokens, seed, edits, num_prompt_logprobs, **parameters):
        """``num`` completions of a prompt that may begin like others; the first of them may score it."""
        if edits is not None:
            parameters |= any_sampling(random.Random(edits), VOCAB_SIZE)
        label = f"r{len(self.simulation.expected) % 7}"
        prompt = [*COMMON[:beginning], *prompt][:47]
        for index in range(num):
            parameters["num_prompt_logprobs"] = None if index else num_prompt_logprobs
            self.simulation.submit(prompt, max_tokens, label=label, seed=(seed + index) % 2**64, **parameters)

    @rule()
    def plan(self):
        self.simulation.plan()

    @rule()
    def run_device(self):
        self.simulation.run_device()

    @rule()
    def commit(self):
        self.simulation.commit()

    @precondition(lambda self: isinstance(self.simulation, SwapSimulation))
    @rule(
        event=st.sampled_from(
            ["answer", "answer", "run_transfer", "run_transfer", "commit_transfer", "lose_store", "regain_store"]
        )
    )
    def move_blocks(self, event):
        getattr(self.simulation, event)()

    @rule(turns=st.integers(1, 12))
    def let_time_pass(self, turns):
        for _ in range(turns):
            self.simulation.plan()
            self.simulation.run_device()
            self.simulation.commit()

    @precondition(lambda self: any(one.reason is None and not one.gone for one in self.simulation.expected.values()))
    @rule(data=st.data())
    def cancel(self, data):
        live = [key for key, one in self.simulation.expected.items() if one.reason is None and not one.gone]
        self.simulation.cancel(data.draw(st.sampled_from(live)))

    @precondition(lambda self: any(one.reason is None and not one.gone for one in self.simulation.expected.values()))
    @rule(data=st.data())
    def find_stop_string(self, data):
        live = [key for key, one in self.simulation.expected.items() if one.reason is None and not one.gone]
        key = data.draw(st.sampled_from(live))
        self.simulation.truncate(key, data.draw(st.integers(0, len(self.simulation.expected[key].got))))

    @rule(label=st.integers(0, 6))
    def abort(self, label):
        self.simulation.abort(f"r{label}")

    @rule(frontend=st.integers(0, 1))
    def lose_frontend(self, frontend):
        self.simulation.lose_frontend(frontend)

    @rule()
    def lose_group(self):
        # A request that runs while the group is lost five times without a token in between is given up on.
        if self.losses < 4:
            self.simulation.lose_group()
            self.losses += 1

    @rule(between_token_and_end=st.booleans())
    def lose_planner(self, between_token_and_end):
        if between_token_and_end:
            self.simulation.lose_last_end()
        else:
            self.simulation.lose_planner()

    @invariant()
    def blocks_add_up(self):
        if hasattr(self, "simulation"):
            self.simulation.check_pool()

    def teardown(self):
        if hasattr(self, "simulation"):
            self.simulation.finish()


TestPlannerMachine = PlannerMachine.TestCase
TestPlannerMachine.settings = settings(
    max_examples=100, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)


# Each TP degree and each depth at least once; the others are soaked.
_SHORT = ((1, 1), (2, 2), (4, 3))
GRID = [
    pytest.param(tp_size, depth, marks=[] if (tp_size, depth) in _SHORT else [pytest.mark.soak])
    for tp_size in (1, 2, 4)
    for depth in (1, 2, 3)
]


def load(simulation: Simulation, rng: random.Random, num: int) -> None:
    """Submits random sequences, with random pauses, aborts and delays of results between them."""
    for _ in range(num):
        length = rng.randrange(1, simulation.limits.max_model_len)
        own = [rng.randrange(simulation.limits.vocab_size) for _ in range(64)]
        prompt = [*COMMON[: rng.choice([0, 0, 8, 30])], *own]
        key = simulation.submit(
            prompt[:length],
            rng.randrange(1, 60),
            frontend=rng.randrange(3),
            priority=rng.choice([0, 0, 0, 1]),
            tenant=rng.choice(["", "", "a", "b"]),
            ignore_eos=rng.random() < 0.5,
            temperature=rng.choice([0.0, 1.0]),
            seed=rng.getrandbits(64),
            min_tokens=rng.choice([0, 0, 9]),
            num_prompt_logprobs=rng.choice([None, None, None, 2]),
            **(any_sampling(rng, simulation.limits.vocab_size) if rng.random() < 0.5 else {}),
        )
        for _pause in range(rng.choice([0, 0, 3, 20])):
            rng.choice([simulation.plan, simulation.run_device, simulation.commit])()
        if rng.random() < 0.2 and simulation.expected[key].reason is None:
            simulation.cancel(key)


@pytest.mark.parametrize(("tp_size", "depth"), GRID)
def test_exact_when_the_pool_is_so_small_that_everyone_is_preempted(tp_size, depth):
    """A pool for hardly more than one sequence: many preemptions, exact tokens, no leak, an end."""
    num_preemptions = 0
    for seed in range(6):
        simulation = Simulation(tp_size, depth, block_size=2, num_blocks=34, max_num_seqs=6, max_model_len=64)
        load(simulation, random.Random(seed), 30)
        simulation.finish()
        num_preemptions += simulation.num_preemptions
    assert num_preemptions > 20


@pytest.mark.soak
@pytest.mark.parametrize("tp_size", [1, 4])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_exact_over_hundreds_of_random_loads(tp_size, depth):
    """The same over many seeds, pools and budgets."""
    for seed in range(300):
        rng = random.Random(f"{tp_size} {depth} {seed}")
        block_size = rng.choice([1, 2, 4, 16])
        simulation = Simulation(
            tp_size,
            depth,
            block_size=block_size,
            num_blocks=64 // block_size + rng.randrange(20),
            max_num_seqs=rng.randrange(1, 12),
            max_model_len=64,
            max_num_batched_tokens=rng.randrange(12, 80),
        )
        load(simulation, rng, 30)
        simulation.finish()


def test_steady_decode_plans_carry_no_rows():
    """A decode step in which nobody joins or leaves has a plan with block appends only."""
    simulation = Simulation(num_blocks=60, max_model_len=60)
    for _ in range(3):
        simulation.submit([7, 8, 9], 40, ignore_eos=True)
    simulation.finish()
    assert simulation.num_rowless_plans >= 36


def test_a_sequence_known_to_reach_its_limit_is_left_out():
    """max_tokens is never overrun: no step is planned whose token would be dropped."""
    simulation = Simulation(depth=3)
    simulation.submit([1, 3], 5, ignore_eos=True)
    simulation.finish()
    assert simulation.num_steps == 5


def test_a_stop_costs_at_most_depth_minus_one_extra_steps():
    """The end of sequence is seen at commit; what was planned past it is dropped."""
    simulation = Simulation(depth=3, vocab_size=11)
    key = simulation.submit([1, 3], 50)
    simulation.finish()
    assert simulation.expected[key].tokens[-1] == EOS
    assert simulation.num_steps <= len(simulation.expected[key].tokens) + 2


def test_a_long_prompt_does_not_hold_up_those_who_decode():
    """While sequences decode, a step takes no more prompt tokens than their latency allows; else as many as fit."""
    simulation = Simulation(num_blocks=60, max_model_len=60, max_num_batched_tokens=32)
    simulation.state.max_prefill_tokens = 5
    simulation.submit([1, 2, 3], 9, ignore_eos=True)
    sizes = []
    while not simulation.state.is_idle:
        before = simulation.num_computed_tokens
        if simulation.plan():
            sizes.append(simulation.num_computed_tokens - before)
            if len(sizes) == 2:
                simulation.submit(list(range(3, 53)), 2, ignore_eos=True)
        simulation.run_device(), simulation.commit()
    assert sizes[:9] == [3, 1] + [6] * 7
    assert sizes[9:11] == [15, 1], "nobody decodes: the rest of the prompt at once"


def test_higher_priority_starts_first():
    simulation = Simulation(max_num_seqs=1)
    late = simulation.submit([1], 3, ignore_eos=True, priority=0)
    early = simulation.submit([1, 2], 3, ignore_eos=True, priority=5)
    while simulation.expected[early].reason is None:
        assert simulation.expected[late].got == []
        assert simulation.plan() or simulation.run_device() or simulation.commit()
    simulation.finish()


def test_the_checker_sees_a_block_that_is_reused_too_early(monkeypatch):
    """Without fences the same load fails: the test above can fail."""
    give_back = BlockPool.give_back
    monkeypatch.setattr(BlockPool, "give_back", lambda self, blocks, last_step: give_back(self, blocks, -1))

    def run_loads():
        for seed in range(20):
            simulation = Simulation(depth=3, block_size=2, num_blocks=34, max_num_seqs=6, max_model_len=64)
            load(simulation, random.Random(seed), 30)
            simulation.finish()

    with pytest.raises(AssertionError, match="before their fence"):
        run_loads()


def test_the_truth_machine_sees_a_wrong_block(monkeypatch):
    """A single corrupted word in one rank's cache changes the tokens."""
    simulation = Simulation(tp_size=2)
    simulation.submit([1, 2, 3, 4, 5], 20, ignore_eos=True)
    for _ in range(4):
        simulation.plan(), simulation.run_device(), simulation.commit()
    slot = simulation.state.table.running[0].slot
    simulation.engines[1]._cache[simulation.state.table.block_tables[slot, 0], 1, 0] ^= 1
    with pytest.raises(AssertionError, match="a wrong token"):
        simulation.finish()


@pytest.mark.parametrize(("ignore_eos", "suppressed"), [(False, [EOS, 5, 7]), (True, [5, 7])])
def test_min_tokens_suppresses_what_would_end_the_sequence_whatever_the_front_end_says(ignore_eos, suppressed):
    simulation = Simulation()
    simulation.submit(
        [1], 9, min_tokens=3, stop_token_ids=(7, 5), ignore_eos=ignore_eos, suppressed_token_ids=b"\1\0\0\0"
    )
    (sequence,) = simulation.state.sequences.values()
    assert unpack_int32(sequence.sampling.suppressed_token_ids).tolist() == suppressed


@pytest.mark.parametrize(("tp_size", "depth"), GRID)
def test_parameters_that_look_at_the_output_survive_preemption(tp_size, depth):
    """Every sequence has penalties, bad words and logprobs; counts are those of its own tokens, whatever the slot."""
    rng = random.Random(depth)
    simulation = Simulation(tp_size, depth, block_size=2, num_blocks=34, max_num_seqs=6, max_model_len=64)
    bad_words = [pack_int32([first, second]) for first in range(53) for second in (5, 6, 7)]
    for _ in range(12):
        simulation.submit(
            [rng.randrange(53) for _ in range(rng.randrange(1, 20))],
            40,
            ignore_eos=True,
            temperature=rng.choice([0.0, 1.0]),
            repetition_penalty=1.5,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            bad_words=bad_words,
            num_logprobs=rng.choice([0, 2]),
        )
    simulation.finish()
    assert simulation.num_preemptions > 0
    for expected in simulation.expected.values():
        assert not {5, 6, 7} & set(expected.got[1:])


def test_the_truth_machine_sees_a_wrong_count():
    """A token that is missing in a slot's history changes what is sampled with penalties."""
    simulation = Simulation()
    simulation.submit([1, 2, 3], 20, ignore_eos=True, frequency_penalty=1.0)
    for _ in range(4):
        simulation.plan(), simulation.run_device(), simulation.commit()
    (tokens,) = simulation.engines[0]._sampler._of_slot.values()
    tokens.output.pop()
    with pytest.raises(AssertionError, match="a wrong token"):
        simulation.finish()


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        ("min_p", {"min_p": 1.5}),
        ("repetition_penalty", {"repetition_penalty": -1.0}),
        ("presence_penalty", {"presence_penalty": 3.0}),
        ("frequency_penalty", {"frequency_penalty": float("nan")}),
        ("bias_token_ids", {"bias_token_ids": pack_int32([53]), "biases": pack_float32([1])}),
        ("biases", {"bias_token_ids": pack_int32([5]), "biases": b"abc"}),
        ("biases", {"bias_token_ids": pack_int32([5, 5]), "biases": pack_float32([1, 1])}),
        ("biases", {"bias_token_ids": pack_int32([5]), "biases": pack_float32([float("inf")])}),
        ("allowed_token_ids", {"allowed_token_ids": pack_int32([3] * 54)}),
        ("allowed_mask", {"allowed_mask": b"\1" * 6}),
        ("allowed_mask", {"allowed_mask": b"\1" * 8}),
        ("allowed_mask", {"allowed_mask": b"\1" * 6 + b"\x20"}),  # token 53
        ("allowed_mask", {"allowed_mask": b"\1" * 7, "allowed_token_ids": pack_int32([3])}),
        ("bad_words", {"bad_words": [b""]}),
        ("bad_words", {"bad_words": [pack_int32([1])] * 513}),
        ("num_logprobs", {"num_logprobs": 21}),
    ],
)
def test_what_no_front_end_sends_is_refused_and_plans_stay_bounded(name, sampling):
    simulation = Simulation()
    submit = frontend_pb2.Submit(
        sequence_id=1, token_ids=pack_int32([1]), max_tokens=1, sampling=plan_pb2.Sampling(top_p=1, **sampling)
    )
    message = frontend_pb2.FrontendMessage(submits=[submit])
    arrived = apply_message(simulation.state, 0, message, 0, now_ns=0, rates=simulation.rates)
    ((_, refused),) = arrived.refused
    assert name in str(refused)


NINE = pack_int32([9])
ONLY_9 = pack_mask([9], 53)


@pytest.mark.parametrize(
    ("names", "sampling"),
    [
        ("allowed_token_ids and bad_words of one token", {"allowed_token_ids": NINE, "bad_words": [NINE]}),
        ("allowed_token_ids and bad_words of one token", {"allowed_mask": ONLY_9, "bad_words": [NINE]}),
        ("allowed_token_ids and stop_token_ids below min_tokens", {"allowed_mask": ONLY_9, "min_tokens": 1}),
        ("bad_words of one token", {"bad_words": [pack_int32([token]) for token in range(53)]}),
        (
            "bad_words of one token and stop_token_ids below min_tokens",
            {"bad_words": [pack_int32([token]) for token in range(53) if token not in (9, EOS)], "min_tokens": 1},
        ),
        ("allowed_token_ids", {"allowed_mask": bytes(7)}),
    ],
)
def test_parameters_that_leave_no_token_are_refused_by_name(names, sampling):
    """Token 9 is a stop id; one token is always enough."""
    simulation = Simulation()

    def refused(**changed: object) -> list[str]:
        given = plan_pb2.Sampling(**{"top_p": 1, **sampling, **changed})
        submit = frontend_pb2.Submit(
            sequence_id=simulation.num_arrivals, token_ids=NINE, max_tokens=3, sampling=given, stop_token_ids=NINE
        )
        message = frontend_pb2.FrontendMessage(submits=[submit])
        arrived = apply_message(simulation.state, 0, message, simulation.num_arrivals, now_ns=0, rates=simulation.rates)
        simulation.num_arrivals += 1
        return [str(one) for _, one in arrived.refused]

    assert refused() == [f"{names} leave no token to sample"]
    if "allowed_token_ids" in sampling:
        assert not refused(allowed_token_ids=pack_int32([8, 9]))
    elif any(sampling.get("allowed_mask", b"")):
        assert not refused(allowed_mask=pack_mask([9, 52], 53))
    if "bad_words" in sampling:
        assert not refused(bad_words=[*sampling["bad_words"][1:], pack_int32([9, 9])])
    if "min_tokens" in sampling:
        assert not refused(min_tokens=0)


def test_a_mask_means_what_its_ids_mean():
    """To planner, ranks and truth."""
    allowed = [2, 3, 17, 40, 52]
    outputs = []
    for told in ({"allowed_token_ids": pack_int32(allowed)}, {"allowed_mask": pack_mask(allowed, 53)}):
        simulation = Simulation(tp_size=2)
        key = simulation.submit([1, 2, 3], 20, ignore_eos=True, **told)
        simulation.finish()
        outputs.append(simulation.expected[key].got)
    assert outputs[0] == outputs[1]
    assert set(outputs[0]) <= set(allowed)


def test_sampling_parameters_reach_the_plan_as_they_were_sent():
    simulation = Simulation()
    sampling = {"top_p": 0.5, "min_p": 0.25, "num_logprobs": 0, "bad_words": [pack_int32([5, 6])]}
    simulation.submit([1], 3, **sampling, allowed_token_ids=pack_int32(range(9)))
    planned = plan_step(simulation.state)
    (new,) = decode_plan(encode_plan(planned.plan)).new_sequences
    assert new.sampling == plan_pb2.Sampling(**sampling, allowed_token_ids=pack_int32(range(9)))
