"""Spans of traced sequences on the device: `device`, one for each stay in a slot. Used on the leader's I/O thread."""

import asyncio
import time
from dataclasses import dataclass

from albireo.plan import StepPlan
from albireo.tracing import Tracer

# A planner plans as long as anything can run. Where no plan has followed for so long, nobody is in a slot any more,
# though only the next plan will say so.
_IDLE_S = 0.5


@dataclass(frozen=True, slots=True)
class _Stay:
    trace_parent: str
    first_step_id: int
    start_ns: int


class DeviceSpans:
    """A stay begins when the plan that starts its sequence arrives, and ends when the plan that frees its slot does."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._stays: dict[int, _Stay] = {}  # by slot
        self._epoch = self._last_step_id = 0

    def planned(self, plan: StepPlan, now_ns: int) -> None:
        """The plan of a step has arrived."""
        if self._stays:
            slots = list(self._stays) if plan.epoch != self._epoch else plan.finished_slots.tolist()
            self._end(slots, now_ns)
        self._epoch, self._last_step_id = plan.epoch, plan.step_id
        for new in plan.new_sequences:
            if new.trace_parent:
                self._stays[new.slot] = _Stay(new.trace_parent, plan.step_id, now_ns)

    def ran(self, step_id: int) -> None:
        """A step has run."""
        if self._stays and step_id == self._last_step_id:
            now_ns = time.monotonic_ns()
            asyncio.get_running_loop().call_later(_IDLE_S, self._end_if_idle, self._epoch, step_id, now_ns)

    def _end_if_idle(self, epoch: int, step_id: int, ran_ns: int) -> None:
        if (epoch, step_id) == (self._epoch, self._last_step_id):
            self._end(list(self._stays), ran_ns)

    def _end(self, slots: list[int], end_ns: int) -> None:
        for slot in slots:
            stay = self._stays.pop(slot, None)
            if stay is None:
                continue
            attributes = {
                "albireo.slot": slot,
                "albireo.epoch": self._epoch,
                "albireo.first_step_id": stay.first_step_id,
                "albireo.last_step_id": self._last_step_id,
            }
            self._tracer.record("device", stay.trace_parent, stay.start_ns, end_ns, attributes)
