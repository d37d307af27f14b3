"""Draws a few steps of a trace (`albireo trace`) as a PNG: what each process did while the device computed.

    python tools/plot_trace.py trace.json -o steps.png --first 40 --steps 4
    python tools/plot_trace.py depth1.json depth2.json -o both.png --titles "depth 1" "depth 2"

Several traces are drawn one below the other on the same scale.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

mpl.use("Agg")

# Colours that stay apart for colour-blind readers (Okabe and Ito, 2008).
COLOURS = {
    "T1 plan": "#0072B2",
    "T2 prepare": "#56B4E9",
    "T3 forward": "#009E73",
    "T4 sample": "#F0E442",
    "T5 commit": "#D55E00",
    "T5 deliver": "#E69F00",
    "T5 dispatch": "#CC79A7",
    "KV": "#999999",
    "idle": "#FFFFFF",
}
_ROW_INCHES = 0.36
_MIN_WIDTH = 0.004  # of the picture: shorter spans would not be seen
_LABELLED_WIDTH = 0.035


@dataclass(frozen=True)
class Span:
    row: str
    name: str
    start_us: float
    end_us: float
    step: int | None


def read_spans(file: Path) -> list[Span]:
    """All spans of a trace; their rows are named by process and thread, in the trace's order."""
    events: list[dict[str, Any]] = json.loads(file.read_text())["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    return [
        Span(
            f"{processes[e['pid']]}: {threads[e['pid'], e['tid']]}",
            e["name"],
            e["ts"],
            e["ts"] + e["dur"],
            e["args"].get("step"),
        )
        for e in events
        if e["ph"] == "X"
    ]


def window(spans: Sequence[Span], first: int, num_steps: int) -> tuple[float, float]:
    """From the plan of the ``first``-th step of the trace until ``num_steps`` later the last one's forward is over."""
    forwards = sorted({span.step for span in spans if span.name == "T3 forward" and span.step is not None})
    chosen = forwards[first : first + num_steps]
    if not chosen:
        raise SystemExit(f"the trace has {len(forwards)} steps, none at --first {first}")
    mine = [span for span in spans if span.name == "T3 forward" and span.step in chosen]
    begin, end = min(span.start_us for span in mine), max(span.end_us for span in mine)
    margin = 0.04 * (end - begin)
    return begin - margin, end + margin


def draw(axes: Axes, spans: Sequence[Span], begin: float, end: float, length_us: float) -> None:
    """One trace from ``begin`` on; the axis is ``length_us`` long."""
    rows = list(dict.fromkeys(span.row for span in spans))
    for span in spans:
        if span.end_us < begin or span.start_us > end:
            continue
        start, stop = max(span.start_us, begin), min(span.end_us, end)
        is_idle = span.name == "idle"
        width = max(stop - start, 0.0 if is_idle else _MIN_WIDTH * length_us)
        axes.barh(
            rows.index(span.row),
            width / 1e3,
            left=(start - begin) / 1e3,
            height=0.72,
            color=COLOURS.get(span.name, "#BBBBBB"),
            edgecolor=_edge(span.name),
            linewidth=0.6 if is_idle else 1.0 if span.name == "T3 forward" else 0.0,
            hatch="////" if is_idle else None,
        )
        if span.step is not None and span.name in ("T3 forward", "T1 plan") and width > _LABELLED_WIDTH * length_us:
            centre = (start + width / 2 - begin) / 1e3
            axes.text(
                centre, rows.index(span.row), f"step {span.step}", ha="center", va="center", fontsize=7, color="w"
            )
    axes.set_xlim(0, length_us / 1e3)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _edge(name: str) -> str:
    """Steps that follow each other without a gap stay apart."""
    return {"idle": "#999999", "T3 forward": "white"}.get(name, "none")


def legend(names: Sequence[str]) -> Iterator[Patch]:
    for name, colour in COLOURS.items():
        if name in names:
            is_idle = name == "idle"
            label = "idle gap" if is_idle else name
            yield Patch(
                facecolor=colour,
                edgecolor="#999999" if is_idle else "none",
                hatch="////" if is_idle else None,
                label=label,
            )


def picture(files: Sequence[Path], titles: Sequence[str], first: int, num_steps: int) -> Figure:
    traces = [read_spans(file) for file in files]
    windows = [window(spans, first, num_steps) for spans in traces]
    length_us = max(end - begin for begin, end in windows)
    heights = [len({span.row for span in spans}) for spans in traces]
    figure = Figure(figsize=(9.0, 0.9 + sum(_ROW_INCHES * rows + 0.45 for rows in heights)), layout="constrained")
    axes = figure.subplots(len(traces), 1, squeeze=False, height_ratios=heights)[:, 0]
    for each, spans, (begin, _), title in zip(axes, traces, windows, titles, strict=True):
        draw(each, spans, begin, begin + length_us, length_us)
        each.set_title(title, fontsize=9, loc="left")
    axes[-1].set_xlabel("milliseconds", fontsize=8)
    names = {span.name for spans in traces for span in spans}
    handles = list(legend(sorted(names)))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--titles", nargs="+", metavar="TITLE", help="one for each trace")
    parser.add_argument("--first", type=int, default=20, metavar="N", help="the first step, counted in the trace")
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="how many are shown")
    args = parser.parse_args()
    titles = args.titles or [file.stem for file in args.traces]
    if len(titles) != len(args.traces):
        parser.error("--titles: one for each trace is needed")
    picture(args.traces, titles, args.first, args.steps).savefig(args.output, dpi=110, facecolor="white")
    print(f"{args.output}: {args.output.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
