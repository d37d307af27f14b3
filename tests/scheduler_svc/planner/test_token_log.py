"""The token log against lists."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler_svc.planner.token_log import TokenLog


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.sets(st.integers(0, 4)), st.integers(0, 4)), max_size=150))
def test_each_slot_gets_its_own_tokens_back_in_their_order(steps: list[set[int] | int]) -> None:
    """A set: these slots sample. A number: that slot changes hands."""
    log = TokenLog(max_num_seqs=5, max_model_len=150)
    expected: list[list[int]] = [[] for _ in range(5)]
    for number, step in enumerate(steps):
        if isinstance(step, int):
            assert log.pop(step).tolist() == expected[step]
            expected[step] = []
            continue
        slots = sorted(step)
        log.add(np.array(slots, dtype=np.int64), np.array([10 * number + slot for slot in slots], dtype=np.int32))
        for slot in slots:
            expected[slot].append(10 * number + slot)
        assert [log.num_tokens(slot) for slot in range(5)] == [len(tokens) for tokens in expected]
    assert [log.pop(slot).tolist() for slot in range(5)] == expected
    assert [log.num_tokens(slot) for slot in range(5)] == [0] * 5
