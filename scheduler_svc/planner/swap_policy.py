"""Whether moving KV blocks is quicker than computing them again, by measured numbers."""

import enum

_MARGIN = 1.2  # moving must be that much quicker
_DECAY = 0.9  # a transfer counts half as much 7 transfers later
_FIRST_BYTES_PER_S = 1e9  # until something is measured
_FIRST_RTT_S = 1e-3


class SwapMode(enum.StrEnum):
    """What becomes of the blocks of preempted sequences.

    AUTO: whatever is quicker by the measured numbers. ALWAYS: they are stored, and all that the store has is loaded.
    NEVER: they are computed again, and not stored for it.
    """

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class Bandwidth:
    """Bytes per second of recent transfers, together."""

    def __init__(self) -> None:
        self._num_bytes = self._duration_s = 0.0
        self.bytes_per_s = _FIRST_BYTES_PER_S

    def observe(self, num_bytes: int, duration_s: float) -> None:
        """What was not copied at all tells nothing."""
        if num_bytes and duration_s > 0:
            self._num_bytes = _DECAY * self._num_bytes + num_bytes
            self._duration_s = _DECAY * self._duration_s + duration_s
            self.bytes_per_s = self._num_bytes / self._duration_s


class TransferRates:
    """How long the store and the copies take.

    Attributes:
        rtt_s: from a request to the store's answer.
    """

    def __init__(self) -> None:
        self.outward, self.inward = Bandwidth(), Bandwidth()
        self.rtt_s = _FIRST_RTT_S

    def observe_rtt(self, duration_s: float) -> None:
        self.rtt_s = _DECAY * self.rtt_s + (1 - _DECAY) * duration_s

    def load_s(self, num_bytes: int, num_queued_bytes: int) -> float:
        """Until ``num_bytes`` are in the cache, behind all that is under way."""
        return self.rtt_s + (num_queued_bytes + num_bytes) / self.inward.bytes_per_s

    def store_s(self, num_bytes: int, num_queued_bytes: int) -> float:
        return self.rtt_s + (num_queued_bytes + num_bytes) / self.outward.bytes_per_s


def is_quicker(mode: SwapMode, transfer_s: float, compute_s: float | None) -> bool:
    """Whether to move rather than to compute. ``compute_s`` None: not measured yet, so that moving is tried."""
    return mode is SwapMode.ALWAYS or compute_s is None or _MARGIN * transfer_s < compute_s


def wait_s(mode: SwapMode, transfer_s: float, compute_s: float | None, most_s: float) -> float:
    """How long the store may take to make blocks ready, so that moving them is still quicker; ``most_s`` at most."""
    if mode is SwapMode.ALWAYS or compute_s is None:
        return most_s
    return min(most_s, max(0.0, compute_s / _MARGIN - transfer_s))
