"""Plans and results survive the wire, and what is not a plan is refused."""

import contextlib

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from albireo.errors import GroupError
from albireo.plan import (
    NewSequence,
    Rows,
    StepPlan,
    StepResult,
    decode_plan,
    decode_result,
    decode_rows,
    encode_plan,
    encode_result,
)
from albireo.v1 import frontend_pb2, generation_pb2, plan_pb2

int32s = hnp.arrays(np.int32, st.integers(0, 40), elements=st.integers(-(2**31), 2**31 - 1))
uint64 = st.integers(0, 2**64 - 1)
samplings = st.builds(
    plan_pb2.Sampling,
    temperature=st.floats(0, 100, width=32),
    top_p=st.floats(0, 1, width=32),
    top_k=st.integers(0, 2**32 - 1),
    seed=uint64,
    min_tokens=st.integers(0, 2**32 - 1),
    suppressed_token_ids=int32s.map(lambda values: values.tobytes()),
    min_p=st.floats(0, 1, width=32),
    bad_words=st.lists(int32s.map(lambda values: values.tobytes()), max_size=2),
    num_logprobs=st.none() | st.integers(0, 20),
)
new_sequences = st.builds(
    NewSequence,
    slot=st.integers(0, 2**31),
    token_ids=int32s,
    num_prompt_tokens=st.integers(0, 2**31),
    num_computed_tokens=st.integers(0, 2**31),
    block_table=int32s,
    sampling=samplings,
    num_prompt_logprobs=st.none() | st.integers(0, 2**32 - 1),
)


@st.composite
def all_rows(draw):
    slots = draw(int32s)
    num = len(slots)
    return Rows(
        slots,
        draw(hnp.arrays(np.int32, num, elements=st.integers(1, 4096))),
        draw(hnp.arrays(np.bool_, num)),
        draw(st.none() | hnp.arrays(np.bool_, num).filter(any)),
    )


@st.composite
def plans(draw):
    appends = draw(int32s)
    return StepPlan(
        epoch=draw(uint64),
        step_id=draw(uint64),
        rows=draw(st.none() | all_rows()),
        finished_slots=draw(int32s),
        new_sequences=tuple(draw(st.lists(new_sequences, max_size=3))),
        append_slots=appends,
        append_blocks=appends[::-1],
    )


def assert_same(left, right):
    """Equality of dataclasses that hold arrays."""
    assert type(left) is type(right)
    if isinstance(left, np.ndarray):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
    elif hasattr(left, "__dataclass_fields__"):
        for name in left.__dataclass_fields__:
            assert_same(getattr(left, name), getattr(right, name))
    elif isinstance(left, tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


@given(plans())
def test_a_plan_survives_the_wire(plan):
    assert_same(decode_plan(encode_plan(plan)), plan)


@given(uint64, uint64, int32s, st.integers(0, 2**63))
def test_a_result_survives_the_wire(epoch, step_id, token_ids, forward_ns):
    result = StepResult(epoch, step_id, token_ids, plan_pb2.StepTimings(forward_ns=forward_ns))
    assert_same(decode_result(encode_result(result)), result)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_plan_or_a_group_error(data):
    """What comes off the wire never raises anything else."""
    for decode in (decode_plan, decode_result):
        with contextlib.suppress(GroupError):
            decode(data)


def test_arrays_of_broken_length_are_refused():
    with pytest.raises(GroupError):
        decode_plan(plan_pb2.StepPlan(append_slots=b"\0\0\0\0\0").SerializeToString())
    with pytest.raises(GroupError, match="differ in length"):
        decode_plan(plan_pb2.StepPlan(append_slots=bytes(8), append_blocks=bytes(4)).SerializeToString())
    with pytest.raises(GroupError, match="differ in length"):
        decode_plan(plan_pb2.StepPlan(row_slots=bytes(8), row_num_scheduled_tokens=bytes(8)).SerializeToString())


def test_a_steady_decode_plan_is_tiny():
    """Without joins, leaves or appends a plan is an epoch and a step id."""
    assert len(encode_plan(StepPlan(epoch=1, step_id=1000, rows=None))) < 8
    assert decode_plan(encode_plan(StepPlan(epoch=1, step_id=1000, rows=None))).rows is None


def test_decode_rows_are_recognised():
    slots = np.array([3, 1, 2], dtype=np.int32)
    assert decode_rows(slots).is_decode_of(slots)
    assert not decode_rows(slots).is_decode_of(slots[::-1])
    assert not decode_rows(slots).is_decode_of(slots[:2])
    assert not Rows(slots, np.array([1, 2, 1], dtype=np.int32), np.ones(3, dtype=bool)).is_decode_of(slots)


@given(
    st.builds(
        frontend_pb2.Submit,
        sequence_id=uint64,
        request_id=st.text(max_size=20),
        token_ids=st.binary(max_size=40),
        max_tokens=st.integers(0, 2**32 - 1),
        sampling=samplings,
        priority=st.integers(-(2**31), 2**31 - 1),
    )
)
def test_a_front_end_message_survives_the_wire(submit):
    message = frontend_pb2.FrontendMessage(submits=[submit], cancels=[submit.sequence_id])
    assert frontend_pb2.FrontendMessage.FromString(message.SerializeToString()) == message


@given(st.integers(0, 2**32 - 1), st.floats(width=32, allow_nan=False), st.lists(st.text(max_size=9), max_size=4))
def test_absent_and_zero_sampling_values_differ_on_the_wire(top_k, temperature, stop):
    """A client's temperature 0 is a choice; its absence is not."""
    params = generation_pb2.SamplingParams(temperature=temperature, top_k=top_k, stop=stop)
    back = generation_pb2.SamplingParams.FromString(params.SerializeToString())
    assert back == params
    assert back.HasField("temperature")
    assert not back.HasField("top_p")
