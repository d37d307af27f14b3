"""A picture of what the processes of a server did, step by step, in Chrome's trace format.

One process track per ledger page: what the planner's loop did, what each rank's I/O thread and device did, and what the
front ends did. Arrows lead from each plan to the steps of the ranks.

Source: "Trace Event Format" (Google, 2016), the JSON object format with complete (X), metadata (M) and flow (s, f)
events; Perfetto reads the same.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from albireo.arrays import BoolArray, Int64Array
from albireo.exposure import Page

_NEVER = np.iinfo(np.int64).max

Event = dict[str, Any]


class NoSteps(ValueError):
    """There is nothing to show."""


@dataclass(frozen=True)
class Task:
    """What a thread did: a span per row, [rows] starts and ends in nanoseconds; 0 means that it did not happen."""

    name: str
    starts: Int64Array
    ends: Int64Array
    args: Sequence[Event]


@dataclass(frozen=True)
class Track:
    """A thread of the picture."""

    name: str
    tasks: Sequence[Task]


def make_trace(pages: Sequence[Page], num_steps: int = 0) -> dict[str, Any]:
    """The trace of the latest ``num_steps`` steps, 0 for all. Raises NoSteps when there are none."""
    step_ids = np.unique(np.concatenate([np.zeros(0, np.int64), *(_done_steps(page) for page in pages)]))[-num_steps:]
    if not len(step_ids):
        raise NoSteps("no steps have run")
    stepping = [_rows_since(page, "step_id", int(step_ids[0])) for page in pages if not page.is_frontend]
    times = [page[name] for page in stepping for name in page.columns if name.endswith("_at_ns")]
    begin = min(int(column[column > 0].min(initial=_NEVER)) for column in times)
    shown = stepping + [_rows_since(page, "received_at_ns", begin) for page in pages if page.is_frontend]
    events: list[Event] = []
    for process_id, page in enumerate(sorted(shown, key=_place), start=1):
        events += _process_events(process_id, page, begin)
    events += _arrows(events)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def steps_since(pages: Sequence[Page], after_ns: int, num_steps: int = 0) -> list[Page]:
    """The rows of steps that were planned later than ``after_ns``: of the first ``num_steps`` of them, 0 for all.

    The planner's page is among ``pages``.
    """
    planner = next(page for page in pages if page.is_planner)
    later = planner.select(planner["plan_start_at_ns"] > after_ns)
    step_ids = later["step_id"][: num_steps or None]
    next_at_ns = later["deliver_start_at_ns"][len(step_ids) :].min(initial=_NEVER)

    def is_shown(page: Page) -> BoolArray:
        if page.is_planner:
            return (page["plan_start_at_ns"] > after_ns) & np.isin(page["step_id"], step_ids)
        is_later = page["received_at_ns"] > after_ns
        return is_later & (
            page["received_at_ns"] < next_at_ns if page.is_frontend else np.isin(page["step_id"], step_ids)
        )

    return [page.select(is_shown(page)) for page in pages]


def write_trace(file: Path, trace: dict[str, Any]) -> None:
    """Event by event, so that other threads get their turn. Raises OSError."""
    others = {key: value for key, value in trace.items() if key != "traceEvents"}
    with file.open("w") as output:
        output.write(json.dumps(others)[:-1] + ', "traceEvents": [')
        for number, event in enumerate(trace["traceEvents"]):
            output.write((",\n" if number else "\n") + json.dumps(event))
        output.write("\n]}\n")


def summary(trace: dict[str, Any]) -> tuple[int, float]:
    """Steps of a trace, and how long it lasts in microseconds."""
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    steps = {event["args"]["step"] for event in spans if "step" in event["args"]}
    return len(steps), max(event["ts"] + event["dur"] for event in spans)


def _done_steps(page: Page) -> Int64Array:
    if page.is_planner:
        return page["step_id"]
    return page["step_id"][page["end_at_ns"] > 0] if page.is_rank else np.zeros(0, dtype=np.int64)


def _rows_since(page: Page, column: str, first: int) -> Page:
    return page.select(page[column] >= first)


def _place(page: Page) -> tuple[int, int, str]:
    """Front ends on top, then the planner, then ranks by number."""
    number = page.process.rpartition("-")[2]
    return (page.is_planner + 2 * page.is_rank, int(number) if number.isdigit() else 0, page.process)


def _process_events(process_id: int, page: Page, begin: int) -> Iterator[Event]:
    yield _metadata("process_name", process_id, 0, name=page.process)
    yield _metadata("process_sort_index", process_id, 0, sort_index=process_id)
    tracks = (
        _planner_tracks(page) if page.is_planner else _rank_tracks(page) if page.is_rank else _frontend_tracks(page)
    )
    for thread_id, track in enumerate(tracks, start=1):
        yield _metadata("thread_name", process_id, thread_id, name=track.name)
        yield _metadata("thread_sort_index", process_id, thread_id, sort_index=thread_id)
        yield from _spans(process_id, thread_id, track, begin)


def _metadata(what: str, process_id: int, thread_id: int, **args: object) -> Event:
    return {"ph": "M", "name": what, "pid": process_id, "tid": thread_id, "args": args}


def _spans(process_id: int, thread_id: int, track: Track, begin: int) -> Iterator[Event]:
    """A track's spans, oldest first. One thread does one thing at a time: a span that begins before the last one has
    ended (its timestamp is older than its thread's turn) is shown from there on."""
    spans = [
        (start, end, task.name, args)
        for task in track.tasks
        for start, end, args in zip(task.starts.tolist(), task.ends.tolist(), task.args, strict=True)
        if 0 < start < end
    ]
    free = begin
    for start, end, name, args in sorted(spans, key=lambda span: span[:2]):
        shown = max(start, free)
        free = max(free, end)
        if end < shown:
            continue
        yield {
            "ph": "X",
            "name": name,
            "cat": track.name,
            "pid": process_id,
            "tid": thread_id,
            "ts": (shown - begin) / 1e3,
            "dur": (end - shown) / 1e3,
            "args": args,
        }


def _planner_tracks(page: Page) -> list[Track]:
    args = _args(page, "step_id", "num_rows", "num_tokens")
    tasks = [("T1 plan", "plan"), ("T5 commit", "commit"), ("T5 deliver", "deliver")]
    spans = [Task(name, page[f"{each}_start_at_ns"], page[f"{each}_end_at_ns"], args) for name, each in tasks]
    return [Track("step loop", spans)]


def _rank_tracks(page: Page) -> list[Track]:
    args = _args(page, "step_id", "num_rows", "num_tokens")
    starts, ends = page["start_at_ns"], page["end_at_ns"]
    samples_at = np.maximum(starts, ends - page["sample_ns"])
    device = [Task("T3 forward", starts, samples_at, args), Task("T4 sample", samples_at, ends, args)]
    follows = np.diff(page["step_id"]) == 1
    waited = follows & (starts[1:] > ends[:-1]) & (ends[:-1] > 0)
    before = [each for each, is_gap in zip(args[1:], waited, strict=True) if is_gap] if len(page) else []
    device.append(Task("idle", ends[:-1][waited], starts[1:][waited], before))
    tracks = [
        Track("I/O thread", [Task("T2 prepare", page["received_at_ns"], page["prepared_at_ns"], args)]),
        Track("device", device),
    ]
    if page["kv_ns"].any():
        moved = np.where(page["kv_ns"] > 0, starts, 0)  # their length is known, not when they began
        tracks.append(Track("KV transfers", [Task("KV", moved, moved + page["kv_ns"], args)]))
    return tracks


def _frontend_tracks(page: Page) -> list[Track]:
    args = _args(page, "num_sequences", "num_tokens")
    return [Track("tokens", [Task("T5 dispatch", page["received_at_ns"], page["dispatched_at_ns"], args)])]


def _args(page: Page, *columns: str) -> list[Event]:
    """Each row's counts, by names without prefix: ``num_rows`` is "rows", ``step_id`` "step"."""
    names = [name.removeprefix("num_").removesuffix("_id") for name in columns]
    values = zip(*(page[name].tolist() for name in columns), strict=True)
    return [dict(zip(names, row, strict=True)) for row in values]


def _arrows(events: Iterable[Event]) -> list[Event]:
    """Flow events from the end of each plan to each rank's forward pass of that step."""
    plans: dict[int, Event] = {}
    passes: list[Event] = []
    for event in events:
        if event["name"] == "T1 plan":
            plans[event["args"]["step"]] = event
        elif event["name"] == "T3 forward":
            passes.append(event)
    arrows: list[Event] = []
    for number, event in enumerate(passes):
        plan = plans.get(event["args"]["step"])
        if plan is None:
            continue
        common = {"name": "plan", "cat": "plan", "id": number}
        # A flow begins within its slice, or Perfetto ties it to none.
        leaves = {"ph": "s", "pid": plan["pid"], "tid": plan["tid"], "ts": plan["ts"] + plan["dur"] / 2}
        arrives = {"ph": "f", "bp": "e", "pid": event["pid"], "tid": event["tid"], "ts": event["ts"]}
        arrows += [{**common, **leaves}, {**common, **arrives}]
    return arrows
