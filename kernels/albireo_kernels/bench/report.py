"""The report for people."""

from collections.abc import Sequence
from typing import Any

_TITLES = ("kernel", "shape", "time, us", "limit, us", "share, %", "torch, us", "torch / ours")
_NUM_TEXTS = 2  # columns that are aligned to the left


def table(report: dict[str, Any]) -> str:
    machine = report["machine"]
    lines = [
        f"{machine['cpu']} · {report['isa']} · {report['threads']} of {machine['num_cpus']} CPUs, "
        f"load before: {machine['load_average_before']:.2f}",
        *_rates(report),
    ]
    if not report["rows"]:
        return "\n".join(lines)
    if report["torch"] is None:
        lines.append("torch is not installed: nothing to compare with")
    return "\n".join([*lines, "", *columns([_TITLES, *(_cells(row) for row in report["rows"])])])


def _rates(report: dict[str, Any]) -> list[str]:
    shown = {"one thread": report["rates"]["one_thread"], "all threads": report["rates"]["all_threads"]}
    lines = [("best (median) of", *shown)]
    lines.append(("reads memory, GB/s", *(_rate(rates["read_gb_s"]) for rates in shown.values())))
    lines.append(("reads cache, GB/s", *(_rate(rates["read_cache_gb_s"]) for rates in shown.values())))
    for dtype in report["rates"]["one_thread"]["multiply_gflop_s"]:
        title = f"multiplies {dtype}, GFLOP/s"
        lines.append((title, *(_rate(rates["multiply_gflop_s"][dtype]) for rates in shown.values())))
    return columns(lines, num_texts=1)


def _rate(rate: dict[str, float]) -> str:
    return f"{rate['best']:.1f} ({rate['median']:.1f})"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["kernel"],
        row["shape"],
        f"{row['time_us']:.1f}",
        f"{row['limit_us']:.1f}",
        f"{100 * row['share']:.0f}",
        "-" if row["torch_us"] is None else f"{row['torch_us']:.1f}",
        "-" if row["torch_ratio"] is None else f"{row['torch_ratio']:.2f}",
    )


def columns(lines: Sequence[tuple[str, ...]], num_texts: int = _NUM_TEXTS) -> list[str]:
    """Lines of cells, as wide as the widest of each column; the first ``num_texts`` are aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index < num_texts else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
