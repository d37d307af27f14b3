"""Starts child processes and keeps them running: none outlives its parent, and one that dies is started again.

    sys.exit(asyncio.run(supervise([Child("rank-0", [...]), Child("rank-1", [...])])))

**Exit statuses**, of supervisors and of the processes under them:

    0    ended because it was asked to
    1    failed while running: start me again
    2    wrong usage, configuration or model: starting me again cannot help
    130  killed its children on a second Ctrl-C

A child that exits by itself, with whatever status, is started again while the others go on. All end when one exits with
status 2, or fails to start `MAX_FAILURES` times in a row: it is gone before it has said that it is ready.

**Watchdog.** A child tells that it is ready and alive with sd_notify(3) (`albireo.watchdog`); one that falls silent is
killed, and so started again. A supervisor does the same for its own: it beats, and is ready when all its children are.

**Signals.** SIGINT, SIGTERM and SIGHUP stop all, stage by stage: SIGTERM, and SIGKILL after a grace time. A second one
kills at once. Each child gets a session of its own, so a Ctrl-C in the terminal reaches the parent alone, and the
parent decides the order. SIGUSR2 replaces the children, one after the other (`Roll`).
"""

import asyncio
import contextlib
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from albireo.child import Child, Process, Roll
from albireo.watchdog import Watchdog

MAX_FAILURES = 5
READY_WITHIN_S = 60.0  # in a rolling restart
_BACKOFF_S, _MAX_BACKOFF_S = 0.2, 5.0
_CHECK_S = 0.5
# Woken so late, this process was stopped or starved itself, and cannot tell who else was silent meanwhile.
_PAUSED_S = 1.0
_FAILED, _UNUSABLE, _KILLED = 1, 2, 130

Say = Callable[[str], None]


async def supervise(
    children: Sequence[Child],
    *,
    beside: Callable[[], Awaitable[None]] | None = None,
    grace_s: float = 5.0,
    say: Say = lambda text: print(text, file=sys.stderr, flush=True),  # noqa: T201  # for people
) -> int:
    """Starts the children in order and keeps them running until a signal arrives or a restart cannot help.

    Must run in the main thread: signals arrive there, and children die with the thread that started them.

    Args:
        beside: runs meanwhile, cancelled at the end; may return early. What it raises stops the children and is raised.
        grace_s: between a child's SIGTERM and its SIGKILL.
        say: takes reports for the user: who died, of what, where its log is and how it ends.
    Returns:
        The exit status for this process, as above.
    """
    # In /tmp, because a socket's path holds 107 bytes and $TMPDIR may be long.
    with tempfile.TemporaryDirectory(prefix="albireo-", dir="/tmp") as directory:
        supervisor = _Supervisor(children, Path(directory), grace_s, say)
        with _signal_handlers(supervisor.interrupt, supervisor.start_rolling):
            return await supervisor.run(beside)


class _Supervisor:
    """All children of this process, and how they end together."""

    def __init__(self, children: Sequence[Child], directory: Path, grace_s: float, say: Say) -> None:
        self._watchdog = Watchdog()
        self._keepers = [_Keeper(child, directory, self._tell_ready, grace_s, say) for child in children]
        self._grace_s = grace_s
        self._say = say
        self._stopping: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._killed = False
        self._rolling: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._rolling.set_result(None)

    async def run(self, beside: Callable[[], Awaitable[None]] | None) -> int:
        beating = asyncio.create_task(self._watchdog.keep_beating())
        keeping = [asyncio.create_task(each.keep()) for each in self._keepers]
        listening = asyncio.create_task(self._listen())
        try:
            status = await _first_result([self._stopping, *keeping, listening], beside)
        finally:
            if not self._stopping.done():
                self._stopping.set_result(0)
            await _cancel(*keeping, listening, self._rolling)
            for stage in sorted({each.child.stage for each in self._keepers}, reverse=True):
                await _end([each for each in self._processes() if each.child.stage == stage], self._grace_s, self._say)
            await _cancel(beating)
        return _KILLED if self._killed and status == 0 else status

    def interrupt(self) -> None:
        """The first time stops all, then kills all."""
        if not self._stopping.done():
            self._stopping.set_result(0)
            return
        self._killed = True
        for each in self._processes():
            self._say(f"killing {each.child.name}: asked to")
            each.kill()

    def start_rolling(self) -> None:
        if self._rolling.done() and not self._stopping.done():
            self._rolling = asyncio.create_task(self._roll())
        else:
            self._say("no rolling restart now: one is under way, or the end")

    async def _roll(self) -> None:
        for each in self._keepers:
            if not await each.roll():
                self._say(f"the rolling restart ends early: the new {each.child.name} did not become ready")
                return

    async def _listen(self) -> int:
        """Kills whoever is silent for too long; never returns."""
        loop = asyncio.get_running_loop()
        before = loop.time()
        while True:
            await asyncio.sleep(_CHECK_S)
            now = loop.time()
            was_paused = now - before > _CHECK_S + _PAUSED_S
            before = now
            for each in self._processes():
                each.read()  # what came meanwhile counts
                if was_paused:
                    each.excuse()
                elif each.is_silent(now):
                    self._say(f"killing {each.child.name}: it did not answer for {each.patience_s:g} s")
                    each.kill()

    def _tell_ready(self) -> None:
        if all(any(process.ready.done() for process in each.processes) for each in self._keepers):
            self._watchdog.ready()

    def _processes(self) -> list[Process]:
        return [process for each in self._keepers for process in each.processes if not process.exited.done()]


