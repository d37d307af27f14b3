"""Token buckets: how many tokens a tenant with a rate may still be served."""

from dataclasses import dataclass

from albireo.allowances import Allowances

_BURST_S = 4.0


@dataclass(slots=True)
class _Bucket:
    """``level`` tokens are left at the time ``settled_ns``; below 0 it is in debt."""

    rate: float
    level: float
    settled_ns: int


class TokenBuckets:
    """By tenant. One that was not served for `_BURST_S` may take so many seconds' tokens at once.

    What is being served goes on, into debt; what is new waits until the debt is paid.
    """

    def __init__(self, allowances: Allowances) -> None:
        self._allowances = allowances
        self._buckets: dict[str, _Bucket] = {}  # none is full

    def settle(self, served: dict[str, float], now_ns: int) -> None:
        """Books the tokens served since the last time, and what the rates have added. Call several times a second:
        where a bucket was full in between is not seen."""
        for tenant, num_tokens in served.items():
            rate = self._allowances.of(tenant).tokens_per_s
            if rate and num_tokens:
                bucket = self._buckets.setdefault(tenant, _Bucket(rate, _BURST_S * rate, now_ns))
                bucket.level -= num_tokens
        for tenant, bucket in list(self._buckets.items()):
            bucket.level += bucket.rate * (now_ns - bucket.settled_ns) / 1e9
            bucket.settled_ns = now_ns
            if bucket.level >= _BURST_S * bucket.rate:
                del self._buckets[tenant]

    def debt_s(self, tenant: str) -> float:
        """Seconds until the tenant has paid its debt, as of the last `settle`; 0: it has none."""
        bucket = self._buckets.get(tenant)
        return max(0.0, -bucket.level / bucket.rate) if bucket is not None else 0.0
