"""A rank's way to the arena on its own host, by shared memory. `RemoteArena` does the same from another host."""

import contextlib
import mmap
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from albireo.errors import StoreUnavailable
from albireo.kv.part import HEADER_BYTES, Bytes, PartName, Piece, read_part, write_part
from albireo.kv.wire import ATTACH, ATTACH_MAGIC, ATTACH_VERSION, ATTACHED, Status

_ATTACH_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class PartCopy:
    """A part's place in the arena (``offset``, as the store told) and in the rank's own memory (``pieces``)."""

    offset: int
    name: PartName
    pieces: Sequence[Piece]

    @property
    def num_bytes(self) -> int:
        """With its header."""
        return HEADER_BYTES + sum(piece.nbytes for piece in self.pieces)


class Arena(Protocol):
    """What a rank does with the store. Any thread may; calls return, whatever dies."""

    @property
    def is_lost(self) -> bool:
        """The lease is over, or the store is gone: all is a miss from here on."""

    def write(self, copies: Sequence[PartCopy]) -> list[bool]:
        """Writes parts into reserved places; which are complete."""

    def read(self, copies: Sequence[PartCopy]) -> list[bool]:
        """Reads parts from pinned places; which came whole. The pieces of the others must not be used."""

    def close(self) -> None:
        """Lets go of the arena."""


@dataclass(frozen=True, slots=True)
class Lease:
    """What a session hands to its ranks, so that they find the arena."""

    arena_id: bytes
    arena_socket: str
    arena_bytes: int
    lease: int


def map_arena(descriptor: int, num_bytes: int) -> mmap.mmap:
    """The arena as this process sees it; pages come with their first use, huge ones where the system has them."""
    mapping = mmap.mmap(descriptor, num_bytes)
    with contextlib.suppress(OSError):  # a kernel without them
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


class LocalArena:
    """The arena, mapped. The connection to the store is the rank's lease of the mapping.

    When it ends, copies that run end first, then the rank closes its side: only then may the store give the session's
    reserved places to somebody else.
    """

    def __init__(self, connection: socket.socket, mapping: mmap.mmap) -> None:
        self._connection = connection
        self._memory: Bytes = np.frombuffer(mapping, dtype=np.uint8)
        self._state = threading.Condition()
        self._num_copying = 0
        self._is_lost = False
        threading.Thread(target=self._watch, name="kv-lease", daemon=True).start()

    @classmethod
    def attach(cls, lease: Lease) -> "LocalArena":
        """Raises StoreUnavailable: no store is there, it has another arena, or the lease is over."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        descriptors: list[int] = []
        try:
            connection.settimeout(_ATTACH_TIMEOUT_S)
            connection.connect(lease.arena_socket)
            connection.sendall(ATTACH.pack(ATTACH_MAGIC, ATTACH_VERSION, lease.arena_id, lease.lease))
            answer, descriptors, _, _ = socket.recv_fds(connection, ATTACHED.size, 1)
            if len(answer) != ATTACHED.size:
                raise StoreUnavailable(f"{lease.arena_socket}: the KV store closed the connection")
            status, num_bytes = ATTACHED.unpack(answer)
            if status != Status.OK or not descriptors:
                raise StoreUnavailable(f"{lease.arena_socket}: the KV store does not know lease {lease.lease:#x}")
            mapping = map_arena(descriptors[0], num_bytes)
        except OSError as error:
            connection.close()
            raise StoreUnavailable(f"{lease.arena_socket}: {error.strerror or error}") from error
        except StoreUnavailable:
            connection.close()
            raise
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        connection.settimeout(None)
        return cls(connection, mapping)

    @property
    def is_lost(self) -> bool:
        return self._is_lost

    def write(self, copies: Sequence[PartCopy]) -> list[bool]:
        with self._copying() as may_copy:
            return [may_copy and self._write(copy) for copy in copies]

    def read(self, copies: Sequence[PartCopy]) -> list[bool]:
        with self._copying() as may_copy:
            return [may_copy and read_part(self._slot(copy), copy.name, copy.pieces) for copy in copies]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)  # the watching thread does the rest

    def _write(self, copy: PartCopy) -> bool:
        if self._is_lost:  # seen between two parts
            return False
        write_part(self._slot(copy), copy.name, copy.pieces)
        return True

    def _slot(self, copy: PartCopy) -> Bytes:
        if not 0 <= copy.offset <= len(self._memory) - copy.num_bytes:
            raise ValueError(f"offset {copy.offset}: the arena has {len(self._memory)} bytes")
        return self._memory[copy.offset : copy.offset + copy.num_bytes]

    @contextlib.contextmanager
    def _copying(self) -> Iterator[bool]:
        with self._state:
            may_copy = not self._is_lost
            self._num_copying += may_copy
        try:
            yield may_copy
        finally:
            with self._state:
                self._num_copying -= may_copy
                self._state.notify_all()

    def _watch(self) -> None:
        with contextlib.suppress(OSError):
            while self._connection.recv(64):
                pass  # the store says nothing more
        with self._state:
            self._is_lost = True
            self._state.wait_for(lambda: self._num_copying == 0)
        self._memory = np.zeros(0, dtype=np.uint8)  # unmaps
        self._connection.close()
