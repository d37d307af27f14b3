"""``albireo serve``: starts all services on this machine, says when they are ready, heals them, stops them together."""

import argparse
import asyncio
import contextlib
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from albireo.allowances import TENANT_FLAGS, TenantFlags, load_allowances
from albireo.child import Child, Roll, python_module
from albireo.cli import client, gateway, ports, ready
from albireo.cli.run_dir import RunDir, open_run_dir
from albireo.config import flag, from_namespace, parser_for, to_argv
from albireo.errors import ConfigError
from albireo.kv.flags import KvFlags, load_secret
from albireo.model_spec import load_model_spec, resolve_model
from albireo.placement import choose_tp
from albireo.security import SECURITY_FLAGS, SecurityFlags, load_security
from albireo.supervise import supervise
from albireo.tracing import OTLP_FLAGS, TRACING_FLAGS, TracingFlags, check_tracing
from albireo.v1 import generation_pb2 as pb
from albireo.v1 import plan_pb2

# Longer than the services give their own processes to end.
_AFTER_DRAIN_S = 10.0

_ARENA_SOCKET = "kv-arena.sock"  # the store's name for it, in its run directory

_DESCRIPTION = """Serve a model on this machine: a worker group and the scheduler, on unix sockets, and a gRPC port
for clients; with --http, OpenAI's HTTP API as well. Ctrl-C stops everything; SIGUSR2 replaces the scheduler's
processes without losing a request."""


