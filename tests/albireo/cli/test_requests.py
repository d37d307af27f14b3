"""JSON and flags become requests by the descriptors of the contract; what does not fit is named."""

import argparse
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo.cli import requests
from albireo.errors import InvalidRequest
from albireo.v1 import generation_pb2 as pb


def parse(fields: Any, **defaults: Any) -> pb.GenerateRequest:
    return requests.parse_line(json.dumps(fields).encode(), defaults)


def test_every_parameter_by_its_api_name() -> None:
    params: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 1,
        "top_k": 5,
        "seed": 2**64 - 1,
        "max_tokens": 7,
        "min_tokens": 2,
        "stop": ["a", "b"],
        "stop_token_ids": [1, 2],
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "n": 2,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "bad_words": ["a"],
        "logprobs": 0,
        "prompt_logprobs": 3,
        "truncate_prompt_tokens": 4,
    }
    assert params.keys() <= set(pb.SamplingParams.DESCRIPTOR.fields_by_name)
    request = parse({"prompt": "x", "request_id": "label", "priority": -1, **params})
    expected = pb.GenerateRequest(
        request_id="label", text="x", priority=-1, sampling_params=pb.SamplingParams(**params)
    )
    assert request == expected


def test_what_is_absent_or_null_stays_the_servers_choice() -> None:
    request = parse({"prompt": "x", "temperature": None, "request_id": None})
    assert not request.sampling_params.ListFields()
    assert parse({"prompt": "x", "temperature": 0}).sampling_params.HasField("temperature"), "zero is a value"


def test_token_ids() -> None:
    request = parse({"prompt_token_ids": [1, 2]})
    assert list(request.token_ids.ids) == [1, 2]
    assert parse({"prompt_token_ids": []}).WhichOneof("prompt") == "token_ids"


def test_one_stop_string_needs_no_list() -> None:
    assert list(parse({"prompt": "x", "stop": "ab"}).sampling_params.stop) == ["ab"]


def test_defaults_give_way_to_the_line() -> None:
    request = parse({"prompt": "x", "seed": 2, "stop": ["b"], "top_k": None}, seed=1, stop=["a"], max_tokens=9, top_k=3)
    assert request.sampling_params == pb.SamplingParams(seed=2, stop=["b"], max_tokens=9, top_k=3)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"prompt": "x", "max_token": 5}, "max_token: no such field; did you mean max_tokens?"),
        ({"prompt": "x", "zzz": 5}, "zzz: no such field"),
        ({"prompt": "x", "max_tokens": "5"}, 'max_tokens: "5" is not an integer'),
        ({"prompt": "x", "max_tokens": 5.0}, "max_tokens: 5.0 is not an integer"),
        ({"prompt": "x", "max_tokens": True}, "max_tokens: true is not an integer"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens: -1 is out of range"),
        ({"prompt": "x", "seed": 2**64}, "seed: 18446744073709551616 is out of range"),
        ({"prompt": "x", "temperature": "hot"}, 'temperature: "hot" is not a number'),
        ({"prompt": "x", "temperature": 10**400}, "temperature: 1000"),
        ({"prompt": "x", "ignore_eos": 1}, "ignore_eos: 1 is not true or false"),
        ({"prompt": "x", "stop": 5}, "stop: 5 is not a list"),
        ({"prompt": "x", "stop": ["a", 5]}, "stop: 5 is not a string"),
        ({"prompt": "x", "stop_token_ids": "ab"}, 'stop_token_ids: "ab" is not a list'),
        ({"prompt": "x", "stop_token_ids": [-5]}, "stop_token_ids: [-5] is out of range"),
        ({"prompt": "x", "priority": 2**31}, "priority: 2147483648 is out of range"),
        ({"prompt": "x", "request_id": 7}, "request_id: 7 is not a string"),
        ({"prompt": 5}, "prompt: 5 is not a string"),
        ({"prompt": "\ud800"}, "prompt: not valid Unicode"),
        ({"prompt_token_ids": ["a"]}, 'prompt_token_ids: "a" is not an integer'),
        ({"prompt": "x", "prompt_token_ids": [1]}, "prompt, prompt_token_ids: exactly one"),
        ({"max_tokens": 5}, "prompt, prompt_token_ids: exactly one"),
        ({"prompt": None}, "prompt, prompt_token_ids: exactly one"),
        (["prompt"], "not a JSON object"),
        ("prompt", "not a JSON object"),
    ],
)
def test_what_does_not_fit_is_named(fields: Any, complaint: str) -> None:
    with pytest.raises(InvalidRequest) as info:
        parse(fields)
    assert str(info.value).startswith(complaint)
    assert len(str(info.value)) < 150


@pytest.mark.parametrize("line", [b"{", b"\xff", b'{"prompt": "x", "temperature": NaN}', b"[" * 100_000])
def test_what_is_no_json(line: bytes) -> None:
    with pytest.raises(InvalidRequest, match="not JSON"):
        requests.parse_line(line, {})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
keys = st.sampled_from(
    ["prompt", "prompt_token_ids", "request_id", "priority", *pb.SamplingParams.DESCRIPTOR.fields_by_name]
)


@given(st.dictionaries(keys | st.text(max_size=3), json_values, max_size=4))
def test_any_json_is_a_request_or_an_invalid_one(fields: dict[str, Any]) -> None:
    try:
        request = parse({"prompt": "x", **fields})
    except InvalidRequest:
        return
    assert pb.GenerateRequest.FromString(request.SerializeToString()) == request


def test_structures_are_json_too() -> None:
    """Maps and lists of ids as protobuf's JSON has them."""
    fields = {"logit_bias": {"5": -1.5}, "allowed_token_ids": {"ids": [1, 2]}, "bad_words_token_ids": [{"ids": [3]}]}
    params = parse({"prompt": "x", **fields}).sampling_params
    assert (dict(params.logit_bias), list(params.allowed_token_ids.ids)) == ({5: -1.5}, [1, 2])
    assert [list(word.ids) for word in params.bad_words_token_ids] == [[3]]


@pytest.mark.parametrize("text", ["5", "=1", "5=", "a=1", "5=nan", "-1=2"])
def test_a_bias_that_is_none_is_wrong_usage(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    requests.add_flags(parser)
    with pytest.raises(SystemExit):
        parser.parse_args([f"--logit-bias={text}"])
    assert "is not ID=VALUE" in capsys.readouterr().err


def test_flags() -> None:
    parser = argparse.ArgumentParser()
    requests.add_flags(parser)
    argv = ["--max-tokens", "5", "--temperature", "0.5", "--stop", "a", "--stop", "b", "--stop-token-ids", "7"]
    argv += ["--logit-bias", "5=-1.5", "--logit-bias", "7=2", "--min-p", "0.1", "--logprobs", "0"]
    argv += ["--ignore-eos", "--no-skip-special-tokens", "--priority", "-3", "--request-id", "me"]
    values = requests.flag_values(parser.parse_args(argv))
    assert values == {
        "max_tokens": 5,
        "temperature": 0.5,
        "stop": ["a", "b"],
        "stop_token_ids": [7],
        "logit_bias": {"5": -1.5, "7": 2.0},
        "min_p": 0.1,
        "logprobs": 0,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "priority": -3,
        "request_id": "me",
    }
    assert requests.flag_values(parser.parse_args([])) == {}
