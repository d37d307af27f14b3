"""The tracer that sends OTLP over gRPC. Only `albireo.tracing` imports this: it needs the extra ``otel``."""

import logging
import threading
import time
from collections.abc import Mapping, Sequence

import structlog
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import albireo
from albireo.tracing import Attributes, Event

_MAX_WAITING = 4096  # spans
_MAX_BATCH = 512
_EXPORT_INTERVAL_MS = 1000
_EXPORT_TIMEOUT_S = 5.0
_CLOSE_S = 1.0

_PROPAGATOR = TraceContextTextMapPropagator()

log = structlog.get_logger()


class OtlpTracer:
    """See `albireo.tracing.Tracer` and `open_tracer`."""

    def __init__(self, process: str, endpoint: str, sample_ratio: float) -> None:
        _log_what_goes_wrong()
        resource = Resource.create(
            {"service.name": "albireo", "service.instance.id": process, "service.version": albireo.__version__}
        )
        # At its end the process waits for us alone, and not for long.
        self._provider = TracerProvider(
            ParentBased(TraceIdRatioBased(sample_ratio)), resource=resource, shutdown_on_exit=False
        )
        is_plain = not endpoint.startswith("https://")
        exporter = OTLPSpanExporter(endpoint=endpoint, insecure=is_plain, timeout=_EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter, _MAX_WAITING, _EXPORT_INTERVAL_MS, max_export_batch_size=_MAX_BATCH)
        )
        self._tracer = self._provider.get_tracer("albireo", albireo.__version__)
        self._wall_ns = time.time_ns() - time.monotonic_ns()

    def begin(self, name: str, metadata: Mapping[str, str]) -> "OtlpSpan | None":
        parent = _PROPAGATOR.extract(metadata, Context())
        start_ns = time.monotonic_ns() + self._wall_ns
        span = self._tracer.start_span(name, parent, trace.SpanKind.SERVER, start_time=start_ns)
        return OtlpSpan(span, self._wall_ns) if span.is_recording() else None

    def record(
        self,
        name: str,
        trace_parent: str,
        start_ns: int,
        end_ns: int,
        attributes: Attributes,
        events: Sequence[Event] = (),
    ) -> None:
        parent = _PROPAGATOR.extract({"traceparent": trace_parent}, Context())
        span = self._tracer.start_span(name, parent, attributes=attributes, start_time=start_ns + self._wall_ns)
        for event, at_ns in events:
            span.add_event(event, timestamp=at_ns + self._wall_ns)
        span.end(end_ns + self._wall_ns)

    def close(self) -> None:
        closing = threading.Thread(target=self._provider.shutdown, name="close-traces", daemon=True)
        closing.start()
        closing.join(_CLOSE_S)


class OtlpSpan:
    """See `albireo.tracing.Span`."""

    def __init__(self, span: trace.Span, wall_ns: int) -> None:
        self._span = span
        self._wall_ns = wall_ns
        context = span.get_span_context()
        self.trace_parent = f"00-{context.trace_id:032x}-{context.span_id:016x}-01"

    def note(self, attributes: Attributes) -> None:
        self._span.set_attributes(attributes)

    def end(self, outcome: str) -> None:
        if outcome != "finished":
            self._span.set_attribute("error.type", outcome)
            if outcome != "cancelled":
                self._span.set_status(trace.StatusCode.ERROR, outcome)
        self._span.end(time.monotonic_ns() + self._wall_ns)


def _log_what_goes_wrong() -> None:
    """OpenTelemetry's own log lines, repeated ones left out, in the form of ours."""
    logger = logging.getLogger("opentelemetry")
    if not logger.handlers:
        logger.addHandler(_Forward(logging.WARNING))
        logger.propagate = False


class _Forward(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        log.warning("traces", reason=record.getMessage())
