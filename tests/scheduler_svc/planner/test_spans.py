"""What a sequence has been through, by its time stamps."""

import dataclasses

import numpy as np
import pytest

from albireo.v1 import plan_pb2
from scheduler_svc.planner.sequence import Place, Sequence
from scheduler_svc.planner.spans import phases


def sequence(num_outputs: int, scheduled_ns: int, first_token_ns: int) -> Sequence:
    made = Sequence(0, 1, "label", np.zeros(2 + num_outputs, np.int32), 2, 9, plan_pb2.Sampling(), Place(0, 0))
    return dataclasses.replace(made, submitted_ns=10, scheduled_ns=scheduled_ns, first_token_ns=first_token_ns)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ((0, 0, 0), [("queue", 10, 99)]),
        ((0, 20, 0), [("queue", 10, 20), ("prefill", 20, 99)]),
        ((3, 20, 30), [("queue", 10, 20), ("prefill", 20, 30), ("decode", 30, 99)]),
        ((3, 20, 0), [("queue", 10, 20), ("decode", 20, 99)]),
    ],
    ids=["never ran", "no token", "whole", "from another planner"],
)
def test_phases_follow_on_from_each_other(times: tuple[int, int, int], expected: list[tuple[str, int, int]]) -> None:
    assert phases(sequence(*times), 99) == expected
