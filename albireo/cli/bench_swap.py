"""``albireo bench swap``: what KV blocks on their way to and from a KV store cost the steps, on a modelled device; with
--model, whether moving them is quicker than computing, and whether the planner chooses right."""

import argparse
import asyncio
import os
import platform
import sys
from typing import Any

import albireo
from albireo.cli import swap_choice, swap_traffic
from albireo.cli.json_file import write_json
from albireo.cli.progress import counting_bar


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.add_argument("--model", metavar="MODEL", help="directory, Hub id or 'demo'; without it, a modelled device")
    parser.add_argument("--tp", type=int, default=2, metavar="T", help="ranks; default: %(default)s")
    parser.add_argument("--reps", type=int, default=3, metavar="N", help="medians are over these; default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write the report here as one JSON object; - is stdout")
    device = parser.add_argument_group("modelled device")
    device.add_argument("--batch", type=int, default=32, metavar="B", help="sequences at a time; default: %(default)s")
    device.add_argument("--step-ms", type=float, default=10.0, metavar="S", help="default: %(default)s")
    device.add_argument("--steps", type=int, default=2000, metavar="N", help="of a window; default: %(default)s")
    model = parser.add_argument_group("model")
    model.add_argument("--requests", type=int, default=8, metavar="N", help="of two tenants; default: %(default)s")
    model.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="default: %(default)s")
    model.add_argument("--output-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    model.add_argument("--blocks", type=int, default=67, metavar="N", help="of the pool; default: %(default)s")


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    for name in ("tp", "reps", "batch", "steps", "requests", "prompt_tokens", "output_tokens", "blocks"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: at least 1 is needed")
    if args.step_ms <= 0:
        parser.error("--step-ms: more than 0 is needed")
    load_average = os.getloadavg()
    shown, measured = _measure_choice(args) if args.model else _measure_traffic(args)
    report = {
        "version": albireo.__version__,
        "num_cpus": os.cpu_count(),
        "python": platform.python_version(),
        "load_average_before": load_average[0],
        "reps": args.reps,
        **measured,
    }
    print(shown, file=sys.stderr if args.json == "-" else sys.stdout)
    if args.json:
        write_json(args.json, report)
    return 0


def _measure_traffic(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    num_windows = len(swap_traffic.settings(args.tp, args.batch, args.step_ms)) * args.reps
    with counting_bar(num_windows * args.steps, "swap", "step") as bar:
        report = asyncio.run(
            swap_traffic.measure_traffic(args.tp, args.batch, args.step_ms, args.steps, args.reps, bar)
        )
    return swap_traffic.table(report), report


def _measure_choice(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    crowd = swap_choice.Crowd(args.requests, args.prompt_tokens, args.output_tokens, args.blocks)
    with counting_bar(len(swap_choice.MODES) * args.reps, "swap", "run") as bar:
        report = asyncio.run(swap_choice.measure_choice(args.model, args.tp, crowd, args.reps, bar))
    return swap_choice.table(report), report
