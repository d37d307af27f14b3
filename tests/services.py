"""Starts the real services as processes, on unix sockets and free ports of the loopback interface."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from albireo.cli.processes import command_line, descendants
from albireo.cli.scrape import read_metrics  # noqa: F401  # a part of this module for those who use it

START_TIMEOUT_S = 120.0
# gRPC's own first reconnect comes after a second.
_PROBE_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 100),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fixed_ports(num: int) -> int:
    """The first of ``num`` free ports in a row, none of which the system gives to outgoing connections: a process that
    restarts must find its port free."""
    while True:
        first = random.SystemRandom().randrange(20_000, 30_000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + num):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


def wait_until_serving(target: str, process: subprocess.Popen | None = None, log: Path | None = None) -> None:
    """Waits until grpc.health.v1 says SERVING; fails at once, with the log, when the process is gone."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process is not None and process.poll() is not None:
            break
        with grpc.insecure_channel(target, options=_PROBE_OPTIONS) as channel:
            try:
                request = health_pb2.HealthCheckRequest()
                answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=2, wait_for_ready=True)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.RpcError:
                pass
        time.sleep(0.05)
    text = log.read_text()[-4000:] if log and log.exists() else ""
    raise AssertionError(f"{target} is not serving\n{text}")


@contextlib.contextmanager
def process(argv: list[str], log: Path, **env: str) -> Iterator[subprocess.Popen]:
    """A child process that is asked to end, and killed if it does not; its output goes to ``log``."""
    with log.open("ab") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", *argv], stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **env}
        )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
        try:
            child.wait(15)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            raise AssertionError(f"{argv[0]} did not end on SIGTERM\n{log.read_text()[-4000:]}") from None


@dataclass(frozen=True)
class Service:
    """A supervisor and what it runs."""

    address: str
    process: subprocess.Popen
    run_dir: Path

    def pids(self, *words: str) -> list[int]:
        """Its descendants with these words in a row on their command line."""
        wanted = "\0".join(("", *words, ""))
        lines = {pid: "\0".join(("", *command_line(pid), "")) for pid in descendants(self.process.pid)}
        return [pid for pid, line in lines.items() if wanted in line]

    def send_signal(self, pid: int, number: signal.Signals) -> None:
        """Signals a descendant; ProcessLookupError when ``pid`` is none, or not any more."""
        file = os.pidfd_open(pid)
        try:
            if pid not in descendants(self.process.pid):
                raise ProcessLookupError(pid)
            signal.pidfd_send_signal(file, number)
        finally:
            os.close(file)


@contextlib.contextmanager
def worker_service(run_dir: Path, model: str | Path, **flags: object) -> Iterator[Service]:
    """A worker group. Flags by their Python names: ``tp=2``."""
    run_dir.mkdir(parents=True, exist_ok=True)
    address = f"unix:{run_dir}/group.sock"
    argv = ["worker_svc", "--model", str(model), "--listen", address, "--run-dir", str(run_dir), *_argv(flags)]
    with process(argv, run_dir / "worker.log") as child:
        wait_until_serving(address, child, run_dir / "logs" / "rank-0.log")
        yield Service(address, child, run_dir)


@contextlib.contextmanager
def worker_group(run_dir: Path, model: str | Path, **flags: object) -> Iterator[str]:
    """A worker group; yields its address."""
    with worker_service(run_dir, model, **flags) as service:
        yield service.address


@contextlib.contextmanager
def scheduler_service(
    run_dir: Path, model: str | Path, group: str, port: int = 0, **flags: object
) -> Iterator[Service]:
    """A planner with front ends; its address is the clients'. ``port`` 0: any."""
    run_dir.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    argv = ["scheduler_svc", "--model", str(model), "--group", group, "--planner", f"unix:{run_dir}/planner.sock"]
    argv += ["--port", str(port), "--run-dir", str(run_dir), *_argv(flags)]
    with process(argv, run_dir / "scheduler.log") as child:
        for index in range(int(str(flags.get("frontends", 1)))):
            name = f"frontend-{index}"
            wait_until_serving(f"unix:{run_dir}/{name}.sock", child, run_dir / "logs" / f"{name}.log")
        yield Service(f"127.0.0.1:{port}", child, run_dir)


@contextlib.contextmanager
def scheduler(run_dir: Path, model: str | Path, group: str, **flags: object) -> Iterator[str]:
    """A planner with front ends; yields the address for clients."""
    with scheduler_service(run_dir, model, group, **flags) as service:
        yield service.address


def _argv(flags: dict[str, object]) -> list[str]:
    argv = []
    for name, value in flags.items():
        argv.append("--" + name.replace("_", "-"))
        if value is not True:
            argv.append(str(value))
    return argv
