"""A bound on concurrent client writes."""

import asyncio
from types import TracebackType


class WriteSlots:
    """At most ``limit`` client writes at once, so that reading from the planner gets its turn.

    A write that a slow client holds up gives its slot back after ``stall_s``: slow clients do not starve the others.
    """

    def __init__(self, limit: int = 64, stall_s: float = 0.1) -> None:
        self._free = asyncio.Semaphore(limit)
        self._stall_s = stall_s
        self._held: dict[int, float] = {}  # ticket -> since when
        self._next_ticket = 0
        self._sweeper: asyncio.TimerHandle | None = None

    def slot(self) -> "_Slot":
        return _Slot(self)

    async def acquire(self) -> int:
        await self._free.acquire()
        loop = asyncio.get_running_loop()
        self._next_ticket += 1
        self._held[self._next_ticket] = loop.time()
        if self._sweeper is None:
            self._sweeper = loop.call_later(self._stall_s, self._sweep)
        return self._next_ticket

    def release(self, ticket: int) -> None:
        if self._held.pop(ticket, None) is not None:
            self._free.release()

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        latest = loop.time() - self._stall_s
        for ticket in [ticket for ticket, since in self._held.items() if since <= latest]:
            self.release(ticket)
        self._sweeper = loop.call_later(self._stall_s, self._sweep) if self._held else None


class _Slot:
    __slots__ = ("_slots", "_ticket")

    def __init__(self, slots: WriteSlots) -> None:
        self._slots = slots
        self._ticket = 0

    async def __aenter__(self) -> None:
        self._ticket = await self._slots.acquire()

    async def __aexit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._slots.release(self._ticket)
