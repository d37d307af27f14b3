"""A circuit breaker: what fails again and again is left alone for a while, then tried once."""

_FAILURES = 3
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.5, 15.0


class Breaker:
    """Pure; ``now`` is in seconds."""

    def __init__(self) -> None:
        self._num_failures = 0
        self._closed_until = 0.0
        self._pause_s = _FIRST_PAUSE_S

    def lets_through(self, now: float) -> bool:
        """False: do not even try. After a pause one call is let through, and the others wait for what it finds."""
        if self._num_failures < _FAILURES:
            return True
        if now < self._closed_until:
            return False
        self._closed_until = now + self._pause_s
        return True

    def succeeded(self) -> None:
        self._num_failures, self._pause_s = 0, _FIRST_PAUSE_S

    def failed(self, now: float) -> None:
        self._num_failures += 1
        if self._num_failures > _FAILURES:
            self._pause_s = min(2 * self._pause_s, _MAX_PAUSE_S)
        self._closed_until = now + self._pause_s
