"""Prometheus metrics: one registry per process, served on loopback when a port is given."""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import start_http_server
from prometheus_client.core import REGISTRY, CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


def serve_metrics(port: int, host: str = "127.0.0.1") -> None:
    """Answers ``GET /metrics`` on ``port`` from a thread of its own; 0 means no metrics."""
    if port:
        start_http_server(port, addr=host)


class Readings(Collector):
    """Metrics that are read from live objects when they are asked for, so that keeping them costs a step nothing.

    Args:
        gauges, counters: name -> (help, function that reads the value now).
    """

    def __init__(
        self,
        gauges: Mapping[str, tuple[str, Callable[[], float]]],
        counters: Mapping[str, tuple[str, Callable[[], float]]],
    ) -> None:
        self._gauges = gauges
        self._counters = counters
        REGISTRY.register(self)

    def collect(self) -> Iterable[Metric]:
        for name, (text, read) in self._gauges.items():
            yield GaugeMetricFamily(name, text, value=read())
        for name, (text, read) in self._counters.items():
            yield CounterMetricFamily(name, text, value=read())

    def describe(self) -> Iterable[Metric]:
        return []
