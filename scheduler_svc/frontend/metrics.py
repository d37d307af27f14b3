"""Prometheus metrics of a front end, in a registry of its own.

Token counts and latencies are taken once per sequence and message from the planner, hundreds of times per step. So they
are plain Python numbers, read when Prometheus asks; a histogram of prometheus_client costs ten times as much.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

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
        yield GaugeMetricFamily(
            "albireo_frontend_streams_open", "Generate requests that are running", self.num_streams_open
        )
        yield self.time_to_first_token.family(
            "albireo_frontend_time_to_first_token_seconds", "From a request's arrival to its first token"
        )
        yield self.inter_token_latency.family(
            "albireo_frontend_inter_token_latency_seconds", "Between arrivals of tokens of one sequence"
        )
