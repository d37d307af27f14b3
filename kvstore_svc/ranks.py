"""Ranks that have mapped the arena: a unix socket that hands out its descriptor, and each rank's connection as lease.

A lease that ends is told to its ranks by closing our side of their connections. A rank then ends what it copies and
closes its own; only then it is known that it no longer writes.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog

from albireo.identity import check_same_user
from albireo.kv.wire import ATTACH, ATTACH_MAGIC, ATTACH_VERSION, ATTACHED, Status
from kvstore_svc.memory import Memory

_HELLO_TIMEOUT_S = 5.0
_BACKLOG = 128

log = structlog.get_logger()


class Ranks:
    """Connections by lease.

    Args:
        on_gone: called with a lease that has ended, when no rank of it is left.
    """

    def __init__(self, memory: Memory, arena_id: bytes, on_gone: Callable[[int], None]) -> None:
        self._memory = memory
        self._arena_id = arena_id
        self._on_gone = on_gone
        self._by_lease: dict[int, set[socket.socket]] = {}
        self._open: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def num_attached(self) -> int:
        return sum(map(len, self._by_lease.values()))

    def open(self, lease: int) -> None:
        self._open.add(lease)
        self._by_lease[lease] = set()

    def close(self, lease: int) -> None:
        """No further rank gets in; those that are there are told to let go."""
        self._open.discard(lease)
        for connection in self._by_lease[lease]:
            connection.shutdown(socket.SHUT_WR)
        self._end_if_gone(lease)

    async def serve(self, path: Path) -> None:
        """Serves until it is cancelled."""
        with _listener(path) as listener:
            try:
                while True:
                    connection, _ = await asyncio.get_running_loop().sock_accept(listener)
                    task = asyncio.create_task(self._serve_one(connection))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
            finally:
                for task in self._tasks:
                    task.cancel()

    async def _serve_one(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with connection:
            connection.setblocking(False)
            try:
                lease = await self._admit(connection)
            except (OSError, ValueError, TimeoutError) as error:
                log.warning("a rank is not admitted", reason=str(error))
                return
            self._by_lease[lease].add(connection)
            try:
                while await loop.sock_recv(connection, 64):
                    pass  # a rank says nothing more
            except OSError:
                log.info("a rank's connection broke", lease=f"{lease:#x}")
            finally:
                self._by_lease[lease].discard(connection)
                self._end_if_gone(lease)

    async def _admit(self, connection: socket.socket) -> int:
        """Answers a rank's first message; ValueError when it may not have the arena."""
        check_same_user(connection)
        async with asyncio.timeout(_HELLO_TIMEOUT_S):
            hello = await _receive(connection, ATTACH.size)
        magic, version, arena_id, lease = ATTACH.unpack(hello)
        is_known = (magic, version, arena_id) == (ATTACH_MAGIC, ATTACH_VERSION, self._arena_id) and lease in self._open
        if not is_known:
            connection.send(ATTACHED.pack(Status.ENDED, 0))
            raise ValueError(f"lease {lease:#x} is not, or no longer, one of this arena")
        answer = ATTACHED.pack(Status.OK, len(self._memory.bytes))
        socket.send_fds(connection, [answer], [self._memory.descriptor])
        return int(lease)

    def _end_if_gone(self, lease: int) -> None:
        if lease not in self._open and not self._by_lease[lease]:
            del self._by_lease[lease]
            self._on_gone(lease)


@contextlib.contextmanager
def _listener(path: Path) -> Iterator[socket.socket]:
    """A socket at ``path``, in place of a dead store's, which only this user can reach."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.setblocking(False)
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(_BACKLOG)
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


async def _receive(connection: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        chunk = await asyncio.get_running_loop().sock_recv(connection, num_bytes - len(data))
        if not chunk:
            raise ValueError("it left without a word")
        data += chunk
    return data
