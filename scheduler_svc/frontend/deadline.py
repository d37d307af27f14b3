"""Deadlines: by the monotonic clock within this process (infinite: there is none), as remaining time on the wire."""

import math
import time

from albireo.errors import DeadlineExceeded

NO_DEADLINE = math.inf


def deadline_in(remaining_s: float | None) -> float:
    """The deadline that is so far away; None: none."""
    return NO_DEADLINE if remaining_s is None else time.monotonic() + remaining_s


def remaining_s(deadline: float) -> float:
    """Seconds until a deadline, as ``Submit.remaining_s`` has them: 0 when there is none. Raises DeadlineExceeded."""
    if deadline == NO_DEADLINE:
        return 0.0
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise DeadlineExceeded("the request's deadline has passed")
    return remaining
