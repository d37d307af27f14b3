"""The report as a picture: what a rank receives, and the time, over the TP degree."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, Formatter, LogLocator, NullFormatter, StrMethodFormatter

from albireo.errors import ConfigError
from albireo_kernels.bench.sampling.payload import SAMPLINGS
from albireo_kernels.cpu import SCHEMES

mpl.use("Agg")

SHOWN = "top_k_top_p"

# Colours that stay apart for colour-blind readers (Okabe and Ito, 2008).
_COLOURS = {"merge": "#009E73", "batch-sharded": "#0072B2", "gather": "#D55E00"}
_MARKERS = {"merge": "o", "batch-sharded": "s", "gather": "^"}
_GREY = "#555555"
_INCHES = (7.2, 3.2)


def save_picture(file: Path, report: Mapping[str, Any]) -> None:
    """Draws the largest batch. Raises ConfigError when the file cannot be written."""
    try:
        picture(report).savefig(file, dpi=100, facecolor="white")
    except (OSError, ValueError) as error:  # matplotlib's own for an unknown ending
        raise ConfigError(f"--plot {file}: {getattr(error, 'strerror', None) or error}") from error


def picture(report: Mapping[str, Any]) -> Figure:
    batch = max(row["batch"] for row in report["rows"])
    rows = [row for row in report["rows"] if row["batch"] == batch and row["sampling"] == SHOWN]
    degrees = sorted({row["tp"] for row in rows})
    figure = Figure(figsize=_INCHES, layout="constrained")
    received, times = figure.subplots(1, 2)
    # A rank alone receives nothing, which has no place on this scale.
    _draw(
        received,
        "bytes that a rank receives, counted",
        "bytes_per_rank",
        [row for row in rows if row["tp"] > 1],
        degrees,
        EngFormatter(unit="B", sep=" "),
    )
    _draw(times, "time, ms", "time_ms", rows, degrees, StrMethodFormatter("{x:g}"))
    machine, sampling = report["machine"], SAMPLINGS[SHOWN]
    figure.suptitle(
        f"Sampling of {batch} rows of {report['vocab']} logits, top-k {sampling.top_k}, top-p {sampling.top_p}\n"
        f"{machine['cpu']}, {machine['num_usable_cpus']} cores, {report['isa']}, a thread per rank",
        fontsize=9,
    )
    figure.legend(handles=_legend(rows), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return figure


def _draw(
    axes: Axes, title: str, name: str, rows: Sequence[Mapping[str, Any]], degrees: Sequence[int], numbers: Formatter
) -> None:
    """Degrees double from tick to tick, so they stand at equal distances. Bytes are exact whatever the source."""
    for scheme in SCHEMES:
        of = sorted((row for row in rows if row["scheme"] == scheme), key=lambda row: int(row["tp"]))
        xs = [degrees.index(row["tp"]) for row in of]
        axes.plot(xs, [row[name] for row in of], color=_COLOURS[scheme], linewidth=1.4)
        for x, row in zip(xs, of, strict=True):
            is_hollow = row["source"] == "modelled" and name == "time_ms"
            fill = "white" if is_hollow else _COLOURS[scheme]
            axes.plot(x, row[name], _MARKERS[scheme], color=_COLOURS[scheme], markerfacecolor=fill, markersize=5)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if name == "time_ms" else (1,)))
    axes.yaxis.set_major_formatter(numbers)
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel("TP degree", fontsize=8)
    axes.set_xticks(range(len(degrees)), [str(degree) for degree in degrees], fontsize=8)
    axes.set_xlim(-0.3, len(degrees) - 0.7)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _legend(rows: Sequence[Mapping[str, Any]]) -> list[Line2D]:
    handles = [
        Line2D([], [], color=_COLOURS[scheme], marker=_MARKERS[scheme], markersize=5, label=scheme)
        for scheme in SCHEMES
    ]
    fills = {"measured": _GREY, "modelled": "white"}
    return handles + [
        Line2D([], [], color=_GREY, linestyle="", marker="o", markerfacecolor=fill, markersize=5, label=source)
        for source, fill in fills.items()
        if any(row["source"] == source for row in rows)
    ]
