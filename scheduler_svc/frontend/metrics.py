"""Prometheus metrics of a front end, in a registry of its own.

Token counts and latencies are taken once per sequence and message from the planner, hundreds of times per step. So they
are plain Python numbers, read when Prometheus asks; a histogram of prometheus_client costs ten times as much.
"""

import asyncio
import contextlib
import errno
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from threading import Thread
from wsgiref.simple_server import WSGIServer

import structlog
from prometheus_client import CollectorRegistry, Counter, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from albireo.errors import ConfigError
from albireo.metrics import open_page
from albireo.security import OPEN, Security

log = structlog.get_logger()

_PORT_RETRY_S = 0.5
_TTFT_BOUNDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_ITL_BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Histogram:
    """Counts of values per bucket."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self, name: str, help: str) -> HistogramMetricFamily:
        buckets: list[tuple[str, float]] = []
        total = 0
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        return HistogramMetricFamily(name, help, buckets=buckets, sum_value=self._sum)


class Metrics(Collector):
    """Of one front end. The attributes may be added to directly."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.num_prompt_tokens = 0
        self.num_output_tokens = 0
        self.num_responses = 0
        self.num_streams_open = 0
        self.time_to_first_token = Histogram(_TTFT_BOUNDS)
        self.inter_token_latency = Histogram(_ITL_BOUNDS)
        self._requests = Counter(
            "albireo_frontend_requests",
            "Generate requests by outcome: finished, cancelled, or a gRPC status",
            ["outcome"],
            registry=self.registry,
        )
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def count_request(self, outcome: str) -> None:
        self._requests.labels(outcome).inc()

    def collect(self) -> Iterator[Metric]:
        """Called by Prometheus."""
        yield CounterMetricFamily(
            "albireo_frontend_prompt_tokens", "Prompt tokens of accepted requests", self.num_prompt_tokens
        )
        yield CounterMetricFamily(
            "albireo_frontend_output_tokens", "Tokens received from the planner", self.num_output_tokens
        )
        yield CounterMetricFamily(
            "albireo_frontend_responses", "Messages written to clients of Generate", self.num_responses
        )
        yield GaugeMetricFamily(
            "albireo_frontend_streams_open", "Generate requests that are running", self.num_streams_open
        )
        yield self.time_to_first_token.family(
            "albireo_frontend_time_to_first_token_seconds", "From a request's arrival to its first token"
        )
        yield self.inter_token_latency.family(
            "albireo_frontend_inter_token_latency_seconds", "Between arrivals of tokens of one sequence"
        )


class MetricsPage:
    """``GET /metrics`` on a port; 0: none. While a predecessor still has the port, it is tried again and again."""

    def __init__(self, host: str, port: int, metrics: Metrics, security: Security = OPEN) -> None:
        self._security = security
        self._host = host
        self._port = port
        self._metrics = metrics
        self._server: tuple[WSGIServer, Thread] | None = None
        self._retrying: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Raises ConfigError where the port cannot be listened on for another reason."""
        if self._port and not self._try_to_open():
            log.warning("the metrics port is in use; waiting for it", port=self._port)
            self._retrying = asyncio.create_task(self._keep_trying())

    async def close(self) -> None:
        if self._retrying is not None:
            self._retrying.cancel()
            await asyncio.gather(self._retrying, return_exceptions=True)
        if self._server is not None:
            server, thread = self._server
            await asyncio.to_thread(server.shutdown)  # returns when its loop has seen it
            server.server_close()
            thread.join()

    async def _keep_trying(self) -> None:
        with contextlib.suppress(ConfigError):
            while not self._try_to_open():  # noqa: ASYNC110  # the port is another process's
                await asyncio.sleep(_PORT_RETRY_S)

    def _try_to_open(self) -> bool:
        try:
            self._server = open_page(self._port, self._host, self._metrics.registry, self._security)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise ConfigError(f"--metrics-port {self._port}: {error.strerror}") from error
        return True
