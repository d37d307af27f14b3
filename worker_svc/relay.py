"""Between the leader and the other ranks of its host: length-prefixed frames over a unix socket per rank.

A stream socket tells at once when the other side dies, which a ring in shared memory does not, and costs a rank
microseconds a plan. Frames have a fixed layout: kind (uint8), length (uint32, little-endian), payload.

A connection is of one group: when the group breaks, both sides close it, and the rank comes again with a new one.
"""

import asyncio
import contextlib
import enum
import secrets
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from albireo.errors import GroupError
from albireo.identity import check_same_user
from worker_svc.life import Meeting

_HEADER = struct.Struct("<BI")
_HELLO = struct.Struct("<II")
_MEETING = struct.Struct("<QI")
_FIND_LEADER_WITHIN_S = 60.0
_RETRY_S = 0.02

log = structlog.get_logger()


class Kind(enum.IntEnum):
    """What a frame says. Rank to leader: HELLO rank and num_blocks, READY, TRANSFERRED, bytes of a TransferResult.
    Leader to rank: ALLOCATE, a `Meeting`; PLAN, bytes of a StepPlan; ABANDON the transfers of all plans so far."""

    HELLO = 1
    READY = 2
    ALLOCATE = 3
    PLAN = 4
    TRANSFERRED = 5
    ABANDON = 6


class NoLeaderError(Exception):
    """There is no leader to be found."""


def frame(kind: Kind, payload: bytes = b"") -> bytes:
    return _HEADER.pack(kind, len(payload)) + payload


@dataclass(eq=False, slots=True)
class _Peer:
    """A rank's connection, as the leader sees it."""

    rank: int
    num_blocks: int
    writer: asyncio.StreamWriter
    is_ready: bool = False


class RelayServer:
    """The leader's side, on its I/O loop: ranks that wait for the next group, and the members of this one.

    Args:
        on_lost: called when the connection of a member ends.
        on_transferred: called with each TRANSFERRED frame's payload.
    """

    def __init__(self, num_peers: int, on_lost: Callable[[int], None], on_transferred: Callable[[bytes], None]) -> None:
        self._num = num_peers
        self._on_lost = on_lost
        self._on_transferred = on_transferred
        self._waiting: dict[int, _Peer] = {}
        self._members: dict[int, _Peer] = {}
        self._changed = asyncio.Event()
        self._server: asyncio.Server | None = None  # a reference: uvloop closes servers that nobody holds

    async def listen(self, path: Path) -> None:
        self._server = await asyncio.start_unix_server(self._serve, path)

    async def gather(self, num_blocks: int, check: Callable[[], None]) -> Meeting:
        """Waits for a connection of every other rank, and makes them the members of a group.

        Args:
            num_blocks: of the leader itself; the group takes the least of any rank.
            check: raises when the group is given up meanwhile.
        """
        await self._until(lambda: len(self._waiting) == self._num, check)
        self._members, self._waiting = self._waiting, {}
        meeting = Meeting(
            secrets.randbits(63), min([num_blocks, *(member.num_blocks for member in self._members.values())])
        )
        self.send_all(Kind.ALLOCATE, _MEETING.pack(meeting.name, meeting.num_blocks))
        return meeting

    async def wait_until_ready(self, check: Callable[[], None]) -> None:
        await self._until(lambda: all(member.is_ready for member in self._members.values()), check)

    def send_all(self, kind: Kind, payload: bytes) -> None:
        if self._members:
            data = frame(kind, payload)
            for member in self._members.values():
                member.writer.write(data)

    def release(self) -> None:
        """The group is broken: its members are to come again."""
        members, self._members = self._members, {}
        for member in members.values():
            member.writer.transport.abort()
        self._changed.set()

    async def _until(self, condition: Callable[[], bool], check: Callable[[], None]) -> None:
        while True:
            check()
            if condition():
                return
            self._changed.clear()
            await self._changed.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = None
        try:
            check_same_user(writer.get_extra_info("socket"))
            kind, payload = await _read_frame(reader)
            rank, num_blocks = _HELLO.unpack(payload)
            if kind is not Kind.HELLO or not 1 <= rank <= self._num:
                raise ValueError(f"{kind.name} of rank {rank}")
            peer = _Peer(rank, num_blocks, writer)
            self._admit(peer)
            while True:
                self._take(peer, *await _read_frame(reader))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except (ValueError, struct.error) as error:
            log.warning("a rank's connection makes no sense", error=str(error))
        finally:
            writer.transport.abort()
            if peer is not None:
                self._drop(peer)

    def _take(self, peer: _Peer, kind: Kind, payload: bytes) -> None:
        match kind:
            case Kind.READY:
                peer.is_ready = True
                self._changed.set()
            case Kind.TRANSFERRED:
                self._on_transferred(payload)
            case _:
                raise ValueError(f"{kind.name} of rank {peer.rank}")

    def _admit(self, peer: _Peer) -> None:
        former = self._waiting.pop(peer.rank, None)
        if former is not None:
            former.writer.transport.abort()
        self._waiting[peer.rank] = peer
        if peer.rank in self._members:  # it has left, and the end of its old connection is still under way
            self._on_lost(peer.rank)
        self._changed.set()

    def _drop(self, peer: _Peer) -> None:
        if self._waiting.get(peer.rank) is peer:
            del self._waiting[peer.rank]
        if self._members.get(peer.rank) is peer:
            self._on_lost(peer.rank)


