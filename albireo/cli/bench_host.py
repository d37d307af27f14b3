"""``albireo bench host``: what this host's processes cost and how long they keep a device waiting.

The services run as they do in production, on unix sockets of a temporary directory; the device may be modelled. A
fixed number of sequences runs all the time, and about one joins and one leaves per step.
"""

import argparse
import asyncio
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import albireo
from albireo.cli.host_services import PROMPT_TOKENS, Setting, running
from albireo.cli.host_window import Figures, measure, medians, warm_up
from albireo.cli.json_file import write_json
from albireo.cli.progress import Bar, counting_bar

# Step lengths at which the search for the shortest tries to keep the device busy, and what "busy" means.
LADDER_MS = (10.0, 7.0, 5.0, 4.0, 3.0, 2.5, 2.0, 1.5)
MAX_IDLE_FRACTION = 0.01

_ROWS = {
    "step_ms": "step, ms",
    "idle_fraction": "idle fraction, %",
    "gap_p50_us": "gap p50, us",
    "gap_p99_us": "gap p99, us",
    "gap_max_us": "gap max, us",
    "non_scalable_fraction": "non-scalable, %",
    "planner_logic_cpu_us_per_step": "planner logic, us",
    "planner_cpu_us_per_step": "planner, us",
    "leader_cpu_us_per_step": "leader, us",
    "rank_cpu_us_per_step": "other rank, us",
    "frontend_cpu_us_per_step": "front ends, us",
    "cpu_us_per_token": "all, us per token",
    "launch_delay_p50_us": "launch delay p50, us",
    "coalescing_factor": "tokens per response",
    "itl_p50_ms": "ITL p50, ms",
    "itl_p99_ms": "ITL p99, ms",
    "ttft_p50_ms": "TTFT p50, ms",
    "shortest_step_ms": "shortest step, ms",
}

