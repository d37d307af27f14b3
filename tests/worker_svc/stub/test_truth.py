"""The oracle: every sampling parameter that the stub knows matters, and what is forbidden is never sampled."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo.arrays import pack_float32, pack_int32
from albireo.v1 import plan_pb2
from worker_svc.stub.truth import true_logprobs, true_tokens

VOCAB_SIZE = 53
PROMPT = np.array([3, 1, 4, 1, 5], dtype=np.int32)


def output(prompt: np.ndarray = PROMPT, num: int = 20, **sampling: Any) -> list[int]:
    given_ = plan_pb2.Sampling(**sampling)
    return true_tokens(prompt, given_, frozenset(), num, VOCAB_SIZE).tolist()


@pytest.mark.parametrize(
    "sampling",
    [
        {"repetition_penalty": 1.5},
        {"presence_penalty": 0.5},
        {"frequency_penalty": -0.5},
        {"bias_token_ids": pack_int32([7]), "biases": pack_float32([0.5])},
    ],
)
def test_a_penalty_or_a_bias_changes_the_output(sampling: dict[str, Any]) -> None:
    assert output(**sampling) != output()


def test_penalties_that_are_none_change_nothing() -> None:
    assert output(repetition_penalty=1.0) == output(repetition_penalty=0.0) == output()


def test_where_the_prompt_ends_matters_to_penalties() -> None:
    """A resumed sequence must say which of its tokens are output."""
    whole = output(frequency_penalty=1.0)
    longer = np.concatenate((PROMPT, np.array(whole[:5], dtype=np.int32)))
    assert output(longer, 15, frequency_penalty=1.0) != whole[5:]


@given(st.sets(st.integers(0, VOCAB_SIZE - 1), min_size=3), st.data())
def test_what_is_forbidden_is_never_sampled(allowed: set[int], data: st.DataObject) -> None:
    word = st.lists(st.sampled_from(sorted(allowed)), min_size=2, max_size=3)
    words = data.draw(st.lists(word, max_size=4))
    packed = [pack_int32(each) for each in words]
    tokens = output(num=40, allowed_token_ids=pack_int32(sorted(allowed)), bad_words=packed)
    assert set(tokens) <= allowed
    last_ids = {each[-1] for each in words}
    if len(last_ids) < len(allowed):  # else nothing may be left to sample
        for each in words:
            assert each not in [tokens[i : i + len(each)] for i in range(len(tokens))]


def test_where_no_token_is_left_any_may_come() -> None:
    nine = pack_int32([9])
    assert len(output(num=5, allowed_token_ids=nine, bad_words=[nine])) == 5


@pytest.mark.parametrize("num_logprobs", [0, 3, 20])
def test_logprobs_are_of_the_history_alone(num_logprobs: int) -> None:
    """The greedy token is the likeliest; a token among the likeliest has the same logprob there."""
    tokens = np.array(output(frequency_penalty=1.0), dtype=np.int32)
    logprobs = true_logprobs(PROMPT, tokens, num_logprobs, VOCAB_SIZE)
    assert logprobs.num_top.tolist() == [num_logprobs] * len(tokens)
    top_ids = logprobs.top_token_ids.reshape(len(tokens), num_logprobs)
    top = logprobs.top_logprobs.reshape(len(tokens), num_logprobs)
    assert (np.diff(top) < 0).all()
    for i, token in enumerate(tokens):
        rank = int(logprobs.ranks[i])
        if rank <= num_logprobs:
            assert (top_ids[i, rank - 1], top[i, rank - 1]) == (token, logprobs.logprobs[i])
        else:
            assert token not in top_ids[i]
    greedy = true_logprobs(PROMPT, np.array(output(), dtype=np.int32), 0, VOCAB_SIZE)
    assert set(greedy.ranks.tolist()) == {1}
