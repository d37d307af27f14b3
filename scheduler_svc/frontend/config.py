"""Configuration of a front end."""

from dataclasses import dataclass

from albireo.config import flag


@dataclass(frozen=True)
class FrontendConfig:
    """See ``python -m scheduler_svc frontend --help``."""

    model: str = flag("demo", "model: 'demo', a directory, or a Hugging Face Hub id")
    planner: str = flag("127.0.0.1:50053", "the planner: host:port or unix:path")
    host: str = flag("127.0.0.1", "address to listen on")
    port: int = flag(50051, "port for clients, shared by all front ends of this host; 0: none")
    listen: str | None = flag(None, "one more address that is this front end's own: host:port or unix:path")
    name: str = flag("frontend-0", "name in logs and at the planner")
    served_model_name: str | None = flag(None, "model name that clients see; default: from --model")
    startup_timeout: float = flag(600.0, "seconds to wait for the planner and its worker group at the start")
    metrics_port: int = flag(0, "port of Prometheus metrics, on --host; 0: none")
    log_level: str = flag("info", "log level", choices=("debug", "info", "warning", "error"))
