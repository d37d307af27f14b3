"""Between the leader and the other ranks of its host: length-prefixed frames over a unix socket per rank.

A stream socket tells at once when the other side dies, which a ring in shared memory does not, and costs a rank
microseconds a plan. Frames have a fixed layout: kind (uint8), length (uint32, little-endian), payload.
"""

import asyncio
import enum
import socket
import struct
import time
from pathlib import Path

from albireo.errors import GroupError

_HEADER = struct.Struct("<BI")
_UINT32 = struct.Struct("<I")
_JOIN_TIMEOUT_S = 60.0


class Kind(enum.IntEnum):
    """What a frame says. Rank to leader: HELLO rank, LOADED num_blocks, READY. Leader to rank: ALLOCATE num_blocks,
    PLAN bytes of a StepPlan."""

    HELLO = 1
    LOADED = 2
    READY = 3
    ALLOCATE = 4
    PLAN = 5


def frame(kind: Kind, payload: bytes | int = b"") -> bytes:
    """A frame; an integer payload travels as uint32."""
    data = _UINT32.pack(payload) if isinstance(payload, int) else payload
    return _HEADER.pack(kind, len(data)) + data


def to_int(payload: bytes) -> int:
    return int(_UINT32.unpack(payload)[0])


async def read_frame(reader: asyncio.StreamReader) -> tuple[Kind, bytes]:
    """The leader's side. Raises asyncio.IncompleteReadError when the rank is gone."""
    kind, length = _HEADER.unpack(await reader.readexactly(_HEADER.size))
    return Kind(kind), await reader.readexactly(length)


class RelayClient:
    """The side of a rank that is not the leader: blocking, used by its I/O thread."""

    def __init__(self, path: Path, rank: int) -> None:
        self._socket = connect_when_there(path)
        self._file = self._socket.makefile("rb", buffering=1 << 16)
        self.send(Kind.HELLO, rank)

    def send(self, kind: Kind, payload: bytes | int = b"") -> None:
        self._socket.sendall(frame(kind, payload))

    def receive(self) -> tuple[Kind, bytes] | None:
        """The next frame; None when the leader is gone."""
        header = self._file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return None
        kind, length = _HEADER.unpack(header)
        payload = self._file.read(length)
        return (Kind(kind), payload) if len(payload) == length else None


def connect_when_there(path: Path) -> socket.socket:
    """Connects to the leader's unix socket at ``path``, which may come later. GroupError when it does not in time."""
    deadline = time.monotonic() + _JOIN_TIMEOUT_S
    while True:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            client.connect(str(path))
        except OSError as error:
            client.close()
            if time.monotonic() > deadline:
                raise GroupError(f"{path}: no leader within {_JOIN_TIMEOUT_S:.0f} s") from error
            time.sleep(0.02)
        else:
            return client
