"""The report for people, and the ratios in it."""

from collections.abc import Mapping, Sequence
from typing import Any

from albireo_kernels.bench.report import columns
from albireo_kernels.cpu import SCHEMES

Row = Mapping[str, Any]

_NUM_TEXTS = 1  # columns that are aligned to the left
_SHORT = {"merge": "merge", "batch-sharded": "by rows", "gather": "gather"}


def ratios_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What merge takes, as a part of what each other scheme takes."""
    times: dict[tuple[str, int, int, str], dict[str, float]] = {}
    for row in rows:
        key = (row["sampling"], row["batch"], row["tp"], row["source"])
        times.setdefault(key, {})[row["scheme"]] = row["time_ms"]
    return [
        {
            "sampling": sampling,
            "batch": batch,
            "tp": tp,
            "source": source,
            "merge_to_gather": of["merge"] / of["gather"],
            "merge_to_batch_sharded": of["merge"] / of["batch-sharded"],
        }
        for (sampling, batch, tp, source), of in times.items()
    ]


def table(report: Mapping[str, Any]) -> str:
    """A line for each ratio, with the times and bytes that belong to it."""
    machine = report["machine"]
    lines = [
        f"{machine['cpu']} · {report['isa']} · {machine['num_usable_cpus']} of {machine['num_cpus']} CPUs, "
        f"load before: {machine['load_average_before']:.2f}",
        f"{report['vocab']} token ids, a thread per rank; bytes are what rank 0 receives, by rows is batch-sharded",
        "",
        *columns(_lines(report), _NUM_TEXTS),
    ]
    if not report["torch"]:
        lines.append("torch is not installed: nothing to compare with")
    if any(row["source"] == "modelled" for row in report["rows"]):
        lines.append("modelled: more ranks than cores; what rank 0 does, alone on its core, with nobody to wait for")
    return "\n".join(lines)


def _lines(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = {(row["scheme"], *_key(row)): row for row in report["rows"]}
    in_torch = {(row["sampling"], row["batch"]): row for row in report["torch"]}
    titles = ["sampling", "TP", "rows", *(f"{_SHORT[each]}, bytes" for each in SCHEMES)]
    titles += [*(f"{_SHORT[each]}, ms" for each in SCHEMES), "merge / gather", "merge / by rows", "torch, ms", "source"]
    lines = [tuple(titles)]
    for ratio in report["ratios"]:
        of = [rows[scheme, *_key(ratio)] for scheme in SCHEMES]
        torch = in_torch.get((ratio["sampling"], ratio["batch"]))
        is_alike = torch is not None and torch["threads"] == ratio["tp"]
        lines.append(
            (
                ratio["sampling"],
                str(ratio["tp"]),
                str(ratio["batch"]),
                *(f"{row['bytes_per_rank']:,}" for row in of),
                *(f"{row['time_ms']:.3f}" for row in of),
                f"{ratio['merge_to_gather']:.2f}",
                f"{ratio['merge_to_batch_sharded']:.2f}",
                f"{torch['time_ms']:.1f}" if torch is not None and is_alike else "-",
                ratio["source"],
            )
        )
    return lines


def _key(row: Row) -> tuple[str, int, int]:
    return row["sampling"], row["batch"], row["tp"]