@dataclass(frozen=True)
class ServeConfig(KvFlags, TenantFlags, SecurityFlags, TracingFlags):
    """What can be chosen about a local server. 0 leaves a choice to the service concerned."""

    model: str = flag("demo", "'demo', a model directory in Hugging Face format, or a Hub id; as MODEL")
    served_model_name: str | None = flag(None, "name that clients see; else that of the directory or the Hub id")
    tp: int = flag(0, "tensor parallelism: ranks of the worker group; 0: 2 on a CPU where that is possible, else 1")
    host: str = flag("127.0.0.1", "address that clients connect to")
    port: int = flag(50051, "port that clients connect to; 0 picks a free one")
    http: int | None = flag(None, "port of OpenAI's HTTP API (extra 'gateway'); 0 picks a free one; absent: no HTTP")
    http_host: str = flag("127.0.0.1", "address that HTTP clients connect to; beyond loopback only with a key")
    http_api_key_file: str = flag("", "key that HTTP clients must send as a bearer token; empty: none")
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
    # Not on by default: all slots at full length fit the KV cache of a CPU, so there is nothing to swap, and a store
    # that ends with the server remembers little that the cache does not.
    kv_store_gib: float = flag(0.0, "memory of a KV store that is started as well; 0: none")
    redis: str = flag("", "redis://, rediss:// or unix:// URL of that store's second tier; empty: none")
    recovery_timeout: float = flag(30.0, "seconds that requests wait for a lost group or planner before they fail")
    drain_timeout: float = flag(20.0, "seconds that running requests get to finish on SIGTERM")
    run_dir: str | None = flag(None, "sockets and logs; else a temporary directory, kept when a service died")
    profile_dir: str | None = flag(None, "where StartProfile of the vLLM API writes to; else in the run directory")
    metrics_port: int = flag(
        0, "Prometheus: planner on this port P, worker leader on P+1, front ends from P+2 on, then HTTP; 0 is off"
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
    load_allowances(config)
    _check_kv_store(config)
    check_tracing(config.otlp_endpoint, config.otlp_sample_ratio)
    if config.ready_file:
        _forget(Path(config.ready_file))
    path = resolve_model(config.model)
    spec = load_model_spec(path)
    tp = config.tp or choose_tp(str(path), config.engine, config.device)
    if config.engine != "stub":  # which models any number of ranks
        spec.check_tp(tp)
    port = ports.check_port(config.host, config.port, "--port")
    http = _check_http(config, port)
    if config.metrics_port:
        num_stores = int(config.kv_store_gib > 0)
        for metrics_port in range(config.metrics_port, _store_metrics_port(config, http) + num_stores):
            if metrics_port in (port, http):
                raise ConfigError(
                    f"--metrics-port {config.metrics_port}: its range takes {metrics_port}, the clients' port"
                )
            ports.check_port(config.host, metrics_port, "--metrics-port")
    # The directory of a Hub id is named by a hash.
    name = config.served_model_name or (path.name if Path(config.model).is_dir() else config.model)
    return replace(config, model=str(path), served_model_name=name, tp=tp, port=port, http=http)


def _check_http(config: ServeConfig, port: int) -> int | None:
    """The port of the HTTP API, None without one; ``port`` is that of gRPC."""
    if config.http is None:
        if config.http_api_key_file:
            raise ConfigError(f"--http-api-key-file {config.http_api_key_file}: without --http nobody asks for the key")
        return None
    gateway.check_installed()
    for name in ("tls_cert", "auth_token_file"):
        if getattr(config, name):
            raise ConfigError(f"--http with --{name.replace('_', '-')}: the gateway has neither certificate nor token")
    http = ports.check_port(config.http_host, config.http, "--http", "--http-host")
    if http == port:
        raise ConfigError(f"--http {http}: gRPC clients connect to this port; HTTP needs one of its own")
    gateway.check_access(config.http_host, config.http_api_key_file)
    return http


def _gateway_metrics_port(config: ServeConfig) -> int:
    """The one after those of the front ends."""
    return config.metrics_port + 2 + config.frontends


def _store_metrics_port(config: ServeConfig, http: int | None) -> int:
    """The one after all others."""
    return _gateway_metrics_port(config) + (http is not None)


def _check_kv_store(config: ServeConfig) -> None:
    load_secret(config)
    if config.kv_store_gib < 0:
        raise ConfigError(f"--kv-store-gib {config.kv_store_gib:g}: must not be negative")
    if config.kv_store and config.kv_store_gib:
        raise ConfigError(f"--kv-store {config.kv_store} with --kv-store-gib {config.kv_store_gib:g}: one of them")
    if config.redis and not config.kv_store_gib:
        raise ConfigError("--redis: only a store that is started here, with --kv-store-gib, uses it")
    if config.kv_store.startswith("unix:"):
        raise ConfigError(f"--kv-store {config.kv_store}: host:port; --kv-store-gib starts a store on this machine")
    if (config.kv_store or config.kv_store_gib) and config.prefix_cache == "off":
        raise ConfigError("--prefix-cache off: a KV store needs it on")


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

    kv_store = config.kv_store or (f"unix:{run_dir.path}/kvstore.sock" if config.kv_store_gib else "")
    # Ranks of this machine share the store's memory.
    arena = config.kv_store or (f"unix:{run_dir.path}/{_ARENA_SOCKET}" if config.kv_store_gib else "")
    worker_flags = ["engine", "tp", "device", "dtype", "quantize", "sampler", "eager"]
    limits = ["max_num_seqs", "max_model_len", "max_num_batched_tokens", "kv_cache_gib"]
    worker = [
        *python_module("worker_svc"),
        *flags("model", *worker_flags, *limits, "stub_step_ms"),
        *("--listen", group, "--run-dir", str(run_dir.group)),
        *flags("log_level", *SECURITY_FLAGS, *OTLP_FLAGS),
        *(["--metrics-port", str(config.metrics_port + 1)] if config.metrics_port else []),
        *(["--kv-store", arena] if arena else []),
    ]
    scheduler = [
        *python_module("scheduler_svc"),
        *flags("model", "served_model_name"),
        *("--group", group, "--planner", f"unix:{run_dir.path}/planner.sock"),
        *flags("host", "port", "frontends", "depth"),
        *flags("max_waiting", "max_itl_ms", "prefix_cache", "max_streams", "recovery_timeout", "drain_timeout"),
        *("--run-dir", str(run_dir.path)),
        *flags("profile_dir", "log_level", "metrics_port", *TENANT_FLAGS, *SECURITY_FLAGS, *TRACING_FLAGS),
        *flags("kv_secret_file"),
        *(["--kv-store", kv_store, *flags("swap")] if kv_store else []),
    ]
    return [
        *([_kv_store(config, run_dir, env)] if config.kv_store_gib else []),
        Child("worker", worker, run_dir.logs / "worker.log", env, supervises=True),
        # Stopped before the worker, which it needs to finish what clients wait for.
        Child("scheduler", scheduler, run_dir.logs / "scheduler.log", env, stage=1, supervises=True),
        *([] if config.http is None else [_gateway(config, run_dir, env)]),
    ]


def _kv_store(config: ServeConfig, run_dir: RunDir, env: Mapping[str, str]) -> Child:
    argv = [
        *python_module("kvstore_svc"),
        *("--listen", f"unix:{run_dir.path}/kvstore.sock", "--run-dir", str(run_dir.path)),
        *("--arena-gib", str(config.kv_store_gib), "--segment-mib", str(min(64.0, config.kv_store_gib * 1024))),
        *to_argv(config, "log_level", *SECURITY_FLAGS),
        *(["--metrics-port", str(_store_metrics_port(config, config.http))] if config.metrics_port else []),
    ]
    # The URL may hold a password: not for a command line.
    redis = {"ALBIREO_REDIS": config.redis} if config.redis else {}
    # It need not be there for requests to be served, and what it holds is lost with it.
    return Child("kvstore", argv, run_dir.logs / "kvstore.log", {**env, **redis}, roll=Roll.KEEP)


def _gateway(config: ServeConfig, run_dir: RunDir, env: Mapping[str, str]) -> Child:
    argv = [
        *python_module("albireo.cli.gateway"),
        *("--target", client_target(config), "--host", config.http_host, "--port", str(config.http)),
        *(["--http-api-key-file", config.http_api_key_file] if config.http_api_key_file else []),
        *to_argv(config, "recovery_timeout", "drain_timeout", "log_level"),
        *(["--metrics-port", str(_gateway_metrics_port(config))] if config.metrics_port else []),
    ]
    # Stopped before the scheduler, which it needs to finish what clients wait for. It goes on when that is replaced.
    return Child("gateway", argv, run_dir.logs / "gateway.log", env, stage=2, roll=Roll.KEEP)


def _own_variables() -> set[str]:
    return {"ALBIREO_" + each.name.upper() for each in fields(ServeConfig)}


async def _serve(config: ServeConfig, run_dir: RunDir) -> int:
    security = load_security(config)

    async def announce() -> None:
        info = await ready.wait_for_group(client.Server(f"unix:{run_dir.path}/group.sock", security))
        # Each by its own address: on the shared port a check reaches just one of them.
        frontends = [
            client.Server(f"unix:{run_dir.path}/frontend-{index}.sock", security) for index in range(config.frontends)
        ]
        for frontend in frontends:
            await ready.wait_until_serving(frontend)
        if config.http is not None:
            api_key = gateway.load_api_key(config.http_api_key_file)
            await gateway.wait_until_ready(ports.reachable(config.http_host), config.http, api_key)
        print(ready_message(config, info, run_dir), flush=True)
        if config.first_prompt:
            await _show_completion(frontends[0], config.first_prompt)
        if config.ready_file:
            _write_whole(Path(config.ready_file), client_target(config) + "\n")

    run_dir.keep = True  # for the logs, until all is known to have gone well
    grace_s = config.drain_timeout + _AFTER_DRAIN_S
    status = await supervise(child_processes(config, run_dir), beside=announce, grace_s=grace_s)
    run_dir.keep = status in (1, 2) or config.run_dir is not None
    return status


async def _show_completion(server: client.Server, prompt: str) -> None:
    """Streams one completion to the terminal: what a client would see."""
    request = pb.GenerateRequest(text=prompt, sampling_params=pb.SamplingParams(max_tokens=64, seed=0))
    async with client.connect(server) as (stub, _):
        print(f"\n{prompt}", end="", flush=True)
        async for response in client.stream(stub, request):
            print(response.text, end="", flush=True)
    print("\n", flush=True)


def client_target(config: ServeConfig) -> str:
    """Where a client on this machine reaches the server."""
    return ports.address(config.host, config.port)


def ready_message(config: ServeConfig, info: plan_pb2.GroupInfo, run_dir: RunDir) -> str:
    target = client_target(config)
    query = "albireo generate 'def fibonacci(n):' --max-tokens 64"
    if target != client.DEFAULT_TARGET:
        query += f" --target {shlex.quote(target)}"
    http = ""
    if config.http is not None:
        command = gateway.example(config.served_model_name, config.http_host, config.http, config.http_api_key_file)
        http = f"  HTTP:  {command}\n"
    device = "modelled" if info.engine == "stub" else f"{info.device} {info.dtype}"
    return (
        f"{config.served_model_name} is served at {target} ({info.engine}, {device}, TP {info.tp_size}); "
        f"Ctrl-C stops it\n"
        f"  query: {query}\n{http}"
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
