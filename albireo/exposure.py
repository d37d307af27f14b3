"""What of each task the device had to wait for, worked out from ledger pages.

A *period* of a rank's device is the time from the end of one step to the end of the next: an idle gap, then work.

    planner      [T5][T1 n+1]
    I/O thread               [T2 n+1]
    device   T3 n |............gap.......| T3 n+1 ... T4 n+1 |
                  <------------------ period ---------------->

A task is *exposed* where it lies in a gap and *hidden* elsewhere; what no task covers of a gap is *transport*: wires,
wake-ups, waiting for another rank. T3 and T4 are exposed wholly, because the device does them; of the transfers of KV
blocks that part which makes a step longer than T3 and T4. So, where tasks do not work in a gap at the same time,
all exposed times add up to the period.

Sources: the five tasks and the non-scalable fraction are Albireo's (arXiv 2606.01927); the columns are those of
`albireo.ledger`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from albireo.arrays import BoolArray, Float64Array, Int64Array
from albireo.ledger import rows_of
from albireo.v1 import ledger_pb2

Interval = tuple[Int64Array, Int64Array]  # starts [n], ends [n]

# Their exposed times make up the period.
TASKS = ("T1", "T2", "T3", "T4", "T5", "KV", "transport")


@dataclass(frozen=True)
class Page:
    """A process's rows, oldest first; columns are [rows] int64, the first one grows from row to row."""

    process: str
    clock: str
    columns: Mapping[str, Int64Array]

    def __getitem__(self, name: str) -> Int64Array:
        return self.columns[name]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    @property
    def is_planner(self) -> bool:
        return "plan_start_at_ns" in self.columns

    @property
    def is_rank(self) -> bool:
        return "forward_ns" in self.columns

    @property
    def is_frontend(self) -> bool:
        return "dispatched_at_ns" in self.columns

    def select(self, rows: BoolArray) -> "Page":
        return Page(self.process, self.clock, {name: column[rows] for name, column in self.columns.items()})

    def joined(self, newer: "Page") -> "Page":
        """These rows, then those of ``newer``, a later page of the same process, which are not among them."""
        if not len(self) or not len(newer):
            return newer if len(newer) else self
        key = next(iter(self.columns))
        new = newer.select(newer[key] > self[key][-1])
        columns = {name: np.concatenate((column, new[name])) for name, column in self.columns.items()}
        return Page(self.process, self.clock, columns)


@dataclass(frozen=True)
class TaskTime:
    """Of one task, microseconds per step."""

    total_us: float
    total_p50_us: float
    exposed_us: float
    exposed_p50_us: float


@dataclass(frozen=True)
class Spread:
    """Of one duration, microseconds."""

    p50_us: float
    p99_us: float
    max_us: float


@dataclass(frozen=True)
class RankExposure:
    """One rank's steps.

    Attributes:
        step_us: mean period.
        idle_fraction: of the time from the first start to the last end, what the gaps take.
        non_scalable_fraction: of the same time, what the gaps, T4 and exposed KV transfers take: everything but T3.
        periods: of the steps whose gap is known.
        gaps: before each step; most are 0 where all is hidden.
        launch_delay: from a plan's arrival to its launch; with plans in flight this contains the wait for the device.
        collective_us: mean per step; a part of T3.
        tasks: by the names in `TASKS`.
    """

    process: str
    num_steps: int
    step_us: float
    idle_fraction: float
    non_scalable_fraction: float
    periods: Spread
    gaps: Spread
    launch_delay: Spread
    collective_us: float
    tasks: Mapping[str, TaskTime]


