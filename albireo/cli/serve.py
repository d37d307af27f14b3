"""``albireo serve``: starts all services on this machine, says when they are ready, heals them, stops them together."""

import argparse
import asyncio
import contextlib
import errno
import math
import os
import shlex
import socket
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from albireo.child import Child, python_module
from albireo.cli import client, ready
from albireo.cli.run_dir import RunDir, open_run_dir
from albireo.config import flag, from_namespace, parser_for, to_argv
from albireo.errors import ConfigError
from albireo.model_spec import load_model_spec, resolve_model
from albireo.placement import choose_tp
from albireo.supervise import supervise
from albireo.v1 import generation_pb2 as pb
from albireo.v1 import plan_pb2

# Longer than the services give their own processes to end.
_AFTER_DRAIN_S = 10.0

_DESCRIPTION = """Serve a model on this machine: a worker group and the scheduler, on unix sockets, and a gRPC port
for clients. Ctrl-C stops everything; SIGUSR2 replaces the scheduler's processes without losing a request."""


@dataclass(frozen=True)
class ServeConfig:
    """What can be chosen about a local server. 0 leaves a choice to the service concerned."""

    model: str = flag("demo", "'demo', a model directory in Hugging Face format, or a Hub id; as MODEL")
    served_model_name: str | None = flag(None, "name that clients see; else that of the directory or the Hub id")
    tp: int = flag(0, "tensor parallelism: ranks of the worker group; 0: 2 on a CPU where that is possible, else 1")
    host: str = flag("127.0.0.1", "address that clients connect to")
    port: int = flag(50051, "port that clients connect to; 0 picks a free one")
    frontends: int = flag(1, "front-end processes, all on the one port")
    depth: int = flag(2, "steps planned ahead of the device")
    engine: str = flag("torch", "what runs the model; stub models a device and runs none", ("torch", "stub"))
    device: str = flag("auto", "auto is cuda where there is one", ("auto", "cpu", "cuda"))
    dtype: str = flag("auto", "auto is the checkpoint's", ("auto", "float32", "bfloat16"))
    quantize: str = flag("none", "w8a8: weights and activations in 8 bits, on a CPU", ("none", "w8a8"))
    sampler: str = flag("merge", "how ranks share out sampling", ("merge", "batch-sharded", "gather"))
    eager: bool = flag(False, "on a CPU, run the model op by op in torch, not as compiled kernels; slow")
    max_num_seqs: int = flag(0, "sequences that run at once; 0: the worker's default")
    max_model_len: int = flag(0, "tokens of prompt and output together; 0: the model's")
    max_num_batched_tokens: int = flag(0, "tokens of one step; 0: the worker's default")
    kv_cache_gib: float = flag(0.0, "KV cache of each rank; 0: chosen by the worker")
    max_waiting: int = flag(4096, "sequences that may wait; more are refused with RESOURCE_EXHAUSTED")
    max_streams: int = flag(
        4096, "requests that one front end serves at once; more are refused with RESOURCE_EXHAUSTED"
    )
    max_itl_ms: float = flag(
        0.0, "prompts are computed in chunks so small that running sequences wait no longer for a token; 0: no limit"
    )
    prefix_cache: str = flag("on", "sequences of a tenant that begin alike share KV blocks", ("on", "off"))
    recovery_timeout: float = flag(30.0, "seconds that requests wait for a lost group or planner before they fail")
    drain_timeout: float = flag(20.0, "seconds that running requests get to finish on SIGTERM")
    run_dir: str | None = flag(None, "sockets and logs; else a temporary directory, kept when a service died")
    metrics_port: int = flag(
        0, "Prometheus: planner on this port P, worker leader on P+1, front ends from P+2 on; 0 is off"
    )
    first_prompt: str | None = flag(None, "once ready, complete this prompt and show the text, then go on serving")
    stub_step_ms: float = flag(0.0, "how long a step of the stub engine lasts (modelled)")
    ready_file: str | None = flag(None, "this file gets the address once the server is ready")
    log_level: str = flag("info", "of the services' logs", ("debug", "info", "warning", "error"))