_DESCRIPTION = """Measure what this host's processes cost per step, and how long they keep a device waiting. CPU is of
whole processes, gRPC included, in microseconds per step; it depends on the step's length. With the stub engine the
device is modelled: it takes time only."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    parser.add_argument("--tp", type=int, default=1, metavar="T", help="ranks; default: %(default)s")
    parser.add_argument("--batch", type=int, default=32, metavar="B", help="sequences at a time; default: %(default)s")
    parser.add_argument("--step-ms", type=float, default=10.0, metavar="S", help="of the stub; default: %(default)s")
    parser.add_argument("--depth", default="1,2,3", metavar="LIST", help="plans in flight; default: %(default)s")
    parser.add_argument(
        "--clients",
        choices=("internal", "grpc"),
        default="internal",
        help="internal: a front end "
        "that counts tokens; grpc: real front ends with streaming clients; default: %(default)s",
    )
    parser.add_argument("--steps", type=int, default=2000, metavar="N", help="of a window; default: %(default)s")
    parser.add_argument("--reps", type=int, default=3, metavar="N", help="medians are over these; default: %(default)s")
    parser.add_argument("--engine", choices=("stub", "torch", "eager"), default="stub", help="default: %(default)s")
    parser.add_argument("--model", default="demo", help="directory, Hub id or 'demo'; default: %(default)s")
    parser.add_argument("--stub-device", metavar="NAME", help="steps as long as on this device, not --step-ms")
    parser.add_argument("--stub-model", metavar="NAME", help="... with a model of this size")
    parser.add_argument("--frontends", type=int, default=1, metavar="N", help="with grpc clients; default: %(default)s")
    parser.add_argument("--frontend-nice", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--no-shortest", action="store_true", help="do not search the shortest step without idling")
    parser.add_argument("--json", metavar="FILE", help="write the report here as one JSON object; - is stdout")


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    for name in ("tp", "batch", "steps", "reps", "frontends"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: at least 1 is needed")
    if args.step_ms <= 0:
        parser.error("--step-ms: more than 0 is needed")
    if bool(args.stub_device) != bool(args.stub_model):
        parser.error("--stub-device and --stub-model belong together")
    if args.frontends > 1 and args.clients == "internal":
        parser.error("--frontends: internal clients are a front end themselves")
    try:
        depths = sorted({int(depth) for depth in args.depth.split(",")})
    except ValueError:
        parser.error(f"--depth {args.depth}: whole numbers, separated by commas")
    if depths[0] < 1:
        parser.error("--depth: at least 1 is needed")
    by_clock = args.engine == "stub" and not args.stub_device
    setting = Setting(
        tp=args.tp,
        batch=args.batch,
        depth=depths[0],
        step_ms=args.step_ms if by_clock else 0.0,
        engine=args.engine,
        model=args.model,
        stub_device=args.stub_device,
        stub_model=args.stub_model,
        clients=args.clients,
        frontends=args.frontends,
        frontend_nice=args.frontend_nice,
    )
    report = asyncio.run(bench_host(setting, depths, args.steps, args.reps, by_clock and not args.no_shortest))
    print(table(report), file=sys.stderr if args.json == "-" else sys.stdout)
    if args.json:
        write_json(args.json, report)
    return 0


async def bench_host(
    setting: Setting, depths: Sequence[int], num_steps: int, reps: int, shortest: bool
) -> dict[str, Any]:
    """The report: facts, and for each depth the medians, the single runs, and the shortest step if asked for."""
    load_average = os.getloadavg()
    at_depths: dict[str, Figures] = {}
    for depth in depths:
        here = replace(setting, depth=depth)
        figures = await _measure_depth(here, num_steps, reps)
        if shortest:
            figures["shortest_step_ms"] = await _shortest_step(here, num_steps, reps)
        at_depths[f"depth_{depth}"] = figures
    facts = {name: value for name, value in asdict(setting).items() if name != "depth"}
    return {
        **facts,
        "modelled": setting.engine == "stub",
        "num_prompt_tokens": PROMPT_TOKENS,
        "num_output_tokens": setting.batch,
        "num_steps": num_steps,
        "reps": reps,
        "version": albireo.__version__,
        "num_cpus": os.cpu_count(),
        "python": platform.python_version(),
        "load_average_before": load_average[0],
        **at_depths,
    }


async def _measure_depth(setting: Setting, num_steps: int, reps: int) -> Figures:
    with counting_bar(reps * num_steps, f"depth {setting.depth}", "step") as bar:
        runs = await _run(setting, num_steps, reps, bar)
    return {**medians(runs), "runs": runs}


async def _shortest_step(setting: Setting, num_steps: int, reps: int) -> float | None:
    """The last step length of the ladder, from the longest down, at which the device idles for 1 % at most, by the
    median of the windows; None when that is not so at the longest."""
    held = None
    with counting_bar(len(LADDER_MS) * reps * num_steps, f"depth {setting.depth}, shortest step", "step") as bar:
        for step_ms in LADDER_MS:
            runs = await _run(replace(setting, step_ms=step_ms), num_steps, reps, bar)
            if medians(runs)["idle_fraction"] > MAX_IDLE_FRACTION:
                break
            held = step_ms
    return held


async def _run(setting: Setting, num_steps: int, reps: int, bar: Bar) -> list[Figures]:
    """Starts the services once and measures ``reps`` windows."""
    async with running(setting) as services:
        step_s = await warm_up(services)
        return [await measure(services, num_steps, step_s, bar.update) for _ in range(reps)]


def table(report: dict[str, Any]) -> str:
    """The report for people: a column per depth."""
    depths = [name for name in report if name.startswith("depth_")]
    device = "modelled" if report["modelled"] else report["model"]
    lines = [
        f"{report['engine']} ({device}) · TP {report['tp']} · {report['batch']} sequences, {report['clients']} clients",
        f"median of {report['reps']} windows of {report['num_steps']} steps; {report['num_cpus']} CPUs, "
        f"load before: {report['load_average_before']:.2f}",
        "",
        f"{'':22}" + "".join(f"{name.replace('_', ' '):>16}" for name in depths),
    ]
    for name, title in _ROWS.items():
        if any(name in report[depth] for depth in depths):
            lines.append(f"{title:22}" + "".join(f"{_shown(name, report[depth].get(name)):>16}" for depth in depths))
    lines += ["", f"{'exposed / total, us':22}"]
    for task in report[depths[0]]["tasks"]:
        times = [report[depth]["tasks"][task] for depth in depths]
        cells = [f"{each['exposed_us']:.0f} / {each['total_us']:.0f}" for each in times]
        lines.append(f"  {task:20}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "none" if name == "shortest_step_ms" else "-"
    return f"{100 * value:.2f}" if name.endswith("_fraction") else f"{value:.1f}"
