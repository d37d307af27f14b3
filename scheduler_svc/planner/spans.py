"""Spans of the planner's part in traced sequences: `queue`, `prefill` and `decode`, children of the request's span."""

from albireo.tracing import Attributes, Event, Tracer
from scheduler_svc.planner.sequence import Sequence
from scheduler_svc.planner.state import PlannerState

PREEMPTED = "preempted"


class SequenceSpans:
    """Of one planner."""

    def __init__(self, tracer: Tracer, state: PlannerState) -> None:
        self._tracer = tracer
        self._state = state
        self._ended = state.traced_ends = []
        self._num_preemptions = state.num_preemptions
        self._preempted_ns: dict[Sequence, list[int]] = {}

    def keep_up(self, now_ns: int) -> None:
        """Notes who was preempted since the last call, and records the spans of sequences that have ended since."""
        if self._state.num_preemptions != self._num_preemptions:
            self._num_preemptions = self._state.num_preemptions
            self._note_preemptions(now_ns)
        while self._ended:
            self._record(self._ended.pop(), now_ns)

    def _note_preemptions(self, now_ns: int) -> None:
        for sequence in self._state.sequences.values():
            if sequence.trace_parent and sequence.num_preemptions:
                times_ns = self._preempted_ns.setdefault(sequence, [])
                times_ns += [now_ns] * (sequence.num_preemptions - len(times_ns))

    def _record(self, sequence: Sequence, end_ns: int) -> None:
        preempted_ns = self._preempted_ns.pop(sequence, [])
        attributes: Attributes = {"albireo.sequence_id": sequence.sequence_id}
        for name, start_ns, stop_ns in phases(sequence, end_ns):
            events: list[Event] = [(PREEMPTED, at_ns) for at_ns in preempted_ns if start_ns <= at_ns < stop_ns]
            self._tracer.record(name, sequence.trace_parent, start_ns, stop_ns, attributes, events)


def phases(sequence: Sequence, end_ns: int) -> list[tuple[str, int, int]]:
    """What a sequence has been through: (name, begin, end), each beginning where the one before ends.

    One that came with output from another planner has its first token behind it, and decodes once it has a slot.
    """
    scheduled_ns, first_token_ns = sequence.scheduled_ns, sequence.first_token_ns
    if not scheduled_ns:
        return [("queue", sequence.submitted_ns, end_ns)]
    queue = ("queue", sequence.submitted_ns, scheduled_ns)
    if not first_token_ns:
        return [queue, ("decode" if sequence.has_output else "prefill", scheduled_ns, end_ns)]
    return [queue, ("prefill", scheduled_ns, first_token_ns), ("decode", first_token_ns, end_ns)]