class Coverage:
    """How much of any stretch of time a set of intervals covers; where they overlap, that counts once.

    Args:
        starts, ends: [n], in any order; empty intervals and those that did not happen (0) are left out.
    """

    def __init__(self, starts: npt.ArrayLike, ends: npt.ArrayLike) -> None:
        starts, ends = np.asarray(starts, dtype=np.int64), np.asarray(ends, dtype=np.int64)
        happened = (starts > 0) & (ends > starts)
        starts, ends = starts[happened], ends[happened]
        order = np.argsort(starts, kind="stable")
        starts, ends = starts[order], np.maximum.accumulate(ends[order])
        # An interval that begins after all ends before it opens a new stretch of the union.
        opens = np.concatenate((np.ones(min(1, len(starts)), dtype=bool), starts[1:] > ends[:-1]))
        closes = np.concatenate((opens[1:], np.ones(min(1, len(starts)), dtype=bool)))
        lengths = ends[closes] - starts[opens]
        covered = np.cumsum(lengths)
        self._times = np.stack((starts[opens], ends[closes]), axis=1).reshape(-1)
        self._covered = np.stack((covered - lengths, covered), axis=1).reshape(-1)

    def within(self, starts: Int64Array, ends: Int64Array) -> Float64Array:
        """[n] starts and ends of stretches -> [n], how much of each is covered."""
        if not len(self._times):
            return np.zeros(len(starts))
        first = self._times[0]  # float64 holds nanoseconds exactly for 104 days only
        times = (self._times - first).astype(np.float64)
        until_end = np.interp((ends - first).astype(np.float64), times, self._covered)
        covered: Float64Array = until_end - np.interp((starts - first).astype(np.float64), times, self._covered)
        return covered


def read_pages(pages: Iterable[ledger_pb2.LedgerPage]) -> list[Page]:
    """Decodes pages; those of other hosts are moved to the clock of the planner (`aligned`).

    Raises ValueError when one is none.
    """
    return aligned([Page(page.process, page.clock, rows_of(page)) for page in pages])


def aligned(pages: Sequence[Page]) -> list[Page]:
    """Puts all times on the clock of the planner, or of the first page.

    The ranks of a group start a step together, so a clock is moved until the first step that both sides know starts at
    the same time; without a rank on the planner's host, until that step's plan arrives when it left. Pages of another
    clock that know no step (front ends) move with their host's ranks, or are left out.
    """
    reference = next((page for page in pages if page.is_planner), pages[0] if pages else None)
    if reference is None:
        return []
    home = [page for page in pages if page.clock == reference.clock]
    offsets = {reference.clock: 0}
    for page in pages:
        if page.is_rank and page.clock not in offsets and (offset := _offset(page, home)) is not None:
            offsets[page.clock] = offset
    return [_moved(page, offsets[page.clock]) for page in pages if page.clock in offsets]


def analyse(
    pages: Sequence[Page], first_step: int = 0, last_step: int | None = None, prepares_in_launch: bool = False
) -> list[RankExposure]:
    """Every rank's exposure over the steps that it and the planner know.

    Args:
        pages: of the planner, its ranks and front ends, on one clock. Without a planner, T1 and T5 are transport.
        first_step, last_step: step ids; between them there must have been work all the time, for gaps without work
            would count as idle.
        prepares_in_launch: the engine prepares inputs between launch and start, which then is T2; otherwise what lies
            between them is waiting.
    Raises:
        ValueError: no rank has a step in the range.
    """
    planners = [page for page in pages if page.is_planner]
    shared = {
        "T1": _intervals(planners, ("plan_start_at_ns", "plan_end_at_ns")),
        "T5": [
            *_intervals(planners, ("commit_start_at_ns", "commit_end_at_ns")),
            *_intervals(planners, ("deliver_start_at_ns", "deliver_end_at_ns")),
            *_intervals([page for page in pages if page.is_frontend], ("received_at_ns", "dispatched_at_ns")),
        ],
    }
    exposures = []
    for page in pages:
        if not page.is_rank:
            continue
        rows = (page["start_at_ns"] > 0) & (page["end_at_ns"] > 0) & (page["step_id"] >= first_step)
        rows &= page["step_id"] <= last_step if last_step is not None else True
        for planner in planners:
            rows &= np.isin(page["step_id"], planner["step_id"])
        if rows.any():
            exposures.append(_analyse_rank(page.select(rows), shared, prepares_in_launch))
    if not exposures:
        raise ValueError("no rank has a step that the planner knows, too")
    return exposures


