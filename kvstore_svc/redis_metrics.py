"""How long Redis takes, as Prometheus sees it."""

from prometheus_client import Histogram

from albireo.metrics import STEP_BUCKETS_S
from albireo.v1 import kvtier_pb2 as pb

_NAMES = {pb.TierJob.KIND_PROBE: "probe", pb.TierJob.KIND_LOAD: "load", pb.TierJob.KIND_STORE: "store"}


class RedisMetrics:
    """One per process: the library knows each metric once."""

    def __init__(self) -> None:
        self._seconds = Histogram(
            "albireo_kv_redis_seconds", "From a job's sending to its report", ["kind"], buckets=STEP_BUCKETS_S
        )

    def observe(self, kind: pb.TierJob.Kind, seconds: float) -> None:
        self._seconds.labels(_NAMES[kind]).observe(seconds)
