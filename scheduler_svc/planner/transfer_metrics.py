"""What Prometheus is told of blocks on their way to and from the KV store."""

from collections.abc import Callable

from albireo.metrics import Readings
from scheduler_svc.planner.loads import OUTCOMES
from scheduler_svc.planner.transfers import Transfers


def register_transfer_metrics(transfers: Transfers) -> None:
    """Only for planners that have a store: for others nothing of this exists."""
    counts, rates = transfers.counts, transfers.rates

    def loads(outcome: str) -> Callable[[], float]:
        return lambda: counts.loads[outcome]

    Readings(
        gauges={
            "albireo_kv_store_connected": ("1 while there is a session", lambda: transfers.lease is not None),
            "albireo_kv_queued_bytes": ("On their way, both ways", lambda: transfers.num_queued_bytes),
            "albireo_kv_out_bytes_per_second": ("Measured lately", lambda: rates.outward.bytes_per_s),
            "albireo_kv_in_bytes_per_second": ("Measured lately", lambda: rates.inward.bytes_per_s),
            "albireo_kv_store_rtt_seconds": ("Until the store answers, lately", lambda: rates.rtt_s),
        },
        counters={
            "albireo_kv_blocks_out": ("Blocks stored", lambda: counts.num_blocks_out),
            "albireo_kv_bytes_out": ("Bytes stored", lambda: counts.num_bytes_out),
            "albireo_kv_blocks_in": ("Blocks loaded", lambda: counts.num_blocks_in),
            "albireo_kv_bytes_in": ("Bytes loaded", lambda: counts.num_bytes_in),
            "albireo_kv_blocks_not_stored": (
                "Blocks dropped: too many on their way, or refused",
                lambda: counts.num_blocks_not_stored,
            ),
            **{
                f"albireo_kv_loads_{outcome}": (f"Loads {meaning}", loads(outcome))
                for outcome, meaning in OUTCOMES.items()
            },
        },
    )
