"""Configuration of a front end."""

import math
from dataclasses import dataclass

from albireo.config import flag
from albireo.security import SecurityFlags
from albireo.tracing import TracingFlags

_POSITIVE = (
    "startup_timeout",
    "recovery_timeout",
    "drain_timeout",
    "max_streams",
    "write_timeout",
    "max_backlog_kib",
    "max_message_mib",
)
_MAX_MESSAGE_MIB = 1024  # gRPC counts bytes in an int32


@dataclass(frozen=True)
class FrontendConfig(SecurityFlags, TracingFlags):
    """See ``python -m scheduler_svc frontend --help``."""

    model: str = flag("demo", "model: 'demo', a directory, or a Hugging Face Hub id")
    planner: str = flag("127.0.0.1:50053", "the planner: host:port or unix:path")
    host: str = flag("127.0.0.1", "address to listen on")
    port: int = flag(50051, "port for clients, shared by all front ends of this host; 0: none")
    listen: str | None = flag(None, "one more address that is this front end's own: host:port or unix:path")
    name: str = flag("frontend-0", "name in logs and at the planner")
    served_model_name: str | None = flag(None, "model name that clients see; default: from --model")
    startup_timeout: float = flag(600.0, "seconds to wait for the planner and its worker group at the start")
    recovery_timeout: float = flag(30.0, "seconds that requests wait for a planner that is gone")
    drain_timeout: float = flag(20.0, "seconds that running requests get to finish on SIGTERM")
    max_streams: int = flag(4096, "requests at once; more are refused with RESOURCE_EXHAUSTED")
    write_timeout: float = flag(30.0, "seconds that a client may leave a write pending before its request is cancelled")
    max_backlog_kib: int = flag(4096, "KiB that one request may have waiting for its client")
    max_message_mib: int = flag(64, "MiB of the largest request")
    profile_dir: str = flag("", "directory that StartProfile of the vLLM API writes to; else there are no profiles")
    metrics_port: int = flag(0, "port of Prometheus metrics, on --host; 0: none")
    log_level: str = flag("info", "log level", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} {value}: a positive number")
        if self.max_message_mib > _MAX_MESSAGE_MIB:
            raise ValueError(f"--max-message-mib {self.max_message_mib}: {_MAX_MESSAGE_MIB} at most")
