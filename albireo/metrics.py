"""Prometheus metrics: one registry per process, served on loopback when a port is given."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from threading import Thread
from wsgiref.simple_server import WSGIServer

import numpy as np
from prometheus_client import make_wsgi_app, start_http_server
from prometheus_client.core import (
    REGISTRY,
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector, CollectorRegistry

from albireo.arrays import Float64Array, Int64Array
from albireo.authentication import guarded
from albireo.ledger import Ledger
from albireo.security import Security

# 10 us .. 10 s, three to a decade: from a wake-up to a step that is stuck.
STEP_BUCKETS_S = (*(float(f"{digit}e{exponent}") for exponent in range(-5, 1) for digit in (1, 2, 5)), 10.0)


def serve_metrics(port: int, security: Security) -> None:
    """Answers ``GET /metrics`` on ``port`` of the loopback interface; 0 means no metrics."""
    if port:
        open_page(port, "127.0.0.1", REGISTRY, security)


def open_page(port: int, host: str, registry: CollectorRegistry, security: Security) -> tuple[WSGIServer, Thread]:
    """Answers ``GET /metrics`` from a thread of its own. Raises OSError where it cannot listen."""
    flags = security.flags
    server, thread = start_http_server(
        port,
        addr=host,
        registry=CollectorRegistry(),  # there is nothing to see until the guard stands
        certfile=flags.tls_cert or None,
        keyfile=flags.tls_key or None,
        client_cafile=flags.tls_client_ca or None,
        client_auth_required=security.asks_for_certificates,
    )
    page = make_wsgi_app(registry)
    server.set_app(page if security.tokens is None else guarded(page, security.tokens))
    return server, thread


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


class LedgerHistograms(Collector):
    """Histograms of what a ledger's rows say, worked out when they are asked for: a step costs them nothing.

    `fold` takes in the rows added since the last time, and must be called before the ledger's ring wraps. A scrape
    calls it as well. Any thread may.

    Args:
        of_rows: name -> (help, function of rows [n, columns] that returns seconds, one for each row that counts).
        of_pairs: the same, of (the rows before, rows): each row with its predecessor, zeros before the first.
    """

    def __init__(
        self,
        ledger: Ledger,
        of_rows: Mapping[str, tuple[str, Callable[[Int64Array], Float64Array]]],
        of_pairs: Mapping[str, tuple[str, Callable[[Int64Array, Int64Array], Float64Array]]] | None = None,
        buckets: Sequence[float] = STEP_BUCKETS_S,
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        self._ledger = ledger
        self._of_rows = of_rows
        self._of_pairs = of_pairs or {}
        self._histograms = {
            name: _Histogram(name, text, buckets) for name, (text, _) in [*of_rows.items(), *self._of_pairs.items()]
        }
        self._num_folded = 0
        self._last_row: Int64Array = np.zeros((1, len(ledger.columns)), dtype=np.int64)
        self._lock = threading.Lock()
        registry.register(self)

    def fold(self) -> None:
        with self._lock:
            rows = self._take_new_rows()
            if not len(rows):
                return
            before = np.concatenate((self._last_row, rows[:-1]))
            self._last_row = rows[-1:]
            for name, (_, seconds_of) in self._of_rows.items():
                self._histograms[name].add(seconds_of(rows))
            for name, (_, seconds_of_pairs) in self._of_pairs.items():
                self._histograms[name].add(seconds_of_pairs(before, rows))

    def collect(self) -> Iterable[Metric]:
        self.fold()
        with self._lock:
            return [histogram.metric() for histogram in self._histograms.values()]

    def describe(self) -> Iterable[Metric]:
        return []

    def _take_new_rows(self) -> Int64Array:
        while (num_added := self._ledger.num_added) > self._num_folded:
            rows = self._ledger.latest(num_added - self._num_folded)
            if self._ledger.num_added == num_added:  # else they are later ones than was meant
                self._num_folded = num_added
                return rows
        return self._last_row[:0]


class _Histogram:
    """Counts of seconds by bucket; a value on a bound lies below it."""

    def __init__(self, name: str, text: str, buckets: Sequence[float]) -> None:
        self._name = name
        self._text = text
        self._bounds = np.array(buckets)
        self._labels = [*(str(bound) for bound in buckets), "+Inf"]
        self._counts = np.zeros(len(buckets) + 1, dtype=np.int64)
        self._sum = 0.0

    def add(self, seconds: Float64Array) -> None:
        places = np.searchsorted(self._bounds, seconds)
        self._counts += np.bincount(places, minlength=len(self._counts))
        self._sum += float(seconds.sum())

    def metric(self) -> Metric:
        counts = [float(count) for count in self._counts.cumsum()]
        return HistogramMetricFamily(
            self._name, self._text, buckets=list(zip(self._labels, counts, strict=True)), sum_value=self._sum
        )