class _Keeper:
    """Keeps one child running. ``processes`` are those which are there: two while one replaces the other."""

    def __init__(self, child: Child, directory: Path, on_ready: Callable[[], None], grace_s: float, say: Say) -> None:
        self.child = child
        self.processes: list[Process] = []
        self._directory = directory
        self._on_ready = on_ready
        self._grace_s = grace_s
        self._say = say
        # Carries a future for the process that was replaced, or for None when its successor did not become ready.
        self._roll_asked: asyncio.Future[asyncio.Future[Process | None]] = asyncio.get_running_loop().create_future()

    async def keep(self) -> int:
        """Starts the child again and again; returns the status to end with when that cannot help."""
        num_failures = 0
        process = await self._start()
        while True:
            await _wait_for_one(process.exited, self._roll_asked)
            if not process.exited.done():
                process = await self._replace(process)
                continue
            status = process.exited.result()
            num_failures = 0 if process.ready.done() else num_failures + 1
            if status == _UNUSABLE or (status == _FAILED and self.child.supervises and num_failures):
                self._say(process.report())
                return status
            if num_failures == MAX_FAILURES:
                self._say(process.report(f", failing to start {num_failures} times in a row"))
                return _FAILED
            self._say(process.obituary(" and is started again"))
            if num_failures > 1:
                await asyncio.sleep(min(_MAX_BACKOFF_S, _BACKOFF_S * 2 ** (num_failures - 2)))
            process = await self._start()

    async def roll(self) -> bool:
        """Does what the child's `Roll` says. False: the new process did not become ready in time."""
        if self.child.supervises:
            for each in self.processes:
                if each.ready.done():  # before, all that it runs is new, and the signal might kill it
                    each.send_signal(signal.SIGUSR2)
            return True
        if self.child.roll is Roll.KEEP:
            return True
        answer: asyncio.Future[Process | None] = asyncio.get_running_loop().create_future()
        self._roll_asked.set_result(answer)
        old = await answer
        if old is None:
            return False
        await _end([old], self._grace_s, self._say)  # here, because `keep` has the new one to look after
        self._say(f"{self.child.name} is replaced")
        return True

    async def _replace(self, old: Process) -> Process:
        """Starts a successor; returns which of the two is to be kept."""
        answer = self._roll_asked.result()
        self._roll_asked = asyncio.get_running_loop().create_future()
        overlaps = self.child.roll is Roll.OVERLAP
        if not overlaps:
            await _end([old], self._grace_s, self._say)
        new = await self._start()
        await _wait_for_one(new.ready, new.exited, timeout_s=READY_WITHIN_S)
        is_ready = new.ready.done()
        if overlaps and not is_ready:
            new.kill()
            await _wait_for_one(new.exited)
            self._say(new.report(", as successor of one that goes on"))
        answer.set_result(old if is_ready else None)
        return old if overlaps and not is_ready else new

    async def _start(self) -> Process:
        process = await Process.start(self.child, self._directory)
        self.processes.append(process)
        process.exited.add_done_callback(lambda _: self.processes.remove(process))
        process.ready.add_done_callback(lambda _: self._on_ready())
        return process


async def _end(processes: Sequence[Process], grace_s: float, say: Say) -> None:
    """SIGTERM to all at once, SIGKILL to those still there after the grace time; returns when they are gone."""
    for each in processes:
        each.terminate()
    exits = [each.exited for each in processes]
    if not exits:
        return
    await asyncio.wait(exits, timeout=grace_s)
    for each in processes:
        if not each.exited.done():
            say(f"killing {each.child.name}: still there after {grace_s:g} s")
            each.kill()
    await asyncio.wait(exits)


async def _first_result(reasons: Sequence[asyncio.Future[int]], beside: Callable[[], Awaitable[None]] | None) -> int:
    """The first result of any of ``reasons``, unless ``beside`` raises before."""
    work = asyncio.ensure_future(beside()) if beside else None
    try:
        if work:
            await _wait_for_one(work, *reasons)
            if not any(each.done() for each in reasons):
                work.result()  # raises what it raised
        await _wait_for_one(*reasons)
        return next(each.result() for each in reasons if each.done())
    finally:
        if work:
            await _cancel(work)


async def _wait_for_one(*work: asyncio.Future[Any], timeout_s: float | None = None) -> None:
    await asyncio.wait(work, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)


async def _cancel(*work: asyncio.Future[Any]) -> None:
    for each in work:
        each.cancel()
    await asyncio.gather(*work, return_exceptions=True)


@contextlib.contextmanager
def _signal_handlers(on_stop: Callable[[], None], on_roll: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    handlers: Mapping[signal.Signals, Callable[[], None]] = {
        signal.SIGINT: on_stop,
        signal.SIGTERM: on_stop,
        signal.SIGHUP: on_stop,
        signal.SIGUSR2: on_roll,
    }
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # as nohup asks
        handlers = {number: handler for number, handler in handlers.items() if number != signal.SIGHUP}
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in handlers:
            loop.remove_signal_handler(number)
