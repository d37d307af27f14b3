"""What samplers remember: tokens really sampled, by slot, whoever had the slot before."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from sampler_ranks import Ranks
from torch import Tensor

from albireo_kernels.reference import Params
from sampling_rows import NUM_SLOTS, SCHEMES, Row, expected_token, make_batch, random_logits
from worker_svc.batch import History
from worker_svc.row_sampling import SlotSampling

VOCAB_SIZE = 203
PROMPT = [5, 6, 7, 5]
PENALISED = Params(temperature=0.0, repetition_penalty=1.5, presence_penalty=0.4, frequency_penalty=0.9)
NEVER_TWICE = Params(temperature=0.0, presence_penalty=1000.0)
WAYS = [("merge", 1), ("merge", 2), ("merge", 8), ("batch-sharded", 4), ("gather", 2)]


class Device:
    """The samplers of a group with the batch states' sampling parameters; logits of step i are made from i."""

    def __init__(self, scheme: str = "merge", tp_size: int = 2) -> None:
        self.ranks = Ranks(scheme, tp_size, VOCAB_SIZE)
        self.sampling = SlotSampling(NUM_SLOTS, VOCAB_SIZE)

    def start(self, slot: int, params: Params) -> list[History]:
        """A sequence with the prompt and output of its parameters."""
        tokens = np.array([*params.prompt, *params.output], np.int32)
        needs = self.sampling.set(slot, Row(params, 0).message)
        return [History(slot, tokens, len(params.prompt))] if needs else []

    def step(self, logits: Tensor, slots: Sequence[int], position: int, histories: Sequence[History] = ()) -> list[int]:
        batch = make_batch(slots, self.sampling, np.full(len(slots), position), histories)
        return self.ranks.sample(logits, batch)[0]


def logits_of_step(step: int, num_rows: int = 1) -> Tensor:
    return random_logits(np.random.default_rng(step), num_rows, VOCAB_SIZE, "ties")


def oracle_output(params: Params, num_tokens: int) -> list[int]:
    output = list(params.output)
    for position in range(len(output), num_tokens):
        row = Row(replace(params, prompt=PROMPT, output=output), position)
        output.append(expected_token(logits_of_step(position)[0], row))
    return output


@pytest.mark.parametrize(("scheme", "tp_size"), WAYS)
def test_penalties_see_the_tokens_sampled_by_steps_before(scheme: str, tp_size: int) -> None:
    """The host gets no token between the steps: the device alone knows them."""
    device = Device(scheme, tp_size)
    params = replace(PENALISED, prompt=PROMPT)
    histories, output = device.start(9, params), []
    for position in range(20):
        output += device.step(logits_of_step(position), [9], position, histories if position == 0 else ())
    assert output == oracle_output(PENALISED, 20)


@pytest.mark.parametrize(("scheme", "tp_size"), WAYS)
def test_bad_words_end_where_the_output_goes_on_as_they_do(scheme: str, tp_size: int) -> None:
    """Words made of what comes without them: two tokens, three, 64, and one that the prompt only begins."""
    free = oracle_output(Params(temperature=0.0), 70)
    words = [[PROMPT[-1], free[0]], free[2:4], free[5:8], free[4:68], free[:70]]
    params = Params(temperature=0.0, bad_words=words[:-1], prompt=PROMPT)
    expected = oracle_output(params, 70)
    assert expected[0] == free[0]
    assert expected[3] != free[3]
    device, output = Device(scheme, tp_size), []
    histories = device.start(9, params)
    for position in range(70):
        output += device.step(logits_of_step(position), [9], position, histories if position == 0 else ())
    assert output == expected


def test_a_word_of_64_tokens_is_remembered_as_a_whole() -> None:
    free = oracle_output(Params(temperature=0.0), 70)
    word = free[4:68]
    params = Params(temperature=0.0, bad_words=[word], prompt=PROMPT)
    assert oracle_output(params, 68)[:67] == free[:67]
    device, output = Device(), []
    histories = device.start(9, params)
    for position in range(70):
        output += device.step(logits_of_step(position), [9], position, histories if position == 0 else ())
    assert output[:67] == free[:67]
    assert output[67] != free[67]
    assert output == oracle_output(params, 70)


@pytest.mark.parametrize(("scheme", "tp_size"), WAYS)
def test_a_resumed_sequence_goes_on_in_another_slot_as_if_never_preempted(scheme: str, tp_size: int) -> None:
    """Preempted after 7 tokens, while others run; the history waits during a prefill in chunks."""
    params = replace(PENALISED, bad_words=[[3, 4], [4, 5, 6]], prompt=PROMPT)
    expected = oracle_output(params, 15)
    device = Device(scheme, tp_size)
    histories = device.start(2, params)
    output = [device.step(logits_of_step(i), [2], i, histories if i == 0 else ())[0] for i in range(7)]
    resumed = device.start(40, replace(params, output=output))
    device.step(torch.zeros(0, VOCAB_SIZE), [], 0, resumed)
    device.step(logits_of_step(99), [3], 0, device.start(3, Params()))
    output += [device.step(logits_of_step(i), [40], i)[0] for i in range(7, 15)]
    assert output == expected


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_slot_s_next_sequence_knows_nothing_of_the_last(scheme: str) -> None:
    """Nor of one that left before it sampled, nor does one without penalties mind what came before."""
    device = Device(scheme)
    logits = logits_of_step(1)
    first = [device.step(logits, [4], i, device.start(4, NEVER_TWICE) if i == 0 else ())[0] for i in range(5)]
    assert len(set(first)) == 5
    device.step(torch.zeros(0, VOCAB_SIZE), [], 0, device.start(4, replace(NEVER_TWICE, prompt=first, output=[9])))
    plain = Params(temperature=0.0)
    assert [device.step(logits, [4], i, device.start(4, plain) if i == 0 else ())[0] for i in range(3)] == first[:1] * 3
    again = [device.step(logits, [4], i, device.start(4, NEVER_TWICE) if i == 0 else ())[0] for i in range(5)]
    assert again == first


def test_only_what_rows_of_a_step_sampled_is_counted() -> None:
    """A slot that a step has no row of keeps its counts, and neighbours do not share theirs."""
    device = Device("merge", 8)
    histories = [*device.start(0, NEVER_TWICE), *device.start(1, NEVER_TWICE)]
    logits = torch.arange(VOCAB_SIZE, 0, -1, dtype=torch.float32)
    assert device.step(logits.expand(2, -1), [0, 1], 0, histories) == [0, 0]
    assert device.step(logits[None], [1], 1) == [1]
    assert device.step(logits.expand(2, -1), [1, 0], 2) == [2, 1]


def test_nothing_is_allocated_before_a_row_needs_it() -> None:
    device = Device("merge", 2)
    states = [sampler._state for sampler in device.ranks.samplers]
    device.step(logits_of_step(0), [0], 0, device.start(0, Params(temperature=0.5, top_p=0.9)))
    assert all(state._counts is None and state._tails is None for state in states)
    device.step(logits_of_step(0), [0], 0, device.start(0, PENALISED))
    assert [state.counts.in_output.shape for state in states] == [(NUM_SLOTS, 102), (NUM_SLOTS, 101)]
    assert all(state._tails is None for state in states)
    device.step(logits_of_step(0), [1], 0, device.start(1, Params(bad_words=[[1, 2]])))
    assert all(state._tails is not None for state in states)
