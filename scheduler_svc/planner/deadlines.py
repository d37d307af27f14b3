"""Deadlines: what cannot be met is refused before it costs anything, what has passed is dropped."""

import heapq

from scheduler_svc.planner.sequence import Sequence
from scheduler_svc.planner.state import PlannerState, end


def watch_deadline(state: PlannerState, sequence: Sequence, least_ns: int) -> None:
    """``sequence`` has a deadline and takes ``least_ns`` once it starts."""
    key = sequence.frontend, sequence.sequence_id
    heapq.heappush(state.deadlines, (sequence.deadline_ns - least_ns, *key))
    heapq.heappush(state.deadlines, (sequence.deadline_ns, *key))
    if len(state.deadlines) > 4 * len(state.sequences) + 1024:  # mostly of sequences that ended in time
        state.deadlines = [each for each in state.deadlines if each[1:] in state.sequences]
        heapq.heapify(state.deadlines)


def drop_overdue(state: PlannerState, now_ns: int) -> list[Sequence]:
    """Ends, and returns, the sequences whose deadline has passed, and those that have never run and now would be late
    even if they started at once."""
    overdue = []
    while state.deadlines and state.deadlines[0][0] <= now_ns:
        _, frontend, sequence_id = heapq.heappop(state.deadlines)
        sequence = state.sequences.get((frontend, sequence_id))
        if sequence is None:
            continue
        if sequence.deadline_ns <= now_ns or not sequence.has_begun:
            end(state, sequence)
            overdue.append(sequence)
    return overdue
