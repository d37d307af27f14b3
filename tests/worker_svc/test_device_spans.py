"""Stays in slots, as the leader tells them from plans."""

import asyncio

import numpy as np

from albireo.plan import NewSequence, StepPlan
from albireo.v1 import plan_pb2
from span_recorder import SpanRecorder
from worker_svc import device_spans
from worker_svc.device_spans import DeviceSpans

NO_IDS = np.zeros(0, dtype=np.int32)


def plan(step_id: int, starts: dict[int, str] | None = None, frees: tuple[int, ...] = (), epoch: int = 1) -> StepPlan:
    """``starts``: trace contexts by slot."""
    new = (
        [NewSequence(slot, NO_IDS, 1, 0, NO_IDS, plan_pb2.Sampling(), None, trace) for slot, trace in starts.items()]
        if starts
        else []
    )
    return StepPlan(epoch, step_id, None, np.array(frees, dtype=np.int32), tuple(new))


def stays(recorder: SpanRecorder) -> list[tuple[str, int, int, int, int]]:
    """Whose, from when to when, from which step to which."""
    return [
        (
            span.trace_parent,
            span.start_ns,
            span.end_ns,
            span.attributes["albireo.first_step_id"],
            span.attributes["albireo.last_step_id"],
        )
        for span in recorder.spans
    ]


def test_a_slot_may_change_hands_within_a_plan() -> None:
    recorder = SpanRecorder()
    spans = DeviceSpans(recorder)
    spans.planned(plan(0, {3: "a", 4: ""}), 100)
    spans.planned(plan(1), 200)
    spans.planned(plan(2, {3: "b"}, frees=(3, 4)), 300)
    assert stays(recorder) == [("a", 100, 300, 0, 1)]
    spans.planned(plan(3, frees=(3,)), 400)
    assert stays(recorder)[1:] == [("b", 300, 400, 2, 2)]


def test_a_new_epoch_ends_all_stays() -> None:
    recorder = SpanRecorder()
    spans = DeviceSpans(recorder)
    spans.planned(plan(7, {0: "a", 1: "b"}), 100)
    spans.planned(plan(0, {0: "a"}, epoch=2), 200)
    assert stays(recorder) == [("a", 100, 200, 7, 7), ("b", 100, 200, 7, 7)]


async def idle() -> None:
    """So long that what waits for that has happened: timers run in order."""
    over = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(device_spans._IDLE_S, over.set_result, None)
    await over


async def test_stays_end_with_the_last_step_when_no_plan_follows() -> None:
    """And not while one does."""
    recorder = SpanRecorder()
    spans = DeviceSpans(recorder)
    spans.planned(plan(0, {0: "a"}), 100)
    spans.ran(0)
    spans.planned(plan(1), 200)
    await idle()
    assert not recorder.spans
    spans.ran(1)
    await idle()
    assert [(trace, first, last) for trace, _, _, first, last in stays(recorder)] == [("a", 0, 1)]
    spans.planned(plan(2, frees=(0,)), 300)
    assert len(recorder.spans) == 1
