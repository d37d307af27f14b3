"""``albireo bench``: measures a running server through its own API, or this machine: the services on it (`bench_host`),
what each client API costs them (`bench_api`), its kernels (`bench_kernels`), its sampling schemes (`bench_sampling`),
its KV store (`bench_kv`, `bench_swap`), and how near a server comes to what the machine can do (`bench_roofline`)."""

import argparse
import asyncio
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from albireo.cli import (
    bench_api,
    bench_host,
    bench_kernels,
    bench_kv,
    bench_roofline,
    bench_sampling,
    bench_swap,
    client,
)
from albireo.cli.bench_load import SAMPLING, Workload, run_load
from albireo.cli.json_file import write_json
from albireo.cli.progress import counting_bar

_METRICS = ("out_tok_s", "total_tok_s", "ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms")

# Commands whose flags are another program's.
_PROGRAMS = {"kernels": bench_kernels.run, "sampling": bench_sampling.run}

WORKLOADS = {
    "chat": Workload(32, 32, 128, 64),
    "decode": Workload(16, 8, 16, 128),
    "prefill": Workload(8, 8, 1024, 8),
    "single": Workload(3, 1, 16, 128),
}


def run(argv: Sequence[str]) -> int:
    if argv and argv[0] in _PROGRAMS:
        return _PROGRAMS[argv[0]](argv[1:])
    parser = argparse.ArgumentParser(prog="albireo bench", description="Measure a running server, or this machine.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_serve(commands.add_parser("serve", help="rates and latencies of one workload", description=_describe()))
    host = commands.add_parser("host", help="idle time of the device and CPU per step, with services of its own")
    bench_host.add_flags(host)
    api = commands.add_parser("api", help="CPU per request and per token of each client API, with services of its own")
    bench_api.add_flags(api)
    commands.add_parser("kernels", help="compiled kernels against what this machine's memory and cores can do")
    commands.add_parser("sampling", help="ways to share out sampling among ranks, on this machine's cores")
    kv = commands.add_parser("kv", help="parts to and from a KV store of its own, against plain copies")
    bench_kv.add_flags(kv)
    swap = commands.add_parser("swap", help="what KV blocks on their way cost the steps, and when moving them pays")
    bench_swap.add_flags(swap)
    roofline = commands.add_parser("roofline", help="decode steps of a server against the same")
    bench_roofline.add_flags(roofline)
    args = parser.parse_args(argv)
    if args.command == "host":
        return bench_host.run(host, args)
    if args.command == "api":
        return bench_api.run(api, args)
    if args.command == "kv":
        return bench_kv.run(kv, args)
    if args.command == "swap":
        return bench_swap.run(swap, args)
    if args.command == "roofline":
        return bench_roofline.run(roofline, args)
    if args.reps < 1:
        parser.error("--reps: at least 1 is needed")
    report = asyncio.run(_bench_serve(client.server_of(args), args.workload, args.sampling, args.reps))
    # With `--json -` stdout belongs to the JSON.
    print(table(report), file=sys.stderr if args.json == "-" else sys.stdout)
    if args.json:
        write_json(args.json, report)
    return 0


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    client.add_server_flags(parser)
    parser.add_argument("--workload", choices=list(WORKLOADS), default="chat", help="default: %(default)s")
    parser.add_argument("--sampling", choices=list(SAMPLING), default="greedy", help="default: %(default)s")
    parser.add_argument("--reps", type=int, default=3, metavar="N", help="medians are over these; default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write the report here as one JSON object; - is stdout")


def _describe() -> str:
    shapes = [
        f"  {name:8} {shape.num_requests:3} requests, {shape.concurrency:2} at a time, "
        f"{shape.num_prompt_tokens:4} -> {shape.num_output_tokens:3} tokens"
        for name, shape in WORKLOADS.items()
    ]
    return "Workloads, made shorter where the model's context is:\n" + "\n".join(shapes)


async def _bench_serve(server: client.Server, workload: str, sampling: str, reps: int) -> dict[str, Any]:
    """Runs the workload ``reps`` times; medians, the single runs, and what was measured."""
    async with client.connect(server) as (stub, info):
        shape = WORKLOADS[workload].clamped(info.max_model_len)
        with counting_bar(reps * shape.num_requests, f"{workload}, {sampling}", "req") as bar:
            runs = await run_load(stub, shape, info.vocab_size, reps=reps, sampling=sampling, on_done=bar.update)
    return {
        "workload": workload,
        "sampling": sampling,
        "model": info.name,
        "engine": info.engine,
        "tp": info.tp_size,
        "dtype": info.dtype,
        "modelled": info.engine == "stub",
        **{name: statistics.median(run[name] for run in runs) for name in _METRICS},
        **asdict(shape),
        "reps": reps,
        "runs": runs,
    }


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    engine = report["engine"] + (" (modelled)" if report["modelled"] else "")
    lines = [
        f"{report['model']} · {engine} · TP {report['tp']} · {report['dtype']}",
        f"{report['workload']}, {report['sampling']}: {report['num_requests']} requests, "
        f"{report['concurrency']} at a time, {report['num_prompt_tokens']} -> {report['num_output_tokens']} tokens",
        "",
        f"{'median of ' + str(report['reps']):16}{'':>10}{'lowest':>12}{'highest':>12}",
    ]
    for name in _METRICS:
        values = [run[name] for run in report["runs"]]
        lines.append(f"{name:16}{report[name]:>10.2f}{min(values):>12.2f}{max(values):>12.2f}")
    return "\n".join(lines)
