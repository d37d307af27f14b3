"""What clients saw between one report and the next."""

import json
import time
from array import array
from pathlib import Path

import numpy as np


class Record:
    """Counts and latencies since the last report.

    Attributes:
        num_windows: reports so far.
    """

    def __init__(self) -> None:
        self.num_windows = 0
        self._begin()

    def _begin(self) -> None:
        self._since = time.monotonic()
        self._num_tokens = self._num_responses = self._num_sequences = 0
        self._gaps_s = array("d")
        self._first_s = array("d")

    def took(self, num_tokens: int) -> None:
        self._num_tokens += num_tokens
        self._num_responses += 1

    def waited(self, gap_s: float) -> None:
        """So long after the response before came this one."""
        self._gaps_s.append(gap_s)

    def began(self, first_s: float) -> None:
        """So long after the request came its first token."""
        self._first_s.append(first_s)

    def ended(self) -> None:
        self._num_sequences += 1

    def turn(self) -> dict[str, float]:
        """Ends the window and begins the next one. Latencies are there only where they were measured."""
        report: dict[str, float] = {
            "window": self.num_windows,
            "duration_s": time.monotonic() - self._since,
            "num_tokens": self._num_tokens,
            "num_responses": self._num_responses,
            "num_sequences": self._num_sequences,
            **_percentiles("itl", self._gaps_s),
            **_percentiles("ttft", self._first_s),
        }
        self.num_windows += 1
        self._begin()
        return report


def write_report(path: Path, report: dict[str, float]) -> None:
    """Whoever finds the file finds all of it."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(report))
    temporary.replace(path)


def _percentiles(name: str, values_s: "array[float]") -> dict[str, float]:
    if not values_s:
        return {}
    p50, p99 = np.percentile(np.frombuffer(values_s), (50, 99)) * 1e3
    return {f"{name}_p50_ms": float(p50), f"{name}_p99_ms": float(p99)}