def run(argv: Sequence[str]) -> int:
    config = check_config(parse_config(argv))
    with open_run_dir(config.run_dir) as run_dir:
        return asyncio.run(_serve(config, run_dir))


def parse_config(argv: Sequence[str]) -> ServeConfig:
    parser = parser_for(ServeConfig, "albireo serve", _DESCRIPTION)
    # No default of its own, which would hide the one of --model.
    parser.add_argument("positional_model", nargs="?", metavar="MODEL", default=argparse.SUPPRESS, help="as --model")
    namespace = parser.parse_args(list(argv))  # type: ignore[no-untyped-call]  # ConfigArgParse ships no types
    namespace.model = getattr(namespace, "positional_model", namespace.model)
    return from_namespace(ServeConfig, namespace)


def check_config(config: ServeConfig) -> ServeConfig:
    """Resolves model and port; raises ConfigError for what could not work, before anything is started."""
    for name in ("frontends", "depth", "max_waiting", "max_streams"):
        if getattr(config, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(config, name)}: at least 1 is needed")
    for name in ("tp", "max_num_seqs", "max_model_len", "max_num_batched_tokens", "kv_cache_gib", "max_itl_ms"):
        if getattr(config, name) < 0:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(config, name)}: must not be negative")
    for name in ("recovery_timeout", "drain_timeout"):
        if not 0 < getattr(config, name) < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(config, name)}: a positive number is needed")
    if config.ready_file:
        _forget(Path(config.ready_file))
    path = resolve_model(config.model)
    spec = load_model_spec(path)
    tp = config.tp or choose_tp(str(path), config.engine, config.device)
    if config.engine != "stub":  # which models any number of ranks
        spec.check_tp(tp)
    port = _check_port(config.host, config.port, "--port")
    if config.metrics_port:
        for metrics_port in range(config.metrics_port, config.metrics_port + 2 + config.frontends):
            if metrics_port == port:
                raise ConfigError(f"--metrics-port {config.metrics_port}: its range takes {port}, the clients' port")
            _check_port(config.host, metrics_port, "--metrics-port")
    # The directory of a Hub id is named by a hash.
    name = config.served_model_name or (path.name if Path(config.model).is_dir() else config.model)
    return replace(config, model=str(path), served_model_name=name, tp=tp, port=port)


