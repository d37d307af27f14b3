"""What a process on this machine tells Prometheus."""

import urllib.request

from prometheus_client.parser import text_string_to_metric_families

_TIMEOUT_S = 2.0


def read_metrics(port: int) -> dict[str, float]:
    """By sample name; samples with labels are left out. Raises OSError where nothing answers."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=_TIMEOUT_S) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}
