"""Who may write to a client, and for how long."""

import asyncio

from scheduler_svc.frontend.slots import WriteSlots


class Writer:
    def __init__(self) -> None:
        self.may = asyncio.Event()
        self.slow = asyncio.Event()

    def may_write(self) -> None:
        self.may.set()

    def too_slow(self, pending_s: float) -> None:
        self.slow.set()


def may_write(writers: list[Writer]) -> list[bool]:
    return [writer.may.is_set() for writer in writers]


async def test_writes_are_bounded_and_come_in_order() -> None:
    slots = WriteSlots(limit=2)
    writers = [Writer() for _ in range(5)]
    for writer in writers:
        slots.ask(writer)
    assert may_write(writers) == [True, True, False, False, False]
    slots.leave(writers[2])  # it no longer waits
    slots.leave(writers[0])
    slots.leave(writers[0])  # gives nothing more
    assert may_write(writers) == [True, True, False, True, False]
    for writer in writers:
        slots.leave(writer)
    late = [Writer() for _ in range(3)]
    for writer in late:
        slots.ask(writer)
    assert may_write(late) == [True, True, False], "as many slots as at first"


async def test_a_stalled_write_gives_its_slot_back() -> None:
    """Clients that do not read must not hold up the others."""
    slots = WriteSlots(limit=1, stall_s=0.01)
    stalled, next_one, last = Writer(), Writer(), Writer()
    slots.ask(stalled)
    slots.ask(next_one)
    async with asyncio.timeout(5):
        await next_one.may.wait()
    slots.leave(stalled)
    slots.ask(last)
    assert not last.may.is_set(), "what was given back counts once"
    slots.leave(next_one)
    assert last.may.is_set()
    assert not stalled.slow.is_set()


async def test_a_writer_is_told_once_when_its_write_takes_too_long() -> None:
    slots = WriteSlots(limit=1, stall_s=0.01, timeout_s=0.05)
    slow, quick = Writer(), Writer()
    slots.ask(slow)
    async with asyncio.timeout(5):
        await slow.slow.wait()
    slow.slow.clear()
    slots.ask(quick)
    assert quick.may.is_set()
    slots.leave(quick)
    await asyncio.sleep(0.05)
    assert not slow.slow.is_set()
    assert not quick.slow.is_set()
