"""One child process: how it is started, what it tells its supervisor, and how it ends."""

import asyncio
import contextlib
import enum
import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_NUM_TAIL_LINES = 20
_TAIL_BYTES = 64 << 10

# A child that has beaten once must beat at least so often; a new one has to start its interpreter first.
SILENCE_S = 4.0
FIRST_BEAT_S = 8.0

# Runs in the child before its program and turns into it: asks the kernel (Linux) for SIGKILL when the parent's thread
# ends. Done here and not in a preexec_fn, because Python code between fork and exec can deadlock when the parent has
# threads, and gRPC has them. The parent may have died before prctl: then nobody would send the signal.
_PRELUDE = """
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
    print(f"cannot start {sys.argv[2]}: {error.strerror}", file=sys.stderr)
    sys.exit(2)
"""
_serial = itertools.count()


class Roll(enum.Enum):
    """What a rolling restart does to a child."""

    KEEP = enum.auto()  # nothing
    RESTART = enum.auto()  # ends it and starts a new one
    OVERLAP = enum.auto()  # starts a new one, and ends the old one when that is ready


@dataclass(frozen=True)
class Child:
    """A process to run. Without ``log_path`` it writes where its parent does.

    Attributes:
        watched: it beats (`albireo.watchdog`), and is killed when it is silent for too long.
        stage: those of a higher stage are stopped before those of a lower one.
        roll: what a rolling restart does to it.
        supervises: it restarts children of its own: it decides about a rolling restart, and need not be started again
            when it gave up.
    """

    name: str
    argv: Sequence[str]
    log_path: Path | None = None
    env: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    watched: bool = True
    stage: int = 0
    roll: Roll = Roll.RESTART
    supervises: bool = False


def python_module(module: str) -> list[str]:
    """The argv that runs ``module`` in this interpreter.

    The child imports from the working directory only if this process does: a ``random.py`` in the directory where the
    user happens to be must not replace the standard library's.
    """
    uses_cwd = any(entry in ("", os.getcwd()) for entry in sys.path)
    return [sys.executable, *([] if uses_cwd else ["-P"]), "-m", module]


class Process:
    """A started child. ``exited`` is done when it is gone and reaped, ``ready`` when it has said so."""

    def __init__(self, child: Child, process: asyncio.subprocess.Process, notify: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        self.child = child
        self.ready: asyncio.Future[None] = loop.create_future()
        self.patience_s = FIRST_BEAT_S
        self._last_sign = loop.time()
        self._watched = child.watched
        self._told_to_end = False
        self._process = process
        self._notify = notify
        loop.add_reader(notify, self.read)
        self.exited = asyncio.create_task(self._wait())

    @classmethod
    async def start(cls, child: Child, directory: Path) -> "Process":
        """Starts the child; the socket to which it sends its beats is made in ``directory``."""
        prelude = [sys.executable, "-I", "-S", "-c", _PRELUDE, str(os.getpid())]
        notify_path = directory / str(next(_serial))
        with contextlib.ExitStack() as if_it_fails, contextlib.ExitStack() as stack:
            notify = if_it_fails.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            notify.setblocking(False)
            notify.bind(str(notify_path))
            log = stack.enter_context(child.log_path.open("ab")) if child.log_path else None
            process = await asyncio.create_subprocess_exec(
                *prelude,
                *child.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT if log else None,
                env={**child.env, "NOTIFY_SOCKET": str(notify_path)},
                start_new_session=True,
            )
            if_it_fails.pop_all()
        return cls(child, process, notify)

    @property
    def pid(self) -> int:
        return self._process.pid

    def read(self) -> None:
        """Takes in all that the child has said."""
        with contextlib.suppress(BlockingIOError):
            while True:
                for line in self._notify.recv(4096).splitlines():
                    if line == b"WATCHDOG=1":
                        self.patience_s = SILENCE_S
                        self.excuse()
                    elif line == b"READY=1" and not self.ready.done():
                        self.ready.set_result(None)

    def excuse(self) -> None:
        """Its silence counts from now on."""
        self._last_sign = asyncio.get_running_loop().time()

    def is_silent(self, now: float) -> bool:
        return self._watched and now - self._last_sign > self.patience_s

    def terminate(self) -> None:
        """SIGTERM, once: to a supervisor a second one means SIGKILL. From here on only the grace time counts."""
        self._watched = False
        if not self._told_to_end:
            self._told_to_end = True
            self.send_signal(signal.SIGTERM)

    def send_signal(self, number: signal.Signals) -> None:
        if not self.exited.done():
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to the child's whole session: helpers of its own must not survive it either."""
        self._watched = False
        if not self.exited.done():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def obituary(self, more: str = "") -> str:
        """One line: how it died, ``more``, and where its log is."""
        status = self.exited.result()
        how = f"exited with status {status}" if status >= 0 else f"was killed by {_signal_name(-status)}"
        return f"{self.child.name} {how}{more}" + (f"; its log is {self.child.log_path}" if self.child.log_path else "")

    def report(self, more: str = "") -> str:
        """The end of its log, then the obituary: people look there first, and a parent shows our last lines."""
        if not self.child.log_path:
            return self.obituary(more)
        lines = ["  | " + line for line in _tail(self.child.log_path)]
        return "\n".join([f"the log of {self.child.name} ends:", *lines, self.obituary(more)])

    async def _wait(self) -> int:
        try:
            return await self._process.wait()
        finally:
            self.read()  # it may have been ready just before
            asyncio.get_running_loop().remove_reader(self._notify)
            path = self._notify.getsockname()
            self._notify.close()
            os.unlink(path)


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
