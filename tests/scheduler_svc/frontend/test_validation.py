"""What is refused, and what absent fields become. Rules of the shared validator; the APIs' own are in their tests."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from albireo.errors import InvalidRequest
from scheduler_svc.frontend.validation import (
    GenerationRequest,
    Limits,
    RequestFields,
    SamplingDefaults,
    SamplingFields,
    check_text,
    validate,
)

LIMITS = Limits(vocab_size=100, max_model_len=16)


def request(prompt: Any = (1, 2, 3), request_id: str = "r", tenant: str = "", **sampling: Any) -> Any:
    return RequestFields(
        request_id=request_id,
        prompt=prompt,
        prompt_field="prompt",
        sampling=SamplingFields(**sampling),
        wants_text=True,
        wants_stop_token=True,
        tenant=tenant,
    )


def encode(text: str) -> list[int]:
    """A token per character; a space and the letter after it are one."""
    return [ord(char) % 100 for char in text.replace(" a", "A").replace(" b", "B").replace("xy", "~")]


def validated(defaults: SamplingDefaults | None = None, **fields: Any) -> GenerationRequest:
    given = request(**fields)
    return validate(given, given.prompt, LIMITS, defaults or SamplingDefaults(), encode)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ()}, "prompt is empty"),
        ({"prompt": range(16)}, "prompt has 16 tokens; the context of 16 tokens takes 15 at most"),
        ({"prompt": (1, 100)}, r"prompt\[1\] is 100; the vocabulary has ids 0 to 99"),
        ({"prompt": (1, 2**32 - 1)}, r"prompt\[1\] is 4294967295; the vocabulary"),
        ({"temperature": math.nan}, r"temperature is nan; it must be in \[0, 100\]"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": 101.0}, "temperature is 101"),
        ({"top_p": 0.0}, r"top_p is 0; it must be in \(0, 1\]"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"n": 0}, "n is 0; it must be 1 to 128"),
        ({"n": 129}, "n is 129; it must be 1 to 128"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be 1 or more"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens is 4; it must not exceed max_tokens, 3"),
        ({"stop": [""]}, r"stop\[0\] is empty"),
        ({"stop": ["a", "x" * 1025]}, r"stop\[1\] has 1025 characters; 1024 at most"),
        ({"stop": ["x"] * 65}, "stop has 65 strings; 64 at most"),
        ({"stop_token_ids": [5, 100]}, r"stop_token_ids\[1\] is 100; it must be 0 to 99"),
        ({"stop_token_ids": [1] * 1025}, "stop_token_ids has 1025 ids; 1024 at most"),
        ({"min_p": 1.5}, r"min_p is 1.5; it must be in \[0, 1\]"),
        ({"min_p": math.nan}, "min_p is nan"),
        ({"presence_penalty": 2.5}, r"presence_penalty is 2.5; it must be in \[-2, 2\]"),
        ({"frequency_penalty": math.nan}, "frequency_penalty is nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0; it must be a finite number above 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty is inf"),
        ({"logit_bias": {100: 1.0}}, "logit_bias names token 100; the vocabulary has ids 0 to 99"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias names token -1"),
        ({"logit_bias": {5: math.nan}}, r"logit_bias\[5\] is nan; it must be a finite number"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias has 1025 entries; 1024 at most"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
        ({"allowed_token_ids": [5, 100]}, r"allowed_token_ids\[1\] is 100; the vocabulary"),
        ({"bad_words": ["b"] * 256, "bad_words_token_ids": [[1]]}, "bad_words: there are 257 bad words.*256 at most"),
        ({"bad_words": ["a", " "]}, r"bad_words\[1\] has 0 tokens; it must have 1 to 64"),
        ({"bad_words": ["c" * 65]}, r"bad_words\[0\] has 65 tokens"),
        ({"bad_words": ["c" * 1025]}, r"bad_words\[0\] has 1025 characters; 1024 at most"),
        ({"bad_words_token_ids": [[1], []]}, r"bad_words_token_ids\[1\] has 0 tokens"),
        ({"bad_words_token_ids": [[1, 100]]}, r"bad_words_token_ids\[0\] has token 100; the vocabulary"),
        ({"logprobs": 21}, "logprobs is 21; it must be 0 to 20"),
        ({"logprobs": -1}, "logprobs is -1; it must be 0 to 20"),
        ({"prompt_logprobs": 21}, "prompt_logprobs is 21; it must be 0 to 20"),
        ({"prompt": range(20), "truncate_prompt_tokens": 16}, "prompt has 16 tokens; the context of 16 tokens"),
        ({"prompt": (1, 100, 2), "truncate_prompt_tokens": 2}, r"prompt\[1\] is 100; the vocabulary has ids 0 to 99"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens is 0; it must be 1 or more"),
        ({"request_id": "x" * 257}, "request_id has 257 characters; 256 at most"),
        ({"request_id": "a\nb"}, r"request_id\[1\] is '\\n'; it must not have control characters"),
        ({"request_id": "\u2028"}, r"request_id\[0\] is '\\u2028'"),
        ({"tenant": "x" * 129}, "x-tenant has 129 characters; 128 at most"),
        ({"tenant": "a\nb"}, r"x-tenant\[1\] is '\\n'; it must have printable ASCII characters only"),
        ({"tenant": "é"}, r"x-tenant\[0\] is 'é'"),
    ],
)
def test_a_wrong_field_is_named_with_value_and_limit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        validated(**fields)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "no prompt"),
        ("", "prompt is empty"),
        ("x" * 1025, "prompt has 1025 characters; the context of 16 tokens takes 1024 at most"),
    ],
)
def test_a_wrong_text_is_refused_before_it_is_tokenised(prompt: str | None, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        check_text(request(prompt=prompt), LIMITS)


def test_token_ids_need_no_tokeniser() -> None:
    assert check_text(request(prompt=[1]), LIMITS) is None
    assert check_text(request(prompt="x"), LIMITS) == "x"


def test_absent_fields_take_the_models_defaults() -> None:
    given = validated(SamplingDefaults(temperature=0.5, top_p=0.75, top_k=7))
    assert (given.temperature, given.top_p, given.top_k) == (0.5, 0.75, 7)
    assert (given.max_tokens, given.min_tokens, given.n, given.tenant) == (13, 0, 1, "")
    assert given.token_ids.dtype == np.int32


def test_given_fields_win_over_the_models_defaults() -> None:
    given = validated(SamplingDefaults(0.5, 0.75, 7), temperature=0.0, top_p=1.0, top_k=0)
    assert (given.temperature, given.top_p, given.top_k) == (0.0, 1.0, 0)


def test_a_prompt_may_leave_room_for_one_token() -> None:
    assert validated(prompt=range(15)).max_tokens == 1


@pytest.mark.parametrize(("num", "kept"), [(1, 1), (5, 5), (15, 15), (-1, 15), (None, 15)])
def test_a_prompt_is_cut_to_its_last_tokens(num: int | None, kept: int) -> None:
    prompt = range(20 if num else 15)
    assert validated(prompt=prompt, truncate_prompt_tokens=num).token_ids.tolist() == list(prompt)[-kept:]
    assert validated(prompt=(1, 2), truncate_prompt_tokens=num).token_ids.tolist() == [1, 2][-kept:]


def test_lengths_are_clamped_to_the_context() -> None:
    """A request for more tokens than fit ends at the context, as in other servers."""
    given = validated(max_tokens=1000, min_tokens=500)
    assert (given.max_tokens, given.min_tokens) == (13, 13)


def test_top_k_of_the_whole_vocabulary_is_all() -> None:
    assert [validated(top_k=top_k).top_k for top_k in (99, 100, 2**32 - 1)] == [99, 0, 0]


def test_a_tiny_temperature_is_greedy() -> None:
    assert validated(temperature=1e-30).temperature == 0.0


def test_repeated_stops_count_once() -> None:
    given = validated(stop=["b", "a", "b"], stop_token_ids=[3, 1, 3])
    assert (given.stop, given.stop_token_ids) == (("b", "a"), (1, 3))


def test_an_absent_seed_is_drawn_and_a_given_one_kept() -> None:
    assert validated().seed != validated().seed
    assert validated(seed=0).seed == 0
    assert validated(seed=-1).seed == 2**64 - 1


def test_completions_have_different_seeds_that_follow_from_the_request() -> None:
    """Index 0 keeps the seed, so that n = 1 and the first of n give the same."""
    one, other = validated(seed=5, n=3), validated(seed=5, n=3)
    seeds = [one.seed_of(i) for i in range(3)]
    assert seeds[0] == 5
    assert len(set(seeds)) == 3
    assert seeds == [other.seed_of(i) for i in range(3)]
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_parameters_of_logits_that_are_absent_change_nothing() -> None:
    given = validated().logits
    assert (given.min_p, given.repetition_penalty, given.presence_penalty, given.frequency_penalty) == (0, 1, 0, 0)
    assert (given.bad_words, given.num_logprobs, len(given.bias_token_ids), len(given.allowed_token_ids)) == (
        (),
        None,
        0,
        0,
    )
    given = validated(SamplingDefaults(min_p=0.1, repetition_penalty=1.1)).logits
    assert (given.min_p, given.repetition_penalty) == (0.1, 1.1)


def test_biases_are_clamped_and_in_the_order_of_their_ids() -> None:
    given = validated(logit_bias={7: 1e9, 3: -250.0, 5: 1.5}).logits
    assert given.bias_token_ids.tolist() == [3, 5, 7]
    assert given.biases.tolist() == [-100, 1.5, 100]


def test_allowed_ids_count_once_and_all_of_them_are_no_limit() -> None:
    assert validated(allowed_token_ids=[9, 3, 9]).logits.allowed_token_ids.tolist() == [3, 9]
    every = validated(allowed_token_ids=range(100)).logits
    assert (every.allowed_token_ids.tolist(), every.allowed_mask) == ([], b"")


@pytest.mark.parametrize("allowed", [range(3), range(4), [99, 3, 8, 3, 50], range(1, 100)])
def test_many_allowed_ids_are_a_mask(allowed: Sequence[int]) -> None:
    """Where that is the shorter one: 3 ids have 12 bytes, the mask has 13."""
    given = validated(allowed_token_ids=allowed).logits
    bits = np.unpackbits(np.frombuffer(given.allowed_mask, dtype=np.uint8), bitorder="little")
    assert len(bits) == (0 if len(allowed) < 4 else 104)
    assert sorted([*given.allowed_token_ids.tolist(), *np.flatnonzero(bits).tolist()]) == sorted(set(allowed))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a", [(ord("a"),), (ord("A"),)]),  # with a space it is another token
        ("  ac", [(97, 99), (65, 99)]),  # its own spaces do not count
        ("c", [(99,)]),  # with a space it has one token more
    ],
)
def test_a_bad_word_is_forbidden_with_and_without_a_space(text: str, words: list[tuple[int, ...]]) -> None:
    expected = [tuple(token % 100 for token in word) for word in words]
    assert list(validated(bad_words=[text]).logits.bad_words) == expected


def test_a_bad_word_of_ids_is_forbidden_as_it_is() -> None:
    assert validated(bad_words=["a"], bad_words_token_ids=[[1, 2], [97]]).logits.bad_words == ((97,), (65,), (1, 2))
