"""Tracing that is off, that cannot be turned on, and that ends while nobody listens."""

import importlib.metadata
import subprocess
import sys
import time

import pytest

from albireo.cli.run_dir import open_run_dir
from albireo.cli.serve import ServeConfig, child_processes
from albireo.errors import ConfigError
from albireo.tracing import check_tracing, open_tracer
from services import free_port

_OFF = """
import sys
import scheduler_svc.frontend.main, scheduler_svc.planner.main, worker_svc.rank
from albireo.tracing import open_tracer

with open_tracer("planner", "") as tracer:
    print(tracer, [name for name in sys.modules if name.startswith("opentelemetry")])
"""
_ENDS = """
import sys, time
from albireo.tracing import open_tracer

with open_tracer("planner", sys.argv[1], sample_ratio=1.0) as tracer:
    tracer.begin("generate", {}).end("finished")
    began_at = time.monotonic()
print(time.monotonic() - began_at)
"""


def python(code: str, *argv: str) -> str:
    command = [sys.executable, "-c", code, *argv]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def test_without_an_endpoint_nothing_of_opentelemetry_is_imported() -> None:
    """By none of the services."""
    assert python(_OFF).strip() == "None []"


def test_a_process_ends_soon_though_no_collector_listens() -> None:
    began_at = time.monotonic()
    *_, took_s = python(_ENDS, f"127.0.0.1:{free_port()}").split()
    assert float(took_s) < 2
    assert time.monotonic() - began_at < 15


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    message = r"--otlp-endpoint 127.0.0.1:4317: opentelemetry-sdk is missing; .*albireo\[otel\]"
    with pytest.raises(ConfigError, match=message), open_tracer("planner", "127.0.0.1:4317"):
        pass


@pytest.mark.parametrize("endpoint", ["localhost", "4317", "ftp://localhost:4317", "host:port", "a b:1"])
def test_an_endpoint_is_host_and_port(endpoint: str) -> None:
    with pytest.raises(ConfigError, match=f"--otlp-endpoint {endpoint}: not host:port"):
        check_tracing(endpoint)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_a_sample_ratio_is_a_part(ratio: float) -> None:
    with pytest.raises(ConfigError, match=f"--otlp-sample-ratio {ratio:g}: 0 to 1"):
        check_tracing("127.0.0.1:4317", ratio)


def test_serve_hands_the_flags_on() -> None:
    """To the group the endpoint, to the scheduler both."""
    config = ServeConfig(tp=1, otlp_endpoint="127.0.0.1:4317", otlp_sample_ratio=0.5)
    with open_run_dir(None) as run_dir:
        worker, scheduler, *_ = [" ".join(child.argv) for child in child_processes(config, run_dir)]
    assert "--otlp-endpoint 127.0.0.1:4317" in worker
    assert "--otlp-sample-ratio" not in worker
    assert "--otlp-endpoint 127.0.0.1:4317 --otlp-sample-ratio 0.5" in scheduler
