"""Spans of requests, for an OpenTelemetry collector.

A process without ``--otlp-endpoint`` has no `Tracer`: nothing of OpenTelemetry is imported, and a request costs one
look at None. Context travels as W3C ``traceparent``: from the client's metadata to the front end's span, and from that
to the planner (`Submit`) and the group's leader (`NewSequence`), whose spans are its children. Empty: not traced.

Times are the monotonic clock's, ns; a process takes its distance from the wall clock once.
"""

import contextlib
import importlib.metadata
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Protocol, TypeAlias

from albireo.config import flag
from albireo.errors import ConfigError

Attributes: TypeAlias = Mapping[str, str | int | float | Sequence[str]]
Event: TypeAlias = tuple[str, int]  # name, time


@dataclass(frozen=True)
class OtlpFlags:
    """Of every service."""

    otlp_endpoint: str = flag("", "collector of traces, OTLP over gRPC: host:port, or https://host:port; empty: none")


@dataclass(frozen=True)
class TracingFlags(OtlpFlags):
    """Of front ends, and of what starts them."""

    otlp_sample_ratio: float = flag(
        0.0, "part of the requests without a trace context that is traced; with one, what its sampled flag says counts"
    )


OTLP_FLAGS = tuple(each.name for each in fields(OtlpFlags))
TRACING_FLAGS = tuple(each.name for each in fields(TracingFlags))

_PACKAGES = ("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-grpc")
_ENDPOINT = re.compile(r"(https?://)?[^\s/]+:\d{1,5}")


class Span(Protocol):
    """A request's span, which has begun.

    Attributes:
        trace_parent: what makes others its children.
    """

    trace_parent: str

    def note(self, attributes: Attributes) -> None: ...

    def end(self, outcome: str) -> None:
        """Anything but "finished" and "cancelled" is an error."""


class Tracer(Protocol):
    """Spans leave in the background. What the collector does not take in time is dropped, oldest first."""

    def begin(self, name: str, metadata: Mapping[str, str]) -> Span | None:
        """A span of this server, child of the one that a call's metadata names; None: the request is not traced."""

    def record(
        self,
        name: str,
        trace_parent: str,
        start_ns: int,
        end_ns: int,
        attributes: Attributes,
        events: Sequence[Event] = (),
    ) -> None:
        """A child of ``trace_parent`` that is over."""

    def close(self) -> None:
        """Sends what there is, within a second."""


def check_tracing(endpoint: str, sample_ratio: float = 0.0) -> None:
    """Raises ConfigError where traces could not be made or sent."""
    if not 0 <= sample_ratio <= 1:
        raise ConfigError(f"--otlp-sample-ratio {sample_ratio:g}: 0 to 1")
    if not endpoint:
        return
    if not _ENDPOINT.fullmatch(endpoint):
        raise ConfigError(f"--otlp-endpoint {endpoint}: not host:port")
    for package in _PACKAGES:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            missing = f"{package} is missing; it comes with the extra otel: pip install 'albireo[otel]'"
            raise ConfigError(f"--otlp-endpoint {endpoint}: {missing}") from error


@contextlib.contextmanager
def open_tracer(process: str, endpoint: str, sample_ratio: float = 0.0) -> Iterator[Tracer | None]:
    """The tracer of a process, closed at the end; None without an endpoint.

    Args:
        process: whose spans these are: planner, frontend-0, rank-0.
        endpoint: host:port of a collector that takes OTLP over gRPC; ``https://host:port`` where it wants TLS.
        sample_ratio: part of the requests without a trace context that is traced; a client's own flag is obeyed.
    Raises:
        ConfigError: the endpoint is none, or the packages of the extra ``otel`` are missing.
    """
    check_tracing(endpoint, sample_ratio)
    if not endpoint:
        yield None
        return
    from albireo.otlp import OtlpTracer

    tracer = OtlpTracer(process, endpoint, sample_ratio)
    try:
        yield tracer
    finally:
        tracer.close()
