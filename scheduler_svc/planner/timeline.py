"""When each step was planned, committed and delivered: the planner's rows of the ledger."""

import time
from collections import deque
from dataclasses import dataclass

from albireo.ledger import PLANNER_COLUMNS, Ledger


@dataclass(slots=True)
class _Step:
    step_id: int
    plan_start_ns: int
    plan_end_ns: int
    num_rows: int
    num_tokens: int
    result_ns: int = 0
    commit_start_ns: int = 0
    commit_end_ns: int = 0


class Timeline:
    """Follows steps through the turns of the step loop. A row is written when its step's tokens have been delivered.

    Work on steps happens inside turns only; the CPU time of the turns since the last row goes to the next one.
    """

    def __init__(self) -> None:
        self.ledger = Ledger("planner", PLANNER_COLUMNS)
        self._in_flight: deque[_Step] = deque()
        self._committed: list[_Step] = []
        self._turn_cpu_start_ns = 0
        self._cpu_ns = 0

    def begin_turn(self) -> None:
        self._turn_cpu_start_ns = time.thread_time_ns()

    def planned(self, step_id: int, start_ns: int, num_rows: int, num_tokens: int) -> None:
        """Step ``step_id`` has just been handed to the plan stream; planning began at ``start_ns``."""
        self._in_flight.append(_Step(step_id, start_ns, time.monotonic_ns(), num_rows, num_tokens))

    def committed(self, result_ns: int, start_ns: int) -> None:
        """The oldest step in flight has just been committed."""
        step = self._in_flight.popleft()
        step.result_ns, step.commit_start_ns, step.commit_end_ns = result_ns, start_ns, time.monotonic_ns()
        self._committed.append(step)

    def end_turn(self, deliver_start_ns: int) -> None:
        """The tokens of this turn's steps have just been delivered."""
        self._cpu_ns += time.thread_time_ns() - self._turn_cpu_start_ns
        if not self._committed:
            return
        now_ns = time.monotonic_ns()
        for step in self._committed:
            self.ledger.add(
                step.step_id,
                step.plan_start_ns,
                step.plan_end_ns,
                step.result_ns,
                step.commit_start_ns,
                step.commit_end_ns,
                deliver_start_ns,
                now_ns,
                self._cpu_ns,
                step.num_rows,
                step.num_tokens,
            )
            self._cpu_ns = 0
        self._committed.clear()

    def forget_steps(self) -> None:
        """The group was lost: nothing is in flight."""
        self._in_flight.clear()
