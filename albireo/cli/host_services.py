"""The services that `albireo bench host`, `api` and `swap` measure: started for one setting, watched, and ended."""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from albireo.child import Child, Process, python_module
from albireo.cli import processes
from albireo.cli.run_dir import RunDir, open_run_dir
from albireo.errors import AlbireoError, GroupError

PROMPT_TOKENS = 32
_START_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 10.0
_REPORT_TIMEOUT_S = 20.0  # clients are niced, and may have half a million latencies to sort
_BLOCK_SIZE = 32
_STORE, _ARENA = "kv-store", "kv-arena"  # the store makes the latter's socket
_ARENA_GIB = 4.0  # used as it fills
_MIN_BATCHED_TOKENS = 4096
_CLIENT_NICE = 10
# Front ends limit the age of connections to half of it: within a window none is to be replaced.
_DRAIN_TIMEOUT_S = 3600


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        batch: sequences that run all the time.
        prompt_tokens, output_tokens: of each; 0: outputs have as many as there are sequences, so that about one ends
            per step.
        kv_cache_gib: of each rank; 0: what all sequences need.
        step_ms: how long the stub's clock makes a step; 0 with another engine, or where a device is modelled.
        clients: "internal" (a front end that only counts), "grpc" (real front ends, and clients that stream) or "none"
            (real front ends, and whoever starts them has clients of its own).
        port: of the front ends, beside a socket each; 0: none.
        http_port: of a gateway before that port; 0: none.
        metrics_port: of the planner; 0: none.
        swap: with a KV store, which is used like this; empty: there is none.
        frontend_nice: of real front ends. Clients are niced by 10: they stand in for other machines.
    """

    tp: int
    batch: int
    depth: int
    step_ms: float = 0.0
    engine: str = "stub"
    model: str = "demo"
    stub_device: str | None = None
    stub_model: str | None = None
    clients: str = "internal"
    frontends: int = 1
    frontend_nice: int = 0
    port: int = 0
    http_port: int = 0
    metrics_port: int = 0
    prompt_tokens: int = PROMPT_TOKENS
    output_tokens: int = 0
    kv_cache_gib: float = 0.0
    swap: str = ""

    @property
    def num_output_tokens(self) -> int:
        return self.output_tokens or self.batch


class Services:
    """Running services of one setting; an async context manager.

    Raises GroupError, with the end of its log, when a service ends by itself or is not ready in time.
    """

    def __init__(self, setting: Setting, run_dir: RunDir) -> None:
        self.setting = setting
        self._path = run_dir.path
        self._logs = run_dir.logs
        self._group_dir = run_dir.group
        self._running: dict[str, Process] = {}  # in the order in which they started
        self._servers: dict[str, int] = {}
        self._num_windows = 0

    async def __aenter__(self) -> "Services":
        try:
            for children in stages(self.setting, self._path, self._group_dir, self._logs):
                await self._start(children)
            self._servers = self._find_servers()
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._end()

    @property
    def ledgers(self) -> list[str]:
        """Where ledgers are read; the first answers for the planner and the ranks as well."""
        if self.setting.clients == "internal":
            return [_socket(self._path, "load")]
        return [_socket(self._path, f"frontend-{index}") for index in range(self.setting.frontends)]

    def check(self) -> None:
        """Raises GroupError when a service has ended."""
        for process in self._running.values():
            if process.exited.done():
                raise GroupError(process.report())

    def cpu_ns(self) -> dict[str, int]:
        """CPU time so far of each server process: planner, rank-0 ..., frontend-0 ... and the group's supervisor.

        Raises GroupError when a rank has died, though its supervisor has started another one.
        """
        self.check()
        used = {name: processes.cpu_ns(pid) for name, pid in self._servers.items()}
        for name, cpu_ns in used.items():
            if not cpu_ns:
                raise GroupError(f"{name} has died meanwhile; its log is in {self._group_dir}/logs")
        return used

    def _find_servers(self) -> dict[str, int]:
        """Process ids by names; the clients' process is one only where it stands for a front end."""
        pids = {name: process.pid for name, process in self._running.items()}
        load = pids.pop("load", 0)
        if self.setting.clients == "internal":
            pids["frontend-0"] = load
        for pid in processes.descendants(pids["worker"]):
            if rank := processes.option(processes.command_line(pid), "--rank"):
                pids[f"rank-{rank}"] = pid
        return pids

    async def turn_window(self) -> dict[str, Any]:
        """Ends the clients' window and begins the next one; returns what they saw. GroupError: they do not answer."""
        self._running["load"].send_signal(signal.SIGUSR1)
        wanted, self._num_windows = self._num_windows, self._num_windows + 1
        deadline = time.monotonic() + _REPORT_TIMEOUT_S
        while time.monotonic() < deadline:
            self.check()
            report = _read_report(_report_file(self._path))
            if report.get("window") == wanted:
                return report
            await asyncio.sleep(0.01)
        raise GroupError(f"the clients did not report within {_REPORT_TIMEOUT_S:g} s")

    async def _start(self, children: Sequence[Child]) -> None:
        for child in children:
            self._running[child.name] = await Process.start(child, self._path)
        for child in children:
            process = self._running[child.name]
            waits: list[asyncio.Future[Any]] = [process.ready, process.exited]
            await asyncio.wait(waits, timeout=_START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            self.check()
            if not process.ready.done():
                process.kill()
                await process.exited
                raise GroupError(process.report(f" after {_START_TIMEOUT_S:g} s without being ready"))

    async def _end(self) -> None:
        """Clients first, the worker group last."""
        for process in reversed(self._running.values()):
            process.terminate()
            await asyncio.wait([process.exited], timeout=_END_TIMEOUT_S)
            if not process.exited.done():
                process.kill()
                await process.exited
        self._running.clear()
        _report_file(self._path).unlink(missing_ok=True)


@asynccontextmanager
async def running(setting: Setting) -> AsyncIterator[Services]:
    """Services in a run directory of their own. The logs stay where something fails."""
    with open_run_dir(None) as run_dir:
        try:
            async with Services(setting, run_dir) as services:
                yield services
        except AlbireoError:
            run_dir.keep = True
            raise


def stages(setting: Setting, path: Path, group_dir: Path, logs: Path) -> list[list[Child]]:
    """The services, in the order in which they start; those of one stage start together."""
    # What this command's user has set for other services must not reach these.
    env = {key: value for key, value in os.environ.items() if not key.startswith("ALBIREO_")}
    env |= {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}

    def child(name: str, argv: Sequence[str], nice: int = 0) -> Child:
        prefix = ["nice", "-n", str(nice)] if nice else []
        return Child(name, [*prefix, *argv], logs / f"{name}.log", env)

    planner = _socket(path, "planner")
    clients = [child("gateway", _gateway_argv(setting))] if setting.http_port else []
    if setting.clients != "none":
        clients.append(child("load", _load_argv(setting, path), 0 if setting.clients == "internal" else _CLIENT_NICE))
    store = {"kv_store": _socket(path, _STORE), "swap": setting.swap} if setting.swap else {}
    return [
        *([[child("kvstore", _store_argv(path))]] if setting.swap else []),
        [child("worker", _worker_argv(setting, path, group_dir))],
        [
            child(
                "planner",
                _scheduler_argv(
                    "planner",
                    group=_socket(path, "group"),
                    planner=planner,
                    depth=setting.depth,
                    max_waiting=max(4096, 2 * setting.batch),
                    metrics_port=setting.metrics_port,
                    **store,
                ),
            )
        ],
        [
            child(
                f"frontend-{index}",
                _scheduler_argv(
                    "frontend",
                    model=setting.model,
                    planner=planner,
                    port=setting.port,
                    name=f"frontend-{index}",
                    listen=_socket(path, f"frontend-{index}"),
                    max_streams=max(4096, 2 * setting.batch),
                    drain_timeout=_DRAIN_TIMEOUT_S,
                ),
                setting.frontend_nice,
            )
            for index in range(setting.frontends if setting.clients != "internal" else 0)
        ],
        clients,
    ]


def _worker_argv(setting: Setting, path: Path, group_dir: Path) -> list[str]:
    flags: dict[str, object] = {
        "engine": "torch" if setting.engine == "eager" else setting.engine,
        "model": setting.model,
        "tp": setting.tp,
        "listen": _socket(path, "group"),
        "run_dir": group_dir,
        "max_num_seqs": setting.batch,
        # A prompt and an output, and what is sampled past its end.
        "max_model_len": -(-(setting.prompt_tokens + setting.num_output_tokens + 8) // _BLOCK_SIZE) * _BLOCK_SIZE,
        "kv_cache_gib": setting.kv_cache_gib,
    }
    flags |= {"kv_store": _socket(path, _ARENA)} if setting.swap else {}
    if setting.engine == "stub":
        flags |= {"stub_mode": "clock", "max_num_batched_tokens": max(_MIN_BATCHED_TOKENS, 2 * setting.batch)}
        flags |= {"stub_step_ms": setting.step_ms} if setting.step_ms else {}
        flags |= {"stub_device": setting.stub_device} if setting.stub_device else {}
        flags |= {"stub_model": setting.stub_model} if setting.stub_model else {}
    eager = ["--eager"] if setting.engine == "eager" else []
    return [*python_module("worker_svc"), *_flags(**flags), *eager]


def _store_argv(path: Path) -> list[str]:
    flags = _flags(listen=_socket(path, _STORE), run_dir=path, arena_gib=_ARENA_GIB)
    return [*python_module("kvstore_svc"), *flags]


def _gateway_argv(setting: Setting) -> list[str]:
    flags = _flags(target=f"127.0.0.1:{setting.port}", port=setting.http_port)
    return [*python_module("albireo.cli.gateway"), *flags]


def _load_argv(setting: Setting, path: Path) -> list[str]:
    if setting.clients == "internal":
        where = {"planner": _socket(path, "planner"), "listen": _socket(path, "load"), "name": "frontend-0"}
    else:
        where = {"target": ",".join(_socket(path, f"frontend-{index}") for index in range(setting.frontends))}
    return _scheduler_argv(
        "load",
        **where,
        streams=setting.batch,
        prompt_tokens=setting.prompt_tokens,
        output_tokens=setting.num_output_tokens,
        report=_report_file(path),
    )


def _scheduler_argv(command: str, **flags: object) -> list[str]:
    return [*python_module("scheduler_svc"), command, *_flags(**flags)]


def _flags(**flags: object) -> list[str]:
    return [word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), str(value))]


def _socket(path: Path, name: str) -> str:
    return f"unix:{path}/{name}.sock"


def _read_report(file: Path) -> dict[str, Any]:
    """Empty as long as there is none; files appear as a whole."""
    try:
        report: dict[str, Any] = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    return report


def _report_file(path: Path) -> Path:
    return path / "clients.json"
