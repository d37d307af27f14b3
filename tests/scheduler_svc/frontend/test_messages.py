"""What messages of the Attach stream say by sequence, and how submits are packed."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo import logprobs
from albireo.arrays import pack_int32, pack_uint64
from albireo.logprobs import Logprobs
from albireo.v1 import frontend_pb2
from scheduler_svc.frontend.logprobs import TokenLogprobs, WaitingLogprobs
from scheduler_svc.frontend.messages import group_tokens, in_messages, logprobs_in, started_in, tokens_in


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1) | st.integers(1, 4), st.integers(0, 2**31 - 1)), min_size=1))
def test_tokens_are_grouped_by_sequence_in_their_order(tokens: list[tuple[int, int]]) -> None:
    """One batch per sequence, with all of its tokens."""
    expected: dict[int, list[int]] = {}
    for sequence_id, token_id in tokens:
        expected.setdefault(sequence_id, []).append(token_id)
    sequence_ids = np.array([sequence_id for sequence_id, _ in tokens], dtype=np.uint64)
    token_ids = np.array([token_id for _, token_id in tokens], dtype=np.int32)
    assert group_tokens(sequence_ids, token_ids) == expected


def test_arrays_that_are_not_parallel_are_an_error() -> None:
    with pytest.raises(ValueError, match="2 sequence ids and 1 tokens"):
        group_tokens(np.array([1, 2], dtype=np.uint64), np.array([1], dtype=np.int32))


def test_a_message_without_arrays_tells_nothing() -> None:
    message = frontend_pb2.PlannerMessage()
    assert not started_in(message)
    assert not tokens_in(message)


def test_started_sequences_come_with_their_cached_tokens() -> None:
    message = frontend_pb2.PlannerMessage(
        started_sequence_ids=pack_uint64([7, 3]), started_num_cached_tokens=pack_int32([0, 64])
    )
    assert started_in(message) == [(7, 0), (3, 64)]


@pytest.mark.parametrize(
    "fields",
    [
        {"started_sequence_ids": pack_uint64([1, 2]), "started_num_cached_tokens": pack_int32([5])},
        {"started_sequence_ids": pack_uint64([1])},
        {"started_num_cached_tokens": pack_int32([5])},
        {"started_sequence_ids": b"123", "started_num_cached_tokens": pack_int32([5])},
        {"token_sequence_ids": pack_uint64([1])},
        {"token_ids": pack_int32([1])},
    ],
)
def test_a_message_whose_arrays_are_not_parallel_cannot_be_read(fields: Any) -> None:
    message = frontend_pb2.PlannerMessage(**fields)
    with pytest.raises(ValueError, match=r"started sequences and|sequence ids and|buffer size"):
        _ = started_in(message), tokens_in(message)


def test_resubmission_is_packed_into_messages_of_a_bounded_size() -> None:
    submits = [frontend_pb2.Submit(sequence_id=i, token_ids=bytes(3 << 20)) for i in range(20)]
    messages = in_messages(submits)
    assert [submit.sequence_id for message in messages for submit in message.submits] == list(range(20))
    assert len(messages) > 1
    assert max(message.ByteSize() for message in messages) < 32 << 20


def test_logprobs_are_grouped_by_sequence_like_their_tokens() -> None:
    """Sequence 7 has them, with as many of the likeliest as each token brings; sequence 3 has none."""
    four = Logprobs(
        indices=np.array([0, 2, 3, 4], dtype=np.int32),
        logprobs=np.array([-0.5, -2.0, -1.0, -3.0], dtype=np.float32),
        ranks=np.array([1, 3, 2, 4], dtype=np.int32),
        num_top=np.array([2, 1, 0, 1], dtype=np.int32),
        top_token_ids=np.array([5, 6, 8, 9], dtype=np.int32),
        top_logprobs=np.array([-0.5, -0.75, -0.25, -0.5], dtype=np.float32),
    )
    message = frontend_pb2.PlannerMessage(
        token_sequence_ids=pack_uint64([7, 3, 9, 7, 7]), token_ids=pack_int32(range(5)), logprobs=logprobs.encode(four)
    )
    taken = {}
    for sequence_id, of_sequence in logprobs_in(message).items():
        waiting = WaitingLogprobs()
        waiting.add(of_sequence)
        taken[sequence_id] = waiting.take(5)
    assert taken == {
        7: [
            TokenLogprobs(-0.5, 1, [(5, -0.5), (6, -0.75)]),
            TokenLogprobs(-1.0, 2, []),
            TokenLogprobs(-3.0, 4, [(9, -0.5)]),
        ],
        9: [TokenLogprobs(-2.0, 3, [(8, -0.25)])],
    }


def test_logprobs_of_tokens_that_are_not_there_cannot_be_read() -> None:
    message = frontend_pb2.PlannerMessage(token_sequence_ids=pack_uint64([7]), token_ids=pack_int32([1]))
    message.logprobs.indices, message.logprobs.logprobs = pack_int32([1]), bytes(4)
    message.logprobs.ranks = message.logprobs.num_top = bytes(4)
    with pytest.raises(ValueError, match="not there"):
        logprobs_in(message)
