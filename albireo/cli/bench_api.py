"""``albireo bench api``: CPU time that each client API costs the servers, per request and per token.

The services run as in production, on a modelled device: the stub's clock. A fixed number of streaming clients asks for
outputs of a few lengths. What a request costs, over its length, is a line: its slope is a token's cost, and where it
meets zero is the request's own. The planner's steps count among the tokens.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import os
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import numpy as np

import albireo
from albireo.cli import client, ports
from albireo.cli.api_clients import PROMPT, Ask, http_clients, native_clients, vllm_clients
from albireo.cli.host_services import Services, Setting, running
from albireo.cli.json_file import write_json
from albireo.cli.progress import counting_bar
from albireo.v1 import generation_pb2 as pb

# What each API's requests pass through; a worker group costs the same whoever asks.
_PROCESSES = {
    "native": ("frontend-0", "planner"),
    "vllm": ("frontend-0", "planner"),
    "http": ("gateway", "frontend-0", "planner"),
}
_TITLES = {
    "native": "albireo.v1.Generation",
    "vllm": "vllm.grpc.engine.VllmEngine",
    "http": "OpenAI HTTP through smg",
}
_ALL = "all"
_NO_GATEWAY = "smg is not installed (extra gateway): HTTP is not measured"

# CPU of each process per request, us, by path, output length and process.
Costs = dict[str, dict[int, dict[str, float]]]


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = "Measure the servers' CPU time per request and per token of each client API (modelled device)."
    parser.add_argument("--streams", type=int, default=16, metavar="N", help="clients at once; default: %(default)s")
    parser.add_argument("--tokens", default="8,64,256", metavar="LIST", help="output lengths; default: %(default)s")
    parser.add_argument("--step-ms", type=float, default=10.0, metavar="S", help="of the stub; default: %(default)s")
    parser.add_argument("--window-s", type=float, default=3.0, metavar="S", help="per length; default: %(default)s")
    parser.add_argument("--reps", type=int, default=3, metavar="N", help="medians are over these; default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write the report here as one JSON object; - is stdout")


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    for name in ("streams", "reps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: at least 1 is needed")
    for name in ("step_ms", "window_s"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')}: more than 0 is needed")
    try:
        lengths = sorted({int(length) for length in args.tokens.split(",")})
    except ValueError:
        parser.error(f"--tokens {args.tokens}: whole numbers, separated by commas")
    if len(lengths) < 2 or lengths[0] < 1:
        parser.error(f"--tokens {args.tokens}: two lengths or more, of at least 1")
    report = asyncio.run(bench_api(args.streams, lengths, args.step_ms, args.window_s, args.reps))
    print(table(report), file=sys.stderr if args.json == "-" else sys.stdout)
    if args.json:
        write_json(args.json, report)
    return 0


async def bench_api(
    num_streams: int, lengths: Sequence[int], step_ms: float, window_s: float, reps: int
) -> dict[str, Any]:
    """The report: facts, and a row per path and process."""
    load_average = os.getloadavg()
    has_gateway = importlib.util.find_spec("smg") is not None
    paths = [path for path in _PROCESSES if has_gateway or path != "http"]
    setting = Setting(
        tp=1,
        # The slots of the stub's group decide how long its sequences may be.
        batch=max(num_streams, lengths[-1]),
        depth=2,
        step_ms=step_ms,
        clients="none",
        port=ports.check_port("127.0.0.1", 0, "--port"),
        http_port=ports.check_port("127.0.0.1", 0, "--http") if has_gateway else 0,
    )
    with counting_bar(reps * len(paths) * len(lengths), "client APIs", "window") as bar:
        async with running(setting) as services, contextlib.AsyncExitStack() as stack:
            clients = {
                path: await stack.enter_async_context(await _clients(path, setting, num_streams)) for path in paths
            }
            for asks in clients.values():
                await _measure(services, asks, lengths[0], 0.0)  # what comes first costs more
            runs = []
            for _ in range(reps):
                costs: Costs = {path: {} for path in paths}
                for path, asks in clients.items():
                    for length in lengths:
                        costs[path][length] = await _measure(services, asks, length, window_s)
                        bar.update()
                runs.append(costs)
    return {
        "engine": "stub",
        "modelled": True,
        "num_streams": num_streams,
        "num_output_tokens": list(lengths),
        "step_ms": step_ms,
        "window_s": window_s,
        "reps": reps,
        "version": albireo.__version__,
        "num_cpus": os.cpu_count(),
        "python": platform.python_version(),
        "load_average_before": load_average[0],
        "not_measured": None if has_gateway else _NO_GATEWAY,
        "rows": rows(runs),
    }


async def _clients(path: str, setting: Setting, num_streams: int) -> AbstractAsyncContextManager[list[Ask]]:
    target = f"127.0.0.1:{setting.port}"
    if path == "native":
        return native_clients(target, num_streams)
    async with client.connect(client.Server(target)) as (stub, info):
        if path == "http":
            return http_clients(setting.http_port, num_streams, info.name)
        # The same prompt, tokenised once.
        request = pb.GenerateRequest(text=PROMPT, sampling_params=pb.SamplingParams(max_tokens=1))
        (completion,) = await client.collect(stub, request)
    return vllm_clients(target, num_streams, completion.prompt_token_ids)


async def _measure(services: Services, asks: Sequence[Ask], num_tokens: int, window_s: float) -> dict[str, float]:
    """CPU time of each process per request, us. Each client asks again until the window is over, once at least; what
    runs then comes to its end."""
    before, end_at = services.cpu_ns(), time.monotonic() + window_s

    async def run(ask: Ask) -> int:
        num_requests = 0
        while not num_requests or time.monotonic() < end_at:
            await ask(num_tokens)
            num_requests += 1
        return num_requests

    num_requests = sum(await asyncio.gather(*map(run, asks)))
    return {name: (used_ns - before[name]) / 1e3 / num_requests for name, used_ns in services.cpu_ns().items()}


def rows(runs: Sequence[Costs]) -> list[dict[str, Any]]:
    """A row per path and process, and one for all of a path's; medians over the runs."""
    return [
        _row(path, process, [_of_process(run[path], processes) for run in runs])
        for path in runs[0]
        for process, processes in [*((name, (name,)) for name in _PROCESSES[path]), (_ALL, _PROCESSES[path])]
    ]


