"""Histograms that are folded from a ledger's rows when somebody looks."""

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from albireo.ledger import Ledger
from albireo.metrics import LedgerHistograms

COLUMNS = ("start_ns", "end_ns")


def samples(registry: CollectorRegistry) -> dict[str, float]:
    """Sample name, with its bucket's bound, -> value."""
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {sample.name + sample.labels.get("le", ""): sample.value for family in families for sample in family.samples}


def make(num_rows: int = 16) -> tuple[Ledger, LedgerHistograms, CollectorRegistry]:
    ledger, registry = Ledger("test", COLUMNS, num_rows), CollectorRegistry()
    histograms = LedgerHistograms(
        ledger,
        {"length": ("From start to end", lambda rows: (rows[:, 1] - rows[:, 0]) / 1e9)},
        {"gap": ("Since the last end", lambda before, rows: ((rows[:, 0] - before[:, 1]) / 1e9)[before[:, 1] > 0])},
        buckets=(0.001, 0.01, 0.1),
        registry=registry,
    )
    return ledger, histograms, registry


def test_each_row_counts_once_however_often_somebody_looks():
    ledger, histograms, registry = make()
    assert samples(registry)["length_count"] == 0
    ledger.add(0, 1_000_000)  # 1 ms: on the bound
    ledger.add(3_000_000, 8_000_000)
    histograms.fold()
    ledger.add(9_000_000, 1_009_000_000)
    for _ in range(2):
        seen = samples(registry)
        assert [seen[f"length_bucket{bound}"] for bound in ("0.001", "0.01", "0.1", "+Inf")] == [1, 2, 2, 3]
        assert seen["length_count"] == 3
        assert np.isclose(seen["length_sum"], 1.006)


def test_a_row_is_seen_with_the_one_before_across_folds():
    """And the first with nothing."""
    ledger, histograms, registry = make()
    for start_ms in (10, 20, 40):
        ledger.add(start_ms * 1_000_000, (start_ms + 5) * 1_000_000)
        histograms.fold()
    seen = samples(registry)
    assert seen["gap_count"] == 2
    assert np.isclose(seen["gap_sum"], 0.005 + 0.015)


def test_a_ring_that_has_wrapped_gives_what_is_left():
    ledger, _, registry = make(num_rows=4)
    for start in range(1, 11):
        ledger.add(start, start + 1)
    assert samples(registry)["length_count"] in (3, 4)
    ledger.add(20, 21)
    assert samples(registry)["length_count"] in (4, 5)
