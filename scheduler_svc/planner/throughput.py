"""How many tokens come out lately. No clock: callers say the time."""

from collections import deque

_WINDOW_S = 4.0


class Throughput:
    """The rate of a growing count, over the last seconds."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def observe(self, count: int, now: float) -> float:
        """Takes the count as it is ``now``; returns its growth per second."""
        self._samples.append((now, count))
        while len(self._samples) > 2 and now - self._samples[1][0] >= _WINDOW_S:
            self._samples.popleft()
        began, first = self._samples[0]
        return (count - first) / (now - began) if now > began else 0.0
