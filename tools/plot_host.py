"""Draws reports of `albireo bench host --json` as a PNG: what the host costs over batch sizes and TP degrees.

    python tools/plot_host.py results/*.json -o host.png

A row per figure: idle fraction, CPU per step of each process, shortest step. Its panels are over the batch size at a TP
degree, and over the TP degree at a batch size; lines are depths. Reports of the same setting are merged by their
median. Reports of different engines, clients or step lengths are not mixed: give them in separate runs.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

mpl.use("Agg")

# Colours that stay apart for colour-blind readers (Okabe and Ito, 2008).
COLOURS = {1: "#D55E00", 2: "#0072B2", 3: "#009E73", 4: "#CC79A7"}
MARKERS = {1: "o", 2: "s", 3: "^", 4: "D"}
_PANEL_INCHES = (2.5, 2.1)
_MIXED = ("engine", "clients", "step_ms", "stub_device", "stub_model")

Report = dict[str, Any]


@dataclass(frozen=True)
class Quantity:
    """What a row shows: its axis, and where its value is in a depth's figures."""

    title: str
    value: Callable[[dict[str, Any]], float | None]


QUANTITIES = (
    Quantity("device idle, %", lambda at: 100 * at["idle_fraction"]),
    Quantity("planner logic, CPU us", lambda at: at["planner_logic_cpu_us_per_step"]),
    Quantity("planner, CPU us", lambda at: at["planner_cpu_us_per_step"]),
    Quantity("leader, CPU us", lambda at: at["leader_cpu_us_per_step"]),
    # At TP 1 there is no other rank.
    Quantity("other rank, CPU us", lambda at: at["rank_cpu_us_per_step"] or None),
    Quantity("front end, CPU us", lambda at: at["frontend_cpu_us_per_step"]),
    Quantity("shortest step with 1 % idle, ms", lambda at: at.get("shortest_step_ms")),
)

# (TP degree, batch, depth) -> value
Values = dict[tuple[int, int, int], float]


def read_reports(files: Sequence[Path]) -> list[Report]:
    reports = [json.loads(file.read_text()) for file in files]
    for name in _MIXED:
        found = {report.get(name) for report in reports}
        if len(found) > 1:
            raise SystemExit(f"the reports differ in {name}: {', '.join(map(str, sorted(found, key=str)))}")
    return reports


def values_of(reports: Sequence[Report], quantity: Quantity) -> Values:
    found: dict[tuple[int, int, int], list[float]] = defaultdict(list)
    for report in reports:
        for name, figures in report.items():
            if name.startswith("depth_") and (value := quantity.value(figures)) is not None:
                found[report["tp"], report["batch"], int(name.removeprefix("depth_"))].append(value)
    return {key: statistics.median(each) for key, each in found.items()}


@dataclass(frozen=True)
class Panel:
    """Lines by depth: x -> y. Sizes double from tick to tick, so they stand at equal distances."""

    title: str
    label: str
    ticks: Sequence[int]
    lines: Mapping[int, Mapping[int, float]]


def draw(axes: Axes, panel: Panel) -> None:
    ticks = panel.ticks
    for depth, points in sorted(panel.lines.items()):
        xs = sorted(points)
        axes.plot(
            [ticks.index(x) for x in xs],
            [points[x] for x in xs],
            color=COLOURS.get(depth, "#555555"),
            marker=MARKERS.get(depth, "x"),
            markersize=4,
            linewidth=1.4,
            label=f"depth {depth}",
        )
    axes.set_title(panel.title, fontsize=9, loc="left")
    axes.set_xlabel(panel.label, fontsize=8)
    axes.set_xticks(range(len(ticks)), [str(tick) for tick in ticks], fontsize=8)
    axes.set_xlim(-0.3, len(ticks) - 0.7)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _lines(values: Values, tp: int | None = None, batch: int | None = None) -> dict[int, dict[int, float]]:
    """Depth -> batch -> value at this TP degree, or depth -> TP degree -> value at this batch size."""
    lines: dict[int, dict[int, float]] = defaultdict(dict)
    for (at_tp, at_batch, depth), value in values.items():
        if at_tp == tp:
            lines[depth][at_batch] = value
        if at_batch == batch:
            lines[depth][at_tp] = value
    return lines


def panels(values: Values) -> list[Panel]:
    """One over the batch size for each TP degree, one over the TP degree for each batch size, where there are lines:
    a single point shows nothing."""
    degrees = sorted({tp for tp, _, _ in values})
    batches = sorted({batch for _, batch, _ in values})
    made = [Panel(f"TP {tp}", "sequences at a time", batches, _lines(values, tp=tp)) for tp in degrees]
    made += [Panel(f"batch {batch}", "TP degree", degrees, _lines(values, batch=batch)) for batch in batches]
    return [panel for panel in made if any(len(points) > 1 for points in panel.lines.values())]


def picture(rows: Mapping[str, Sequence[Panel]], subtitle: str) -> Figure:
    """A row of panels for each quantity, by its title."""
    num_columns = max(map(len, rows.values()))
    size = (max(4.5, _PANEL_INCHES[0] * num_columns), _PANEL_INCHES[1] * len(rows) + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), num_columns, squeeze=False, sharey="row")
    for (title, row), row_axes in zip(rows.items(), grid, strict=True):
        for panel, axes in zip(row, row_axes, strict=False):
            draw(axes, panel)
        for axes in row_axes[len(row) :]:
            axes.set_visible(False)
        row_axes[0].set_ylabel(title, fontsize=8)
        row_axes[0].set_ylim(bottom=0)
    figure.suptitle(subtitle, fontsize=10)
    handles = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
    names = sorted(handles, key=str)
    figure.legend(
        [handles[name] for name in names],
        [str(name) for name in names],
        loc="outside lower center",
        ncols=len(names),
        fontsize=8,
        frameon=False,
    )
    return figure


def subtitle_of(report: Report) -> str:
    device = "modelled" if report["modelled"] else "measured"
    step = f"{report['step_ms']:g} ms steps" if report["step_ms"] else report.get("stub_device") or report["model"]
    return f"{report['engine']} ({device}), {step}, {report['clients']} clients, {report['num_cpus']} CPUs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", type=Path, metavar="REPORT")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FILE", help="a PNG")
    args = parser.parse_args()
    reports = read_reports(args.reports)
    rows = {quantity.title: panels(values_of(reports, quantity)) for quantity in QUANTITIES}
    rows = {title: row for title, row in rows.items() if row}
    if not rows:
        parser.error("no two of these reports differ in batch size or TP degree alone")
    picture(rows, subtitle_of(reports[0])).savefig(args.output, dpi=100, facecolor="white")
    print(f"{args.output}: {args.output.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
