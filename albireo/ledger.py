"""The ledger: what happened when in each of a process's latest steps, in fixed memory.

One row a step, written with a single call and without allocation; whatever is to be known of it (histograms, traces,
how much of a task the device had to wait for) is worked out by whoever reads it, away from the steps.

Times are CLOCK_MONOTONIC in nanoseconds, which all processes of a host share; columns that do not end in ``_at_ns``
are durations or counts. 0 stands for "did not happen".
"""

import mmap
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from albireo.arrays import Int64Array
from albireo.v1 import ledger_pb2

# A planner's row, written when the step is over.
PLANNER_COLUMNS = (
    "step_id",
    "plan_start_at_ns",  # T1
    "plan_end_at_ns",  # the plan has been handed to the stream
    "result_at_ns",  # the result has arrived
    "commit_start_at_ns",  # T5: commit, then (after the next plan has left) deliver
    "commit_end_at_ns",
    "deliver_start_at_ns",
    "deliver_end_at_ns",
    "logic_cpu_ns",  # CPU time of this step's plan, commit and delivery; gRPC's share is not in it
    "num_rows",
    "num_tokens",  # computed in the step
)

# A rank's row, written when the step's tokens are on the host. The device may be modelled.
RANK_COLUMNS = (
    "step_id",
    "received_at_ns",  # T2 begins: the plan is here, in bytes
    "prepared_at_ns",
    "launched_at_ns",  # handed to the device ...
    "start_at_ns",  # ... which begins to compute
    "end_at_ns",
    "forward_ns",  # T3, collectives included
    "sample_ns",  # T4
    "collective_ns",
    "kv_ns",  # transfers of KV blocks
    "num_rows",
    "num_tokens",
)

# A front end's row: one message of the planner, with the tokens of a step or a few.
FRONTEND_COLUMNS = (
    "received_at_ns",
    "dispatched_at_ns",  # detokenised where that cannot wait; clients' handlers are woken
    "num_sequences",
    "num_tokens",
)

DEFAULT_ROWS = 8192  # 40 s of 5 ms steps
_COUNT = struct.Struct("<q")


class Ledger:
    """A ring of rows. One thread adds, any process reads.

    Args:
        path: a file that the ring lives in, so that other processes can read it; it is made anew.
    """

    def __init__(self, process: str, columns: Sequence[str], num_rows: int = DEFAULT_ROWS, path: Path | None = None):
        self.process = process
        self.columns = tuple(columns)
        self.num_rows = num_rows
        self.num_added = 0
        self._row = struct.Struct(f"<{len(self.columns)}q")
        size = _COUNT.size + num_rows * self._row.size
        self._buffer = mmap.mmap(-1, size) if path is None else _new_file(path, size)

    def add(self, *values: int) -> None:
        """Adds one row: a value for each column."""
        place = self.num_added % self.num_rows
        self._row.pack_into(self._buffer, _COUNT.size + place * self._row.size, *values)
        self.num_added += 1
        _COUNT.pack_into(self._buffer, 0, self.num_added)

    def latest(self, num_rows: int = 0) -> Int64Array:
        """The latest rows, [rows, columns], oldest first; 0: all that are kept."""
        return _latest(self._buffer, len(self.columns), self.num_rows, num_rows)

    def page(self, num_rows: int = 0) -> ledger_pb2.LedgerPage:
        return make_page(self.process, self.columns, self.latest(num_rows))


def read_file(path: Path, columns: Sequence[str], num_rows: int = 0) -> Int64Array:
    """The latest rows, [rows, columns], of a ledger that another process keeps at ``path``.

    Raises OSError when there is no such file, ValueError when it is no ledger with these columns.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
        capacity, rest = divmod(len(buffer) - _COUNT.size, 8 * len(columns))
        if rest or capacity < 1:
            raise ValueError(f"{path}: not a ledger of {len(columns)} columns")
        return _latest(buffer, len(columns), capacity, num_rows)


def make_page(process: str, columns: Sequence[str], rows: Int64Array) -> ledger_pb2.LedgerPage:
    return ledger_pb2.LedgerPage(
        process=process, clock=_host_clock(), columns=columns, rows=rows.astype("<i8").tobytes()
    )


def rows_of(page: ledger_pb2.LedgerPage) -> dict[str, Int64Array]:
    """A page's columns by name. Raises ValueError when it is none."""
    rows = np.frombuffer(page.rows, dtype="<i8").reshape(-1, len(page.columns))
    return {name: rows[:, index] for index, name in enumerate(page.columns)}


def _latest(buffer: mmap.mmap, num_columns: int, capacity: int, num_rows: int) -> Int64Array:
    (num_added,) = _COUNT.unpack_from(buffer, 0)
    num = min(num_rows or capacity, capacity, num_added)
    rows = np.frombuffer(buffer, dtype="<i8", offset=_COUNT.size).reshape(capacity, num_columns)
    latest: Int64Array = rows[np.arange(num_added - num, num_added) % capacity]
    del rows  # a view would keep the map from being closed
    # What the writer has overwritten meanwhile is not what it was.
    (num_added_since,) = _COUNT.unpack_from(buffer, 0)
    num_lost = max(0, num_added_since + 1 - (num_added - num) - capacity)
    return latest[num_lost:]


def _new_file(path: Path, size: int) -> mmap.mmap:
    path.unlink(missing_ok=True)  # a reader of the old one keeps that
    with path.open("wb+") as file:
        file.truncate(size)
        return mmap.mmap(file.fileno(), size)


def _host_clock() -> str:
    """Names this host's monotonic clock: it begins with each boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
