"""A tracer that keeps what it is told."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from albireo.tracing import Attributes, Event, Span


@dataclass(frozen=True)
class Recorded:
    name: str
    trace_parent: str
    start_ns: int
    end_ns: int
    attributes: Attributes
    events: Sequence[Event]


class SpanRecorder:
    """See `albireo.tracing.Tracer`; it begins no spans."""

    def __init__(self) -> None:
        self.spans: list[Recorded] = []

    def begin(self, name: str, metadata: Mapping[str, str]) -> Span | None:
        return None

    def record(
        self,
        name: str,
        trace_parent: str,
        start_ns: int,
        end_ns: int,
        attributes: Attributes,
        events: Sequence[Event] = (),
    ) -> None:
        self.spans.append(Recorded(name, trace_parent, start_ns, end_ns, attributes, events))

    def close(self) -> None:
        pass
