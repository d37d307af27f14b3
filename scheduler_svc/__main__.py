"""``python -m scheduler_svc``: one planner and its front ends, or ``planner`` / ``frontend`` alone.

``load`` runs clients for measurements (`albireo bench host`).

SIGUSR2 replaces them without losing a request: the planner, then each front end, which drains when its successor is
ready. Exit statuses are those of `albireo.supervise`.
"""

import asyncio
import contextlib
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from albireo.allowances import TENANT_FLAGS, TenantFlags
from albireo.child import Child, Roll, python_module
from albireo.config import flag, parse, to_argv
from albireo.kv.flags import KV_FLAGS, KvFlags
from albireo.logging import set_up_logging
from albireo.security import SECURITY_FLAGS, SecurityFlags
from albireo.supervise import supervise
from albireo.tracing import OTLP_FLAGS, TRACING_FLAGS, TracingFlags
from albireo.watchdog import Watchdog

# A front end that has drained ends within it.
_AFTER_DRAIN_S = 5.0


@dataclass(frozen=True)
class SchedulerConfig(KvFlags, TenantFlags, SecurityFlags, TracingFlags):
    """Flags of ``python -m scheduler_svc``."""

    model: str = flag("demo", "model directory, Hub id, or 'demo': tokenizer and defaults")
    served_model_name: str | None = flag(None, "name that clients see; default: the model directory's")
    group: str = flag("127.0.0.1:50052", "the worker group's leader: host:port or unix:path")
    planner: str = flag("127.0.0.1:50053", "the planner's address for front ends: host:port or unix:path")
    host: str = flag("127.0.0.1", "address that clients reach")
    port: int = flag(50051, "port that clients reach; all front ends share it")
    frontends: int = flag(1, "front-end processes")
    depth: int = flag(2, "plans in flight at most; 1 is synchronous")
    max_num_batched_tokens: int = flag(0, "tokens of one step; 0: what the group takes")
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
    run_dir: str = flag("", "directory for sockets and logs; default: a temporary one")
    profile_dir: str = flag("", "directory that StartProfile of the vLLM API writes to; default: in the run directory")
    metrics_port: int = flag(
        0, "Prometheus: the planner on this port of 127.0.0.1, front end i on port + 2 + i; 0: none"
    )
    log_level: str = flag("info", "least level that is logged", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        if not 1 <= self.frontends <= 64:
            raise ValueError(f"--frontends {self.frontends}: 1 to 64")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["planner"], ["frontend"], ["load"]):
        watchdog = Watchdog()
        watchdog.start_thread()  # importing takes a while
        if argv[0] == "planner":
            from scheduler_svc.planner.main import main as run_planner

            return run_planner(argv[1:], watchdog)
        if argv[0] == "load":
            from scheduler_svc.load.main import main as run_load

            return run_load(argv[1:], watchdog)
        from scheduler_svc.frontend.main import main as run_frontend

        return run_frontend(argv[1:], watchdog)
    description = "Runs a planner and its front ends. `planner` or `frontend` as first argument runs one of them alone."
    config = parse(SchedulerConfig, "python -m scheduler_svc", description, argv)
    set_up_logging("scheduler", config.log_level)
    with contextlib.ExitStack() as stack:
        run_dir = Path(config.run_dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="albireo-scheduler-")))
        return asyncio.run(supervise(_children(config, run_dir), grace_s=config.drain_timeout + _AFTER_DRAIN_S))


def _children(config: SchedulerConfig, run_dir: Path) -> list[Child]:
    logs = run_dir / "logs"
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    logs.mkdir(exist_ok=True)
    module = python_module("scheduler_svc")
    planner_flags = to_argv(
        config,
        *("group", "planner", "depth", "max_num_batched_tokens", "max_waiting", "max_itl_ms", "prefix_cache"),
        *("recovery_timeout", "metrics_port", "log_level"),
        *(*KV_FLAGS, *TENANT_FLAGS, *SECURITY_FLAGS, *OTLP_FLAGS),
    )
    children = [Child("planner", [*module, "planner", *planner_flags], logs / "planner.log")]
    shared = to_argv(
        config,
        *("model", "served_model_name", "planner", "host", "port"),
        *("max_streams", "recovery_timeout", "drain_timeout", "log_level"),
        *(*SECURITY_FLAGS, *TRACING_FLAGS),
    )
    for index in range(config.frontends):
        name = f"frontend-{index}"
        own = ["--name", name, "--listen", f"unix:{run_dir / name}.sock"]
        own += ["--profile-dir", config.profile_dir or str(run_dir / "profiles")]
        if config.metrics_port:
            own += ["--metrics-port", str(config.metrics_port + 2 + index)]
        log = logs / f"{name}.log"
        # Stopped before the planner, which they need to finish what they have.
        children.append(Child(name, [*module, "frontend", *shared, *own], log, stage=1, roll=Roll.OVERLAP))
    return children


if __name__ == "__main__":
    sys.exit(main())