def _check_port(host: str, port: int, flag_name: str) -> int:
    """The port itself, or a free one for 0. Raises ConfigError when nothing could listen there."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"{flag_name} {port}: not a port (0 to 65535)")
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ConfigError(f"--host {host}: {error.strerror}") from error
    bound: list[int] = []
    errors: list[OSError] = []
    for family, kind, protocol, _, address in addresses:
        try:
            with socket.socket(family, kind, protocol) as probe:
                # Connections that an earlier server has closed must not be in the way. Not SO_REUSEPORT: it would
                # share the port with a server that runs.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                bound.append(probe.getsockname()[1])
        except OSError as error:
            errors.append(error)
    # A name may have an IPv6 address on a machine without IPv6; only a port in use is wrong at any of them.
    for each in errors:
        if each.errno == errno.EADDRINUSE or not bound:
            hint = " (is a server running already? --port 0 picks a free one)" if flag_name == "--port" else ""
            raise ConfigError(f"{flag_name} {port}: cannot listen at {host}:{port}: {each.strerror}{hint}") from each
    return bound[0]


def child_processes(config: ServeConfig, run_dir: RunDir) -> list[Child]:
    """The services, in the order in which they start."""
    group = f"unix:{run_dir.path}/group.sock"
    # Zero means "your own default", and what this command was told must not reach the services a second way.
    given = [each.name for each in fields(config) if getattr(config, each.name)]
    env = {key: value for key, value in os.environ.items() if key not in _own_variables()}
    env["PYTHONUNBUFFERED"] = "1"
    env["PYTHONFAULTHANDLER"] = "1"

    def flags(*names: str) -> list[str]:
        return to_argv(config, *(name for name in names if name in given))

    worker_flags = ["engine", "tp", "device", "dtype", "quantize", "sampler", "eager"]
    limits = ["max_num_seqs", "max_model_len", "max_num_batched_tokens", "kv_cache_gib"]
    worker = [
        *python_module("worker_svc"),
        *flags("model", *worker_flags, *limits, "stub_step_ms"),
        *("--listen", group, "--run-dir", str(run_dir.group)),
        *flags("log_level"),
        *(["--metrics-port", str(config.metrics_port + 1)] if config.metrics_port else []),
    ]
    scheduler = [
        *python_module("scheduler_svc"),
        *flags("model", "served_model_name"),
        *("--group", group, "--planner", f"unix:{run_dir.path}/planner.sock"),
        *flags("host", "port", "frontends", "depth"),
        *flags("max_waiting", "max_itl_ms", "prefix_cache", "max_streams", "recovery_timeout", "drain_timeout"),
        *("--run-dir", str(run_dir.path)),
        *flags("log_level", "metrics_port"),
    ]
    return [
        Child("worker", worker, run_dir.logs / "worker.log", env, supervises=True),
        # Stopped before the worker, which it needs to finish what clients wait for.
        Child("scheduler", scheduler, run_dir.logs / "scheduler.log", env, stage=1, supervises=True),
    ]


def _own_variables() -> set[str]:
    return {"ALBIREO_" + each.name.upper() for each in fields(ServeConfig)}


async def _serve(config: ServeConfig, run_dir: RunDir) -> int:
    async def announce() -> None:
        info = await ready.wait_for_group(f"unix:{run_dir.path}/group.sock")
        # Each by its own address: on the shared port a check reaches just one of them.
        for index in range(config.frontends):
            await ready.wait_until_serving(f"unix:{run_dir.path}/frontend-{index}.sock")
        print(ready_message(config, info, run_dir), flush=True)
        if config.first_prompt:
            await _show_completion(client_target(config), config.first_prompt)
        if config.ready_file:
            _write_whole(Path(config.ready_file), client_target(config) + "\n")

    run_dir.keep = True  # for the logs, until all is known to have gone well
    grace_s = config.drain_timeout + _AFTER_DRAIN_S
    status = await supervise(child_processes(config, run_dir), beside=announce, grace_s=grace_s)
    run_dir.keep = status in (1, 2) or config.run_dir is not None
    return status


async def _show_completion(target: str, prompt: str) -> None:
    """Streams one completion to the terminal: what a client would see."""
    request = pb.GenerateRequest(text=prompt, sampling_params=pb.SamplingParams(max_tokens=64, seed=0))
    async with client.connect(target) as (stub, _):
        print(f"\n{prompt}", end="", flush=True)
        async for response in client.stream(stub, request):
            print(response.text, end="", flush=True)
    print("\n", flush=True)


def client_target(config: ServeConfig) -> str:
    """Where a client on this machine reaches the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)  # noqa: S104  # compared, not bound
    return f"[{host}]:{config.port}" if ":" in host else f"{host}:{config.port}"


def ready_message(config: ServeConfig, info: plan_pb2.GroupInfo, run_dir: RunDir) -> str:
    target = client_target(config)
    query = "albireo generate 'def fibonacci(n):' --max-tokens 64"
    if target != client.DEFAULT_TARGET:
        query += f" --target {shlex.quote(target)}"
    device = "modelled" if info.engine == "stub" else f"{info.device} {info.dtype}"
    return (
        f"{config.served_model_name} is served at {target} ({info.engine}, {device}, TP {info.tp_size}); "
        f"Ctrl-C stops it\n"
        f"  query: {query}\n"
        f"  logs:  {run_dir.logs}"
    )


def _forget(ready_file: Path) -> None:
    """Removes the ready file of an earlier run, and finds out in time that a new one could not be written."""
    if not ready_file.absolute().parent.is_dir():
        raise ConfigError(f"--ready-file {ready_file}: its directory does not exist")
    try:
        ready_file.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"--ready-file {ready_file}: {error.strerror}") from error


def _write_whole(file: Path, content: str) -> None:
    """Whoever finds the file finds all of it."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_text(content)
        temporary.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ConfigError(f"--ready-file {file}: {error.strerror}") from error
