"""The picture of `albireo bench kv`: rates over the size of parts, beside plain copies. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from albireo.cli.bench_kv import Row

# Colours that stay apart for colour-blind readers (Okabe and Ito, 2008).
_COLOURS = {"memcpy": "#999999", "shm": "#0072B2", "remote": "#D55E00", "redis": "#009E73"}
_LINES = {"out": ("-", "o"), "in": ("--", "s")}


def draw(rows: Sequence[Row], file: Path) -> None:
    """Writes a PNG."""
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    copies = {row.part_bytes: row.memcpy_mb_s for row in rows if row.path == "shm"}
    axes.plot(list(copies), list(copies.values()), color=_COLOURS["memcpy"], label="memcpy")
    for path, direction in dict.fromkeys((row.path, row.direction) for row in rows):
        mine = [row for row in rows if (row.path, row.direction) == (path, direction)]
        style, marker = _LINES[direction]
        sizes, rates = [row.part_bytes for row in mine], [row.mb_s for row in mine]
        axes.plot(sizes, rates, style, marker=marker, markersize=4, color=_COLOURS[path], label=f"{path}, {direction}")
    sizes = sorted(copies)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{size >> 10} KiB" for size in sizes])
    axes.set_xlabel("part")
    axes.set_ylabel("MB/s, checksums on")
    axes.grid(color="#E5E5E5", linewidth=0.6)
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(file, dpi=110, facecolor="white")
