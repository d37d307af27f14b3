"""Starts and watches child processes: none outlives its parent, and one that dies stops them all.

    sys.exit(asyncio.run(run_until_exit([Child("rank-0", [...]), Child("rank-1", [...])])))

Each child gets a session of its own, so a Ctrl-C in the terminal reaches the parent alone, and the parent decides the
order: SIGTERM in reverse order of start, SIGKILL after a grace time, SIGKILL at once on a second signal.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NUM_TAIL_LINES = 20
_TAIL_BYTES = 64 << 10
# A death soon causes others, which may be noticed before it: one that a signal killed is taken for the cause.
_SETTLE_S = 0.2

# Runs in the child before its program and turns into it: asks the kernel (Linux) for SIGKILL when the parent's thread
# ends. Done here and not in a preexec_fn, because Python code between fork and exec can deadlock when the parent has
# threads, and gRPC has them. The parent may have died before prctl: then nobody would send the signal.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
try:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
except (AttributeError, OSError, TypeError):
    pass
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent died first")
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"cannot start {sys.argv[2]}: {error.strerror}")
"""


@dataclass(frozen=True)
class Child:
    """A process to run. Without ``log_path`` it writes where its parent does."""

    name: str
    argv: Sequence[str]
    log_path: Path | None = None
    env: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))


def python_module(module: str) -> list[str]:
    """The argv that runs ``module`` in this interpreter.

    The child imports from the working directory only if this process does: a ``random.py`` in the directory where the
    user happens to be must not replace the standard library's.
    """
    uses_cwd = any(entry in ("", os.getcwd()) for entry in sys.path)
    return [sys.executable, *([] if uses_cwd else ["-P"]), "-m", module]


async def run_until_exit(
    children: Sequence[Child],
    *,
    beside: Callable[[], Awaitable[None]] | None = None,
    grace_s: float = 5.0,
    together: bool = False,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),  # noqa: T201  # for people
) -> int:
    """Starts the children in order and keeps them until a signal arrives or one of them exits.

    Must run in the main thread: signals arrive there, and children die with the thread that started them.

    Args:
        beside: runs meanwhile, cancelled at the end; may return early. What it raises stops the children and is raised.
        grace_s: between a child's SIGTERM and its SIGKILL.
        together: SIGTERM goes to all at once; else each is told when the one started after it is gone.
        say: takes reports for the user: who died, of what, where its log is and how it ends.
    Returns:
        0 after SIGINT, SIGTERM or SIGHUP; 130 after a second one; 1 when a child exited by itself, whatever its status.
    """
    stop, kill = asyncio.Event(), asyncio.Event()
    running: list[_Running] = []
    with _signal_handlers(lambda: kill.set() if stop.is_set() else stop.set()):
        try:
            for child in children:
                running.append(await _Running.start(child))  # noqa: PERF401  # what has started must be stopped
            dead = await _watch(running, stop, beside)
            if dead:
                say(_report(dead))
        finally:
            stop.set()
            await _stop_all(running, kill, grace_s, together, say)
    if dead:
        return 1
    return 130 if kill.is_set() else 0


class _Running:
    """A started child. ``exited`` is done when the process is gone and reaped."""

    def __init__(self, child: Child, process: asyncio.subprocess.Process) -> None:
        self.child = child
        self._process = process
        self.exited = asyncio.create_task(process.wait())

    @classmethod
    async def start(cls, child: Child) -> "_Running":
        prelude = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid())]
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(child.log_path.open("ab")) if child.log_path else None
            process = await asyncio.create_subprocess_exec(
                *prelude,
                *child.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT if log else None,
                env=dict(child.env),
                start_new_session=True,
            )
        return cls(child, process)

    def terminate(self) -> None:
        if not self.exited.done():
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()

    def kill(self) -> None:
        """SIGKILL to the child's whole session: helpers of its own must not survive it either."""
        if not self.exited.done():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def obituary(self) -> str:
        status = self.exited.result()
        how = f"exited with status {status}" if status >= 0 else f"was killed by {_signal_name(-status)}"
        return f"{self.child.name} {how}" + (f"; its log is {self.child.log_path}" if self.child.log_path else "")


def _report(dead: Sequence[_Running]) -> str:
    """Who died, the likely cause last: there a person looks first, and so does a parent that shows our last lines."""
    first, *others = dead
    lines: list[str] = []
    if first.child.log_path:
        lines += [f"the log of {first.child.name} ends:", *("  | " + line for line in _tail(first.child.log_path))]
    return "\n".join([*lines, *(each.obituary() for each in others), first.obituary()])


async def _watch(
    running: Sequence[_Running], stop: asyncio.Event, beside: Callable[[], Awaitable[None]] | None
) -> list[_Running]:
    """Waits for the first reason to end; returns the children that exited by themselves, the likely cause first."""
    stopped = asyncio.create_task(stop.wait())
    work = asyncio.ensure_future(beside()) if beside else None
    waiting: set[asyncio.Future[Any]] = {stopped, *(each.exited for each in running)}
    try:
        if work:
            await asyncio.wait({*waiting, work}, return_when=asyncio.FIRST_COMPLETED)
        if not stop.is_set() and not any(each.exited.done() for each in running):
            if work:
                await work  # done; raises what it raised
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set():
            return []  # a child that obeys the same signal has not died of itself
        await asyncio.wait([each.exited for each in running], timeout=_SETTLE_S)
        dead = [each for each in running if each.exited.done()]
        return sorted(dead, key=lambda each: each.exited.result() >= 0)  # stable: by start among equals
    finally:
        stopped.cancel()
        if work:
            work.cancel()
            # Its own error matters only where no child died, and was raised above.
            await asyncio.gather(work, return_exceptions=True)


async def _stop_all(
    running: Sequence[_Running], kill: asyncio.Event, grace_s: float, together: bool, say: Callable[[str], None]
) -> None:
    """Ends all children, last started first, and reaps them."""
    killed = asyncio.create_task(kill.wait())
    if together:
        for each in reversed(running):
            each.terminate()
    deadline = asyncio.get_running_loop().time() + grace_s
    for each in reversed(running):
        if not together:
            each.terminate()
            deadline = asyncio.get_running_loop().time() + grace_s
        left_s = max(0.0, deadline - asyncio.get_running_loop().time())
        await asyncio.wait({each.exited, killed}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        if not each.exited.done():
            why = "asked to" if kill.is_set() else f"still there after {grace_s:g} s"
            say(f"killing {each.child.name}: {why}")
            each.kill()
            await each.exited
    killed.cancel()


@contextlib.contextmanager
def _signal_handlers(handler: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup asks
        numbers.append(signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _tail(path: Path) -> list[str]:
    """The last lines of a log, whatever is in it."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError as error:
        return [f"(unreadable: {error.strerror})"]
    return lines[-_NUM_TAIL_LINES:] or ["(empty)"]
