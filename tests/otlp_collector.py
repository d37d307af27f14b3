"""A collector of OpenTelemetry: it keeps the spans that it gets, with the process that each came from."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

from services import fixed_ports

_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class ReceivedSpan:
    process: str
    proto: trace_pb2.Span

    @property
    def name(self) -> str:
        return self.proto.name

    @property
    def attributes(self) -> dict[str, Any]:
        return _plain(self.proto.attributes)


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Listens on a fixed port of the loopback interface. ``spans`` are in the order in which they came."""

    def __init__(self) -> None:
        self.spans: list[ReceivedSpan] = []
        self.address = f"127.0.0.1:{fixed_ports(1)}"
        self._changed = threading.Condition()
        self._server = self._listen()

    def Export(self, request: Any, context: Any) -> Any:
        with self._changed:
            for group in request.resource_spans:
                process = _plain(group.resource.attributes)["service.instance.id"]
                self.spans += [ReceivedSpan(process, span) for scope in group.scope_spans for span in scope.spans]
            self._changed.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def wait_for(self, condition: Callable[[list[ReceivedSpan]], bool]) -> list[ReceivedSpan]:
        """The spans that are there once ``condition`` holds of them."""
        with self._changed:
            done = self._changed.wait_for(lambda: condition(self.spans), _TIMEOUT_S)
            assert done, [(span.process, span.name) for span in self.spans]
            return list(self.spans)

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Nobody listens meanwhile."""
        self.close()
        yield
        self._server = self._listen()

    def close(self) -> None:
        self._server.stop(None).wait()

    def _listen(self) -> grpc.Server:
        server = grpc.server(ThreadPoolExecutor(max_workers=2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, server)
        server.add_insecure_port(self.address)
        server.start()
        return server


def _plain(attributes: Any) -> dict[str, Any]:
    return {each.key: _value(each.value) for each in attributes}


def _value(value: common_pb2.AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, str(kind))
