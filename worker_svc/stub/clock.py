"""The stub's clock: a time line on which a group's modelled device runs its steps one after the other.

A step starts at max(end of the step before, arrival of its plan on every rank) and ends when its modelled time is over.
Both are worked out, not measured: how late this process wakes up is no part of them.

Ranks share the line through a file in memory, made anew for each meeting. A rank stamps each step when it is launched;
the leader alone waits until a step's end, sees whether everyone's stamp is there, and publishes when the step ran.
Other ranks read that later.

Layout, in native int64 words: a ring of (number, start, end), written by the leader; then for each rank a ring of
(number, ready). Steps are numbered from 1. A cell belongs to the step whose number it bears, which is written last.
"""

import mmap
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from albireo.errors import GroupError

_RING = 1024  # steps; the leader's plan stream bounds how many are under way to far less
_SPAN_WORDS = 3
_STAMP_WORDS = 2
_PEER_TIMEOUT_NS = 3_000_000_000
_POLL_NS = 1_000_000
_LAG_NS = 50_000_000


@dataclass(frozen=True, slots=True)
class Launched:
    """A step on its way: its number in the group, and when its plan was ready on this rank."""

    number: int
    ready_ns: int


@dataclass(frozen=True, slots=True)
class Span:
    """When a step ran, CLOCK_MONOTONIC; 0 and 0 when that has been forgotten."""

    start_ns: int
    end_ns: int


class Clock:
    """One rank's view of the line. `launch` and `finish` may be called by a thread each, `abort` by any.

    Args:
        may_lag: a rank that is not the leader may learn 50 ms late, and of many steps at once, when they ran.
    """

    def __init__(self, run_dir: Path, rank: int, tp_size: int, may_lag: bool) -> None:
        self._run_dir = run_dir
        self._rank = rank
        self._tp_size = tp_size
        self._lag_ns = _LAG_NS if may_lag else _POLL_NS
        self._words = memoryview(b"").cast("q")
        self._file: mmap.mmap | None = None
        self._num_launched = 0
        self._last_end_ns = 0
        self._not_aborted = threading.Lock()  # held; a wait for it costs a fraction of one for an event
        self._not_aborted.acquire()

    def join(self, meeting: int) -> None:
        """Shares the line of the group that meets under this number. Every rank may be the first."""
        path = self._run_dir / f"clock-{meeting:016x}"
        if self._rank == 0:
            for leftover in self._run_dir.glob("clock-*"):
                if leftover != path:
                    leftover.unlink(missing_ok=True)
        size = 8 * _RING * (_SPAN_WORDS + self._tp_size * _STAMP_WORDS)
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "rb+") as file:
            os.ftruncate(file.fileno(), size)  # to the same size by all: what is there stays
            self._file = mmap.mmap(file.fileno(), size)
        self._words = memoryview(self._file).cast("q")
        self._num_launched = self._last_end_ns = 0

    def launch(self) -> Launched:
        """The next step is ready on this rank."""
        self._num_launched += 1
        launched = Launched(self._num_launched, time.monotonic_ns())
        place = self._stamp_place(self._rank, launched.number)
        self._words[place + 1] = launched.ready_ns
        self._words[place] = launched.number
        return launched

    def finish(self, step: Launched, duration_ns: int) -> Span:
        """Waits until a step is over; called in the order of the steps. GroupError: aborted, or a peer is missing."""
        span = self._lead(step, duration_ns) if self._rank == 0 else self._follow(step, duration_ns)
        self._last_end_ns = span.end_ns
        return span

    def abort(self) -> None:
        """Ends every wait, now or later, until `leave`."""
        if self._not_aborted.locked():
            self._not_aborted.release()

    def leave(self) -> None:
        self._words.release()
        self._words = memoryview(b"").cast("q")
        if self._file is not None:
            self._file.close()
            self._file = None
        self._not_aborted.acquire(blocking=False)

    def _lead(self, step: Launched, duration_ns: int) -> Span:
        start_ns = max(self._last_end_ns, step.ready_ns)
        self._sleep_until(start_ns + duration_ns)
        for rank in range(1, self._tp_size):
            start_ns = max(start_ns, self._wait_for_stamp(rank, step.number))
        self._sleep_until(start_ns + duration_ns)
        place = self._span_place(step.number)
        self._words[place + 1] = start_ns
        self._words[place + 2] = start_ns + duration_ns
        self._words[place] = step.number
        return Span(start_ns, start_ns + duration_ns)

    def _wait_for_stamp(self, rank: int, number: int) -> int:
        place = self._stamp_place(rank, number)
        deadline_ns = 0
        while self._words[place] != number:
            now_ns = time.monotonic_ns()
            deadline_ns = deadline_ns or now_ns + _PEER_TIMEOUT_NS
            if now_ns > deadline_ns:
                raise GroupError(f"rank {rank} has not launched step {number} of the group")
            self._sleep_until(now_ns + _POLL_NS)
        return self._words[place + 1]

    def _follow(self, step: Launched, duration_ns: int) -> Span:
        place = self._span_place(step.number)
        expected_end_ns = max(self._last_end_ns, step.ready_ns) + duration_ns
        while self._words[place] < step.number:
            now_ns = time.monotonic_ns()
            if now_ns > expected_end_ns + _PEER_TIMEOUT_NS:
                raise GroupError(f"the leader has not finished step {step.number} of the group")
            self._sleep_until(max(expected_end_ns, now_ns) + self._lag_ns)
        span = Span(self._words[place + 1], self._words[place + 2])
        return span if self._words[place] == step.number else Span(0, 0)

    def _sleep_until(self, at_ns: int) -> None:
        while True:
            left_ns = at_ns - time.monotonic_ns()
            if self._not_aborted.acquire(timeout=max(0, left_ns) / 1e9):
                self._not_aborted.release()
                raise GroupError("the group's clock is aborted")
            if left_ns <= 0:
                return

    def _span_place(self, number: int) -> int:
        return number % _RING * _SPAN_WORDS

    def _stamp_place(self, rank: int, number: int) -> int:
        return _RING * _SPAN_WORDS + (rank * _RING + number % _RING) * _STAMP_WORDS
