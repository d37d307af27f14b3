"""Whether steps notice that KV blocks are on their way: one load on a modelled device, with and without swapping.

    roomy       the pool holds all sequences
    recomputed  it holds some of them, and there is no KV store: who is preempted is computed again
    swapped     the same pool, and all that is preempted goes through a store

Steps take the same time whatever they compute, so what differs is what the host does.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from albireo.cli.host_services import Setting, running
from albireo.cli.host_window import Figures, measure, medians, warm_up
from albireo.cli.ports import check_port
from albireo.cli.progress import Bar
from albireo.cli.scrape import read_metrics

_STUB_BLOCK_BYTES = 32 * 8 * 8  # of all ranks: a word for each token and head
_PROMPT_TOKENS, _OUTPUT_TOKENS = 64, 512
# Of what all sequences hold half way through their outputs.
_POOL_SHARE = 0.6

_COUNTERS = {
    "num_preemptions": "albireo_preemptions_total",
    "num_blocks_out": "albireo_kv_blocks_out_total",
    "num_blocks_in": "albireo_kv_blocks_in_total",
}
_FIGURES = ("step_p50_ms", "step_p99_ms", "rows_per_step", "idle_fraction", "gap_p99_us")


def settings(tp: int, batch: int, step_ms: float) -> dict[str, Setting]:
    """By the names above."""
    roomy = Setting(
        tp=tp, batch=batch, depth=2, step_ms=step_ms, prompt_tokens=_PROMPT_TOKENS, output_tokens=_OUTPUT_TOKENS
    )
    num_blocks = int(_POOL_SHARE * batch * (_PROMPT_TOKENS + _OUTPUT_TOKENS / 2) / 32)
    small = replace(roomy, kv_cache_gib=num_blocks * _STUB_BLOCK_BYTES / tp / 2**30)
    return {"roomy": roomy, "recomputed": small, "swapped": replace(small, swap="always")}


async def measure_traffic(tp: int, batch: int, step_ms: float, num_steps: int, reps: int, bar: Bar) -> dict[str, Any]:
    """The report: by setting, medians of ``reps`` windows, which take turns; and of each turn, what the other settings'
    step times are by those of *roomy*. GroupError: services fail."""
    runs: dict[str, list[Figures]] = {name: [] for name in settings(tp, batch, step_ms)}
    for _ in range(reps):
        for name, setting in settings(tp, batch, step_ms).items():
            runs[name].append(await _window(setting, num_steps, bar))
    return {
        "modelled": True,
        "tp": tp,
        "batch": batch,
        "step_ms": step_ms,
        "num_steps": num_steps,
        "num_prompt_tokens": _PROMPT_TOKENS,
        "num_output_tokens": _OUTPUT_TOKENS,
        **{name: {**medians(each), **_ratios(each, runs["roomy"]), "runs": each} for name, each in runs.items()},
    }


async def _window(setting: Setting, num_steps: int, bar: Bar) -> Figures:
    """Starts the services and measures one window."""
    setting = replace(setting, metrics_port=check_port("127.0.0.1", 0, "--metrics-port"))
    async with running(setting) as services:
        step_s = await warm_up(services)
        before = read_metrics(setting.metrics_port)
        seen = await measure(services, num_steps, step_s, bar.update)
        after = read_metrics(setting.metrics_port)
    kv = seen["tasks"]["KV"]
    return {
        **{name: seen[name] for name in _FIGURES},
        "kv_fraction": kv["total_us"] / 1e3 / seen["step_ms"],
        "kv_exposed_fraction": kv["exposed_us"] / 1e3 / seen["step_ms"],
        **{name: after.get(metric, 0) - before.get(metric, 0) for name, metric in _COUNTERS.items()},
    }


def _ratios(runs: Sequence[Figures], roomy: Sequence[Figures]) -> Figures:
    return {
        f"{name}_ratio": statistics.median(run[name] / base[name] for run, base in zip(runs, roomy, strict=True))
        for name in ("step_p50_ms", "step_p99_ms")
    }


_ROWS = {
    "step_p50_ms": "step p50, ms",
    "step_p99_ms": "step p99, ms",
    "step_p50_ms_ratio": "step p50 by roomy",
    "step_p99_ms_ratio": "step p99 by roomy",
    "idle_fraction": "idle, %",
    "kv_fraction": "copying, % of steps",
    "kv_exposed_fraction": "exposed KV, % of steps",
    "rows_per_step": "rows per step",
    "num_preemptions": "preemptions",
    "num_blocks_out": "blocks stored",
    "num_blocks_in": "blocks loaded",
}


def table(report: Mapping[str, Any]) -> str:
    """The report for people: a column per setting."""
    names = [name for name in report if isinstance(report[name], Mapping)]
    lines = [
        f"stub (modelled) · TP {report['tp']} · {report['batch']} sequences · steps of {report['step_ms']:g} ms",
        f"median of {len(report['roomy']['runs'])} windows of {report['num_steps']} steps",
        "",
        f"{'':24}" + "".join(f"{name:>12}" for name in names),
    ]
    for key, title in _ROWS.items():
        scale = 100 if key.endswith("_fraction") else 1
        lines.append(f"{title:24}" + "".join(f"{scale * report[name][key]:>12.3f}" for name in names))
    return "\n".join(lines)
