"""Transfers and their results survive the wire, and what is none is refused."""

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from albireo.arrays import EMPTY_INT32, pack_int32
from albireo.errors import GroupError
from albireo.plan import (
    StepPlan,
    decode_plan,
    decode_result,
    decode_rows,
    encode_plan,
    encode_result,
    transfers_result,
)
from albireo.transfers import KvLease, Transfer, TransferKind, TransferResult
from albireo.v1 import plan_pb2

uint64 = st.integers(0, 2**64 - 1)
leases = st.builds(KvLease, st.binary(min_size=16, max_size=16), uint64, uint64)


@st.composite
def transfers(draw: st.DrawFn) -> Transfer:
    num_blocks, num_parts = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    return Transfer(
        draw(uint64),
        draw(st.sampled_from(TransferKind)),
        draw(hnp.arrays(np.int32, num_blocks)),
        tuple(draw(st.binary(min_size=32, max_size=32)) for _ in range(num_blocks)),
        draw(hnp.arrays(np.uint64, (num_blocks, num_parts))),
        draw(st.integers(-(2**63), 2**63 - 1)),
        draw(leases),
    )


@given(st.lists(transfers(), min_size=1, max_size=3), st.booleans())
def test_a_plan_s_transfers(sent: list[Transfer], only_transfers: bool):
    plan = StepPlan(3, 4, None, EMPTY_INT32, transfers=tuple(sent), only_transfers=only_transfers)
    decoded = decode_plan(encode_plan(plan))
    assert (decoded.step_id, decoded.only_transfers) == (4, only_transfers)
    for got, expected in zip(decoded.transfers, sent, strict=True):
        for name in Transfer._fields:
            assert np.array_equal(getattr(got, name), getattr(expected, name)), name


@pytest.mark.parametrize("fields", [{"rows": decode_rows(EMPTY_INT32)}, {"finished_slots": np.array([1], np.int32)}])
def test_a_plan_of_transfers_alone_has_nothing_else(fields: dict):
    plan = StepPlan(3, 4, None, EMPTY_INT32, only_transfers=True)
    assert decode_plan(encode_plan(plan)).only_transfers
    with pytest.raises(GroupError, match="step 4: a plan of transfers alone has more"):
        decode_plan(encode_plan(plan._replace(**fields)))


@given(hnp.arrays(np.bool_, st.integers(0, 40)), uint64, uint64)
def test_a_result_s_transfers(succeeded: np.ndarray, num_bytes: int, duration_ns: int):
    result = decode_result(encode_result(transfers_result(7, (TransferResult(5, succeeded, num_bytes, duration_ns),))))
    assert (result.epoch, result.only_transfers) == (7, True)
    (got,) = result.transfers
    assert got.succeeded.tolist() == succeeded.tolist()
    assert (got.transfer_id, got.num_bytes, got.duration_ns) == (5, num_bytes, duration_ns)


@pytest.mark.parametrize(
    "fields",
    [
        {"hashes": bytes(63)},
        {"hashes": bytes(96)},
        {"offsets": bytes(8 * 3)},
        {"offsets": bytes(7)},
        {"blocks": b""},
        {"blocks": bytes(5)},
        {"kind": 0},
        {"kind": 9},
    ],
)
def test_what_is_no_transfer_is_no_plan(fields: dict[str, object]):
    good = {"kind": 1, "blocks": pack_int32([1, 2]), "hashes": bytes(64), "offsets": bytes(8 * 4)}
    for given_fields, is_plan in ((good, True), (good | fields, False)):
        message = plan_pb2.StepPlan(epoch=1, transfers=[plan_pb2.Transfer(**given_fields)], only_transfers=True)
        if is_plan:
            assert decode_plan(message.SerializeToString()).transfers[0].offsets.shape == (2, 2)
        else:
            with pytest.raises(GroupError, match="not a step plan"):
                decode_plan(message.SerializeToString())
