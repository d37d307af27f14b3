"""One completion from tokens to deltas."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from albireo.logprobs import Logprobs
from albireo.v1 import frontend_pb2, generation_pb2
from scheduler_svc.frontend.completion import Completion, Delta
from scheduler_svc.frontend.logprobs import TokenLogprobs
from scheduler_svc.frontend.text import Detokenizer, StopMatcher

STOP, LENGTH = generation_pb2.FINISH_REASON_STOP, generation_pb2.FINISH_REASON_LENGTH
Ids = Callable[..., list[int]]


@pytest.fixture
def open_completion(byte_level: Tokenizer, ids: Ids) -> Callable[..., Completion]:
    def open_(*stops: str, min_tokens: int = 0, wants_end_token: bool = True, include: bool = False) -> Completion:
        matcher = StopMatcher(stops, include) if stops else None
        text = Detokenizer(byte_level).open(True)
        return Completion(0, frozenset(ids("<|eos|>", "cab")), wants_end_token, min_tokens, text, matcher)

    return open_


def ended(reason: generation_pb2.FinishReason = LENGTH, **fields: Any) -> frontend_pb2.Ended:
    return frontend_pb2.Ended(reason=reason, **fields)


def test_a_delta_holds_all_that_came_since_the_last(open_completion: Callable[..., Completion], ids: Ids) -> None:
    completion = open_completion()
    completion.receive(ids("Hello"))
    completion.receive(ids(" world", "a"))
    first = completion.take()
    completion.receive(ids("b"))
    completion.end(ended(num_output_tokens=4))
    second = completion.take()
    assert (first.text, first.token_ids, first.is_first) == ("Hello worlda", ids("Hello", " world", "a"), True)
    assert (second.text, second.token_ids, second.is_first) == ("b", ids("b"), False)
    assert second.finish is not None
    assert (second.finish.reason, second.finish.num_output_tokens) == (LENGTH, 4)


def test_a_delta_without_news_is_false_and_not_the_first(open_completion: Callable[..., Completion], ids: Ids) -> None:
    completion = open_completion()
    assert not completion.take()
    completion.receive(ids("a"))
    assert completion.take().is_first


@pytest.mark.parametrize("wants_end_token", [True, False])
@pytest.mark.parametrize("split", [True, False])
def test_the_token_that_ended_the_sequence_has_no_text(
    open_completion: Callable[..., Completion], ids: Ids, wants_end_token: bool, split: bool
) -> None:
    """A stop token that spells text, too; whether its end is known with it or later; ids as the API wants them."""
    completion = open_completion(wants_end_token=wants_end_token)
    completion.receive(ids("Hello", "cab"))
    early = completion.take() if split else Delta(0, True)
    completion.end(ended(STOP, matched_token_id=ids("cab")[0], num_output_tokens=2))
    late = completion.take()
    assert early.text + late.text == "Hello"
    assert early.token_ids + late.token_ids == ids("Hello", *(["cab"] if wants_end_token else []))
    assert late.finish is not None
    assert (late.finish.matched_token_id, late.finish.num_output_tokens) == (ids("cab")[0], 2)


def test_a_stop_token_that_the_planner_passed_over_is_a_token_like_others(
    open_completion: Callable[..., Completion], ids: Ids
) -> None:
    completion = open_completion()
    completion.receive(ids("cab"))
    completion.receive(ids("a", "cab"))
    completion.end(ended(LENGTH, num_output_tokens=3))
    delta = completion.take()
    assert (delta.text, delta.token_ids) == ("cabacab", ids("cab", "a", "cab"))


def test_a_stop_string_across_tokens_cuts_text_and_tokens(open_completion: Callable[..., Completion], ids: Ids) -> None:
    """It keeps the tokens up to the one that completed it; what came after that is dropped."""
    completion = open_completion("lo wo")
    assert completion.receive(ids("Hello")) is None
    assert completion.take().text == "Hel"
    assert completion.receive(ids(" world", "a", "b")) == 2
    assert completion.receive(ids("a")) is None
    delta = completion.take()
    assert (delta.text, delta.token_ids) == ("", ids(" world"))
    assert delta.finish is not None
    assert (delta.finish.reason, delta.finish.matched_stop_str, delta.finish.num_output_tokens) == (STOP, "lo wo", 2)


def test_a_stop_string_may_be_included(open_completion: Callable[..., Completion], ids: Ids) -> None:
    completion = open_completion("lo wo", include=True)
    assert completion.receive(ids("Hello", " world")) == 2
    assert completion.take().text == "Hello wo"


def test_a_stop_string_does_not_count_before_min_tokens(open_completion: Callable[..., Completion], ids: Ids) -> None:
    completion = open_completion("a", min_tokens=3)
    assert completion.receive(ids("a", "a")) is None
    assert completion.receive(ids("a", "a")) == 3
    assert completion.take().text == "aa"


def test_text_held_back_is_given_out_at_the_end(open_completion: Callable[..., Completion], ids: Ids) -> None:
    """The beginning of a stop string that did not come, and half a character."""
    completion = open_completion("Hello!")
    completion.receive(ids("Hello"))
    assert completion.take().text == ""
    completion.receive(ids("Ã"))
    completion.end(ended(num_output_tokens=2))
    assert completion.take().text == "Hello\ufffd"


def test_a_stop_string_may_be_complete_only_at_the_end(open_completion: Callable[..., Completion], ids: Ids) -> None:
    """Half a character at the end of the tokens reads as U+FFFD, which a stop string may name."""
    completion = open_completion("\ufffd")
    completion.receive(ids("Hello", "Ã", "<|eos|>"))
    completion.end(ended(STOP, matched_token_id=ids("<|eos|>")[0], num_output_tokens=3))
    delta = completion.take()
    assert (delta.text, delta.token_ids) == ("Hello", ids("Hello", "Ã"))
    assert delta.finish is not None
    assert (delta.finish.matched_stop_str, delta.finish.num_output_tokens) == ("\ufffd", 2)


def test_without_text_nothing_is_detokenised(ids: Ids) -> None:
    completion = Completion(0, frozenset(), wants_end_token=False)
    completion.receive(ids("Hello", "<|eos|>"))
    delta = completion.take()
    assert (delta.text, delta.token_ids) == ("", ids("Hello", "<|eos|>"))


def of(*logprobs: float, num_top: int = 0) -> Logprobs:
    num = len(logprobs)
    return Logprobs(
        np.arange(num, dtype=np.int32),
        np.array(logprobs, dtype=np.float32),
        np.ones(num, dtype=np.int32),
        np.full(num, num_top, dtype=np.int32),
        np.tile(np.arange(num_top, dtype=np.int32), num),
        np.tile(-np.arange(num_top, dtype=np.float32), num),
    )


def taken(*logprobs: float, num_top: int = 0) -> list[TokenLogprobs]:
    return [TokenLogprobs(each, 1, [(i, -i) for i in range(num_top)]) for each in logprobs]


def test_logprobs_come_with_their_tokens(open_completion: Callable[..., Completion], ids: Ids) -> None:
    """Of deltas that gathered, of a stop token whose end is told later, of one that was passed over."""
    completion = open_completion()
    completion.receive(ids("Hello"), of(-1))
    completion.receive(ids(" world", "cab"), of(-2, -3))
    assert completion.take().logprobs == taken(-1, -2)
    completion.receive(ids("a", "<|eos|>"), of(-4, -5))
    completion.end(ended(STOP, matched_token_id=ids("<|eos|>")[0], num_output_tokens=5))
    delta = completion.take()
    assert (delta.token_ids, delta.logprobs) == (ids("cab", "a", "<|eos|>"), taken(-3, -4, -5))


def test_a_stop_token_that_is_not_wanted_takes_its_logprobs_with_it(
    open_completion: Callable[..., Completion], ids: Ids
) -> None:
    completion = open_completion(wants_end_token=False)
    completion.receive(ids("a", "<|eos|>"), of(-1, -2))
    completion.end(ended(STOP, matched_token_id=ids("<|eos|>")[0], num_output_tokens=2))
    assert completion.take().logprobs == taken(-1)


def test_a_stop_string_cuts_logprobs_where_it_cuts_tokens(open_completion: Callable[..., Completion], ids: Ids) -> None:
    completion = open_completion("lo wo")
    completion.receive(ids("Hello"), of(-1))
    assert completion.receive(ids(" world", "a", "b"), of(-2, -3, -4)) == 2
    delta = completion.take()
    assert (delta.token_ids, delta.logprobs) == (ids("Hello", " world"), taken(-1, -2))


def test_what_waits_counts_logprobs(open_completion: Callable[..., Completion], ids: Ids) -> None:
    """They take more memory than their tokens, but are arrays until they are taken."""
    completion = open_completion()
    completion.receive(ids("a"))
    num_bytes = completion.num_waiting_bytes
    completion.take()
    completion.receive(ids("a"), of(-1, num_top=20))
    assert completion.num_waiting_bytes == num_bytes + 4 * (3 + 2 * 20)
    assert completion.take().logprobs == taken(-1, num_top=20)
    assert completion.num_waiting_bytes == 0


def test_logprobs_that_were_not_taken_keep_their_likeliest(
    open_completion: Callable[..., Completion], ids: Ids
) -> None:
    """The first delta ends before a token whose verdict is still to come."""
    completion = open_completion()
    completion.receive(ids("Hello", "cab"), of(-1, -2, num_top=3))
    assert completion.take().logprobs == taken(-1, num_top=3)
    completion.receive(ids("a"), of(-3, num_top=1))
    assert completion.take().logprobs == [*taken(-2, num_top=3), *taken(-3, num_top=1)]


def test_logprobs_of_another_number_of_tokens_are_a_bug(open_completion: Callable[..., Completion], ids: Ids) -> None:
    with pytest.raises(ValueError, match="2 logprobs came with 1 tokens"):
        open_completion().receive(ids("a"), of(-1, -2))
