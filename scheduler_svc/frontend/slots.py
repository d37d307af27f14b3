"""A bound on concurrent client writes, and on how long one may take."""

import asyncio
from collections import OrderedDict
from typing import Protocol


class Writer(Protocol):
    """Writes to one client."""

    def may_write(self) -> None:
        """It has a slot now."""

    def too_slow(self, pending_s: float) -> None:
        """Its client has left a write pending for so long. It is expected to leave."""


class WriteSlots:
    """At most ``limit`` client writes at once, so that reading from the planner gets its turn.

    A write that a slow client holds up gives its slot back after ``stall_s``: slow clients do not starve the others.
    After ``timeout_s`` its writer is told. Both are seen by one look at all writes every ``stall_s``.
    """

    def __init__(self, limit: int = 64, stall_s: float = 0.1, timeout_s: float = 30.0) -> None:
        self._num_free = limit
        self._stall_s = stall_s
        self._timeout_s = timeout_s
        self._waiting: OrderedDict[Writer, None] = OrderedDict()
        self._writing: dict[Writer, float] = {}  # with a slot -> since when
        self._stalled: dict[Writer, float] = {}  # the same without
        self._sweeper: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    def ask(self, writer: Writer) -> None:
        """Queues for a slot; `Writer.may_write` is called when it is there, perhaps at once."""
        if self._num_free:
            self._num_free -= 1
            self._give(writer)
        else:
            self._waiting[writer] = None

    def leave(self, writer: Writer) -> None:
        """The writer gives back what it has, or no longer waits for it; nothing where it did not ask."""
        if self._writing.pop(writer, None) is not None:
            self._pass_on()
        elif self._stalled.pop(writer, None) is None:
            self._waiting.pop(writer, None)

    def _give(self, writer: Writer) -> None:
        self._writing[writer] = self._loop.time()
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(self._stall_s, self._sweep)
        writer.may_write()

    def _pass_on(self) -> None:
        if self._waiting:
            self._give(self._waiting.popitem(last=False)[0])
        else:
            self._num_free += 1

    def _sweep(self) -> None:
        now = self._loop.time()
        stalled = [(writer, since) for writer, since in self._writing.items() if now - since >= self._stall_s]
        for writer, since in stalled:
            self._stalled[writer] = since
            del self._writing[writer]
            self._pass_on()
        for writer in [writer for writer, since in self._stalled.items() if now - since >= self._timeout_s]:
            del self._stalled[writer]
            writer.too_slow(self._timeout_s)
        is_needed = self._writing or self._stalled
        self._sweeper = self._loop.call_later(self._stall_s, self._sweep) if is_needed else None
