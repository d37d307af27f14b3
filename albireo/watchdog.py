"""What a process tells its supervisor: that it is ready, and again and again that it is alive.

The protocol is systemd's (sd_notify(3)): datagrams ``READY=1`` and ``WATCHDOG=1`` to the socket that the environment
names in NOTIFY_SOCKET. Our own supervisor (`albireo.supervise`) listens to it, and so does systemd; without a listener
nothing is sent.
"""

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable

BEAT_INTERVAL_S = 0.5


class Watchdog:
    """The line to this process's supervisor. Sending never waits and never fails.

    Whoever starts beating last is the only one who does: a thread while the program is imported, then its event loop.
    """

    def __init__(self) -> None:
        # Taken out of the environment: a child process must not speak for us.
        path = os.environ.pop("NOTIFY_SOCKET", "")
        self._path = "\0" + path[1:] if path.startswith("@") else path
        self._socket: socket.socket | None = None
        self._beater: object = None
        if path:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)

    def beat(self) -> None:
        self._send(b"WATCHDOG=1")

    def ready(self) -> None:
        """This process does its work now; until then its supervisor takes its death for a failure to start."""
        self._send(b"READY=1")

    async def keep_beating(self) -> None:
        """Beats as long as the event loop turns."""
        self._beater = asyncio.current_task()
        while True:
            self.beat()
            await asyncio.sleep(BEAT_INTERVAL_S)

    def start_thread(self, may_beat: Callable[[], bool] = lambda: True) -> None:
        """Beats from a thread of its own for as long as ``may_beat`` says so."""

        def run() -> None:
            pause = threading.Event()
            while self._beater is thread and may_beat():
                self.beat()
                pause.wait(BEAT_INTERVAL_S)

        thread = self._beater = threading.Thread(target=run, name="watchdog", daemon=True)
        thread.start()

    def _send(self, message: bytes) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.sendto(message, self._path)
