"""Logprobs keep beside their tokens, and what is wrong on the wire is refused."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from albireo.arrays import pack_int32
from albireo.logprobs import Logprobs, decode, encode, join, places_where

NUM_TOKENS = 12


@st.composite
def any_logprobs(draw: st.DrawFn) -> Logprobs:
    """Of some of NUM_TOKENS tokens; every number tells whose it is."""
    indices = np.array(sorted(draw(st.sets(st.integers(0, NUM_TOKENS - 1)))), dtype=np.int32)
    num_top = np.array(draw(st.lists(st.integers(0, 3), min_size=len(indices), max_size=len(indices))), dtype=np.int32)
    owners = np.repeat(indices, num_top).astype(np.int32)
    return Logprobs(indices, -indices.astype(np.float32), indices + 1, num_top, owners, -owners.astype(np.float32))


def by_token(logprobs: Logprobs) -> dict[int, tuple[float, int, list[tuple[int, float]]]]:
    tops = list(zip(logprobs.top_token_ids.tolist(), logprobs.top_logprobs.tolist(), strict=True))
    starts = np.cumsum(logprobs.num_top) - logprobs.num_top
    return {
        index: (float(logprobs.logprobs[i]), int(logprobs.ranks[i]), tops[starts[i] : starts[i] + logprobs.num_top[i]])
        for i, index in enumerate(logprobs.indices.tolist())
    }


@given(any_logprobs(), st.lists(st.booleans(), min_size=NUM_TOKENS, max_size=NUM_TOKENS))
def test_a_selection_of_tokens_takes_their_logprobs_along(logprobs: Logprobs, stays: list[bool]) -> None:
    places = places_where(np.array(stays))
    moved = by_token(logprobs.of_tokens(places))
    assert moved == {int(places[index]): each for index, each in by_token(logprobs).items() if stays[index]}


@given(any_logprobs(), any_logprobs())
def test_one_after_the_other(first: Logprobs, second: Logprobs) -> None:
    shifted = second._replace(indices=second.indices + np.int32(NUM_TOKENS))
    assert by_token(join([first, shifted])) == by_token(first) | by_token(shifted)


@given(any_logprobs())
def test_logprobs_survive_the_wire(logprobs: Logprobs) -> None:
    assert by_token(decode(encode(logprobs), NUM_TOKENS)) == by_token(logprobs)


def one() -> Logprobs:
    values = np.array([-1.0], dtype=np.float32)
    ids = np.array([1], dtype=np.int32)
    return Logprobs(ids, values, ids, ids, ids, values)


@pytest.mark.parametrize(
    ("fields", "num_tokens"),
    [
        ({"indices": pack_int32([2])}, 2),
        ({"indices": pack_int32([-1])}, 2),
        ({"indices": pack_int32([0, 1])}, 2),
        ({"ranks": b""}, 2),
        ({"num_top": pack_int32([2])}, 2),
        ({"num_top": pack_int32([-1])}, 2),
        ({"top_logprobs": b"123"}, 2),
        ({}, 1),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, bytes], num_tokens: int) -> None:
    message = encode(one())
    for name, value in fields.items():
        setattr(message, name, value)
    with pytest.raises(ValueError, match=r"logprobs|buffer"):
        decode(message, num_tokens)
