"""What has happened since the start, and its Prometheus metrics."""

from collections.abc import Callable
from dataclasses import dataclass

from albireo.metrics import Readings


@dataclass(slots=True)
class Counts:
    """Blocks, bytes and events since the start."""

    num_misses: int = 0
    num_refused: int = 0
    acquired_bytes: int = 0
    committed_bytes: int = 0
    data_read_bytes: int = 0
    data_written_bytes: int = 0
    num_promoted: int = 0
    redis_read_bytes: int = 0
    redis_written_bytes: int = 0
    num_redis_errors: int = 0
    num_redis_damaged: int = 0
    num_redis_dropped: int = 0


Readers = dict[str, tuple[str, Callable[[], float]]]


def register_metrics(counts: Counts, gauges: Readers, counters: Readers) -> Readings:
    """Makes all known to Prometheus.

    Args:
        gauges, counters: what others keep: name -> (help, function that reads it).
    """
    return Readings(
        gauges=gauges,
        counters={
            **counters,
            "albireo_kv_misses": ("Blocks asked for and not there in time", lambda: counts.num_misses),
            "albireo_kv_refused": ("Requests refused: credit, quota, full, lease", lambda: counts.num_refused),
            "albireo_kv_acquired_bytes": ("Bytes of blocks pinned for reading", lambda: counts.acquired_bytes),
            "albireo_kv_committed_bytes": ("Bytes of blocks written", lambda: counts.committed_bytes),
            "albireo_kv_data_read_bytes": ("Bytes that left by Data", lambda: counts.data_read_bytes),
            "albireo_kv_data_written_bytes": ("Bytes that came by Data", lambda: counts.data_written_bytes),
            "albireo_kv_promotions": ("Blocks fetched from Redis", lambda: counts.num_promoted),
            "albireo_kv_redis_read_bytes": ("Bytes fetched from Redis", lambda: counts.redis_read_bytes),
            "albireo_kv_redis_written_bytes": ("Bytes written to Redis", lambda: counts.redis_written_bytes),
            "albireo_kv_redis_errors": ("Jobs that Redis did not answer", lambda: counts.num_redis_errors),
            "albireo_kv_redis_damaged": (
                "Blocks in Redis that are not what was written",
                lambda: counts.num_redis_damaged,
            ),
            "albireo_kv_redis_dropped": (
                "Blocks not written, the queue was full or Redis away",
                lambda: counts.num_redis_dropped,
            ),
        },
    )