async def _read_frame(reader: asyncio.StreamReader) -> tuple[Kind, bytes]:
    kind, length = _HEADER.unpack(await reader.readexactly(_HEADER.size))
    return Kind(kind), await reader.readexactly(length)


class RelayClient:
    """The side of another rank: blocking. `close` may be called by any thread and ends a `receive`."""

    def __init__(self, path: Path, rank: int, num_blocks: int, check: Callable[[], None]) -> None:
        try:
            self._socket = connect_when_there(path, _FIND_LEADER_WITHIN_S, check)
        except TimeoutError as error:
            raise NoLeaderError(str(error)) from error
        self._file = self._socket.makefile("rb", buffering=1 << 16)
        self._send(frame(Kind.HELLO, _HELLO.pack(rank, num_blocks)))

    def receive_meeting(self) -> Meeting:
        kind, payload = self._receive()
        if kind is not Kind.ALLOCATE:
            raise GroupError(f"{kind.name} of the leader where {Kind.ALLOCATE.name} was expected")
        return Meeting(*_MEETING.unpack(payload))

    def send_ready(self) -> None:
        self._send(frame(Kind.READY))

    def send_transferred(self, result: bytes) -> None:
        self._send(frame(Kind.TRANSFERRED, result))

    def receive_plan(self) -> bytes | None:
        """The next plan; None: all transfers so far are to be abandoned."""
        kind, payload = self._receive()
        if kind not in (Kind.PLAN, Kind.ABANDON):
            raise GroupError(f"{kind.name} of the leader where {Kind.PLAN.name} was expected")
        return payload if kind is Kind.PLAN else None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that reads, which closing alone does not

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise GroupError(f"the leader is gone: {error}") from error

    def _receive(self) -> tuple[Kind, bytes]:
        """The next frame; GroupError when the leader is gone."""
        try:
            kind, length = _HEADER.unpack(self._read(_HEADER.size))
            return Kind(kind), self._read(length)
        except (OSError, ValueError) as error:
            raise GroupError(f"the leader is gone: {error}") from error

    def _read(self, num_bytes: int) -> bytes:
        data = bytes(self._file.read(num_bytes))
        if len(data) < num_bytes:
            raise GroupError("the leader is gone")
        return data


def connect_when_there(path: Path, timeout_s: float, check: Callable[[], None]) -> socket.socket:
    """Connects to the unix socket at ``path``, which may come later, or be a dead one's that is replaced.

    Raises TimeoutError when it does not come in time, or what ``check`` raises meanwhile.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        check()
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.setblocking(False)  # where the other side does not accept, connecting would wait for ever
        try:
            client.connect(str(path))
        except OSError as error:
            client.close()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path}: nobody there within {timeout_s:.0f} s") from error
            time.sleep(_RETRY_S)
        else:
            client.setblocking(True)
            return client
