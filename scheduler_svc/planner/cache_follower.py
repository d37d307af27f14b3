"""What a front end that follows the prefix cache has not been told yet."""

from collections.abc import Callable, Iterator
from itertools import islice

from albireo.cache_events import Cached, Change, Removed, Reset, Stored, parents_first


class CacheFollower:
    """Changes that wait, as few as lead to what is cached now: two that undo each other both vanish.

    So however long a front end does not read, what waits for it is a few times the pool at most.

    Args:
        on_change: called when `take` has something.
    """

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        self._sending: Iterator[Change] = iter(())  # before what waits
        self._waiting: dict[bytes, Stored | Removed] = {}  # by hash

    def begin(self, blocks: Cached) -> None:
        """All that is cached, whatever has been told before; ``blocks`` is kept and must not change."""
        self.reset()
        self._sending = _first(Reset(), parents_first(blocks))

    def reset(self) -> None:
        """Nothing is cached any more."""
        self._sending = iter((Reset(),))
        self._waiting = {}
        self._on_change()

    def store(self, block: Stored) -> None:
        """``block`` was not cached and is now."""
        # One that waits to be removed is still known, and its hash says what it holds.
        if self._waiting.pop(block.block_hash, None) is None:
            self._waiting[block.block_hash] = block
        self._on_change()

    def remove(self, block_hash: bytes) -> None:
        """The block was cached and is no longer."""
        if self._waiting.pop(block_hash, None) is None:
            self._waiting[block_hash] = Removed(block_hash)
        self._on_change()

    def take(self, num: int) -> list[Change]:
        """The next changes, ``num`` at most."""
        taken = list(islice(self._sending, num))
        if len(taken) < num and self._waiting:
            waiting, self._waiting = self._waiting, {}
            self._sending = iter(waiting.values())
            taken += islice(self._sending, num - len(taken))
        if len(taken) == num:
            self._on_change()  # there may be more
        return taken


def _first(change: Change, others: Iterator[Stored]) -> Iterator[Change]:
    yield change
    yield from others