def _analyse_rank(page: Page, shared: Mapping[str, Sequence[Interval]], prepares_in_launch: bool) -> RankExposure:
    """``page`` holds the steps to be analysed, at least one; ``shared`` the intervals of the other processes' tasks."""
    starts, ends = page["start_at_ns"], np.maximum.accumulate(page["end_at_ns"])
    # The first step, and one after missing rows, has no known gap: its period begins with its start.
    follows = np.concatenate(([False], np.diff(page["step_id"]) == 1))
    since = np.where(follows, np.concatenate((ends[:1], ends[:-1])), starts)
    gap_ends = np.maximum(since, starts)
    gaps = gap_ends - since
    periods = ends - since

    own = [(page["received_at_ns"], page["prepared_at_ns"])]
    if prepares_in_launch:
        own.append((np.maximum(page["launched_at_ns"], since), starts))
    tasks: dict[str, tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]] = {}
    for name, intervals in {**shared, "T2": own}.items():
        each = [Coverage(*interval) for interval in intervals]
        total = sum((coverage.within(since, ends) for coverage in each), np.zeros(len(page)))
        tasks[name] = (total, _union(intervals).within(since, gap_ends))
    everything = _union([interval for intervals in (*shared.values(), own) for interval in intervals])
    transport = gaps - everything.within(since, gap_ends)
    kv_exposed = np.clip(ends - gap_ends - page["forward_ns"] - page["sample_ns"], 0, page["kv_ns"])
    tasks |= {
        "T3": (page["forward_ns"], page["forward_ns"]),
        "T4": (page["sample_ns"], page["sample_ns"]),
        "KV": (page["kv_ns"], kv_exposed),
        "transport": (transport, transport),
    }
    elapsed = max(1, int(periods.sum()))
    not_scaling = gaps + page["sample_ns"] + kv_exposed
    return RankExposure(
        process=page.process,
        num_steps=len(page),
        step_us=float(periods.mean()) / 1e3,
        idle_fraction=float(gaps.sum()) / elapsed,
        non_scalable_fraction=min(1.0, float(not_scaling.sum()) / elapsed),
        periods=_spread(periods[follows]),
        gaps=_spread(gaps[follows]),
        launch_delay=_spread(page["launched_at_ns"] - page["received_at_ns"]),
        collective_us=float(page["collective_ns"].mean()) / 1e3,
        tasks={name: _task_time(*tasks[name]) for name in TASKS},
    )


def _intervals(pages: Sequence[Page], columns: tuple[str, str]) -> list[Interval]:
    """One task of several processes."""
    return [(page[columns[0]], page[columns[1]]) for page in pages]


def _union(intervals: Sequence[Interval]) -> Coverage:
    none = np.zeros(0, dtype=np.int64)
    starts, ends = zip(*intervals, strict=True) if intervals else ((none,), (none,))
    return Coverage(np.concatenate(starts), np.concatenate(ends))


def _task_time(total_ns: npt.NDArray[np.generic], exposed_ns: npt.NDArray[np.generic]) -> TaskTime:
    def mean(values: npt.NDArray[np.generic]) -> float:
        return float(np.mean(values.astype(np.float64))) / 1e3

    def median(values: npt.NDArray[np.generic]) -> float:
        return float(np.median(values.astype(np.float64))) / 1e3

    return TaskTime(mean(total_ns), median(total_ns), mean(exposed_ns), median(exposed_ns))


def _spread(durations_ns: Int64Array) -> Spread:
    if not len(durations_ns):
        return Spread(0.0, 0.0, 0.0)
    p50, p99, largest = np.percentile(durations_ns, (50, 99, 100)) / 1e3
    return Spread(float(p50), float(p99), float(largest))


def _offset(page: Page, home: Sequence[Page]) -> int | None:
    """What must be added to the times of ``page``, a rank's; None when it has no step in common with ``home``."""
    for known, its_column, column in (
        *((each, "start_at_ns", "start_at_ns") for each in home if each.is_rank),
        *((each, "plan_end_at_ns", "received_at_ns") for each in home if each.is_planner),
    ):
        _, theirs, ours = np.intersect1d(known["step_id"], page["step_id"], return_indices=True)
        if len(ours):
            return int(known[its_column][theirs[0]] - page[column][ours[0]])
    return None


def _moved(page: Page, offset_ns: int) -> Page:
    if not offset_ns:
        return page
    columns = {
        # 0 stands for "did not happen" on every clock.
        name: np.where(column > 0, column + offset_ns, 0) if name.endswith("_at_ns") else column
        for name, column in page.columns.items()
    }
    return Page(page.process, page.clock, columns)
