"""Whether a group makes progress: health means progress, not a process that answers. No clock: callers say the time."""

import statistics
from collections import defaultdict, deque

_LEAST_LIMIT_S = 3.0
_TIMES_MEDIAN = 10.0
_NUM_RECENT = 64


class Progress:
    """Follows steps from plan to result, by their size.

    A group is stalled when a step has not completed for max(3 s, 10 x the median of recent steps of its size): counted
    from the result before it, or from its plan when the group had nothing to do.
    """

    def __init__(self) -> None:
        self._planned: deque[tuple[int, int, float]] = deque()  # (size, prompt tokens, when) of steps in flight
        self._recent_s: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_NUM_RECENT))
        self._moved_at = 0.0

    def planned(self, num_tokens: int, num_prefill_tokens: int, now: float) -> None:
        if not self._planned:
            self._moved_at = now
        self._planned.append((num_tokens.bit_length(), num_prefill_tokens, now))

    def completed(self, now: float) -> tuple[int, float]:
        """The oldest step in flight has brought its result; returns its prompt tokens and how long it took."""
        size, num_prefill_tokens, planned_at = self._planned.popleft()
        duration_s = now - max(planned_at, self._moved_at)
        self._recent_s[size].append(duration_s)
        self._moved_at = now
        return num_prefill_tokens, duration_s

    def forget_steps(self, now: float) -> None:
        """The group was lost: nothing is in flight."""
        self._planned.clear()
        self._moved_at = now

    def idle(self, now: float) -> None:
        """There is no work: no progress is expected."""
        self._moved_at = now

    def waited_s(self, now: float) -> float:
        """Since when nothing has moved."""
        return now - self._moved_at

    def is_stalled(self, now: float) -> bool:
        return self.waited_s(now) > self._limit_s()

    def _limit_s(self) -> float:
        """Of the oldest step in flight. A size that was never seen is judged by the nearest that was, in proportion."""
        if not self._planned or not self._recent_s:
            return _LEAST_LIMIT_S
        size = self._planned[0][0]
        nearest = min(self._recent_s, key=lambda seen: abs(seen - size))
        scale = 2.0 ** max(0, size - nearest)
        return max(_LEAST_LIMIT_S, _TIMES_MEDIAN * scale * statistics.median(self._recent_s[nearest]))