def _of_process(costs: Mapping[int, Mapping[str, float]], processes: Sequence[str]) -> dict[int, float]:
    return {length: sum(cost[process] for process in processes) for length, cost in costs.items()}


def _row(path: str, process: str, runs: Sequence[Mapping[int, float]]) -> dict[str, Any]:
    fits = [fit(costs) for costs in runs]
    return {
        "path": path,
        "process": process,
        "us_per_request": statistics.median(per_request for per_request, _ in fits),
        "us_per_token": statistics.median(per_token for _, per_token in fits),
        "us_by_num_tokens": {length: statistics.median(costs[length] for costs in runs) for length in runs[0]},
        "runs": [{"us_per_request": per_request, "us_per_token": per_token} for per_request, per_token in fits],
    }


def fit(costs: Mapping[int, float]) -> tuple[float, float]:
    """The line nearest to costs by number of tokens, as (cost of a request, cost of a token).

    Errors count in proportion to the costs, which differ by more than ten: else the longest outputs alone decide what
    a request costs.
    """
    lengths, values = np.array(list(costs), dtype=float), np.array(list(costs.values()))
    slope, intercept = np.polyfit(lengths, values, 1, w=1 / np.maximum(values, 1e-9))
    return float(intercept), float(slope)


def table(report: Mapping[str, Any]) -> str:
    """The report for people."""
    lengths = report["num_output_tokens"]
    lines = [
        f"stub (modelled) · {report['num_streams']} streams · steps of {report['step_ms']:g} ms · CPU time, us",
        f"median of {report['reps']}; {report['num_cpus']} CPUs, load before: {report['load_average_before']:.2f}",
        "",
        f"{'':14}{'per request':>12}{'per token':>12}" + "".join(f"{f'{length} tokens':>12}" for length in lengths),
    ]
    for row in report["rows"]:
        if row["process"] == _PROCESSES[row["path"]][0]:
            lines.append(_TITLES[row["path"]])
        costs = "".join(f"{row['us_by_num_tokens'][length]:>12.0f}" for length in lengths)
        lines.append(f"  {row['process']:12}{row['us_per_request']:>12.0f}{row['us_per_token']:>12.1f}{costs}")
    if report["not_measured"]:
        lines += ["", report["not_measured"]]
    return "\n".join(lines)
