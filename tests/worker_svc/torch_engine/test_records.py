"""Records: one integer order of values and ids, exact at any id."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from worker_svc.torch_engine.sampling.records import (
    NO_RECORD,
    ids_of,
    local_best,
    local_noisy_best,
    local_top,
    make_records,
    values_of,
)

values = st.floats(width=32) | st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, 2.0**-149, -(2.0**-149)])
ids = st.integers(0, 2**31 - 1) | st.integers(2**24, 2**24 + 4)


@given(st.lists(st.tuples(values, ids), min_size=1, max_size=20))
def test_records_sort_by_value_descending_and_id_ascending(pairs: list[tuple[float, int]]) -> None:
    """-0 is 0 and NaN is -inf; ids past 2^24, where float32 rounds them, come back whole."""
    records = make_records(torch.tensor([value for value, _ in pairs]), torch.tensor([token for _, token in pairs]))
    clean = [(-math.inf if math.isnan(value) else value + 0.0, token) for value, token in pairs]
    assert list(zip(values_of(records).tolist(), ids_of(records).tolist(), strict=True)) == clean
    expected = sorted(clean, key=lambda pair: (-pair[0], pair[1]))
    records = records.sort(descending=True).values
    assert list(zip(values_of(records).tolist(), ids_of(records).tolist(), strict=True)) == expected
    assert records.min() > NO_RECORD


def test_no_record_is_no_token() -> None:
    nothing = torch.tensor([NO_RECORD])
    assert values_of(nothing).isnan().all()
    assert ids_of(nothing).item() >= 2**31


def test_an_empty_shard_sends_no_records() -> None:
    """As many as any other."""
    logits, ones, keys = torch.zeros(2, 0), torch.ones(2), torch.zeros(2, dtype=torch.int64)
    assert local_best(logits, 7).tolist() == [NO_RECORD] * 2
    assert local_noisy_best(logits, 7, ones, keys, keys).tolist() == [NO_RECORD] * 2
    assert local_top(logits, 7, ones, 3).tolist() == [[NO_RECORD] * 3] * 2


@pytest.mark.parametrize("first_id", [0, 2**24 + 1])
def test_what_a_shard_sends(first_id: int) -> None:
    logits = torch.tensor([[1.0, 3.0, torch.nan, 3.0, -0.0, 0.0]])
    best, top = local_best(logits, first_id), local_top(logits, first_id, torch.tensor([0.5]), 8)
    assert (values_of(best).item(), ids_of(best).item()) == (3.0, first_id + 1)
    assert (ids_of(top[0, :6]) - first_id).tolist() == [1, 3, 0, 4, 5, 2]
    assert values_of(top[0, :6]).tolist() == [6.0, 6.0, 2.0, 0.0, 0.0, -torch.inf]
    assert top[0, 6:].tolist() == [NO_RECORD] * 2
