"""A sum over the ranks of a stub group: a star of unix sockets around rank 0, no torch."""

import contextlib
import socket
import struct
import threading
import time
from pathlib import Path

import numpy as np

from albireo.arrays import UInt64Array
from albireo.errors import GroupError
from worker_svc.relay import connect_when_there

_HELLO = struct.Struct("<Q")  # the meeting
_JOIN_TIMEOUT_S = 60.0
_STEP_TIMEOUT_S = 3.0
_POLL_S = 0.1
_HELLO_WITHIN_S = 1.0


class StarCollective:
    """Joins ``tp_size`` ranks, again and again. A peer that is gone, or silent for 3 s, raises GroupError."""

    def __init__(self, path: Path, rank: int, tp_size: int) -> None:
        self._path = path
        self._rank = rank
        self._num_peers = tp_size - 1 if rank == 0 else 1
        self._lock = threading.Lock()
        self._is_aborted = False
        self._peers: list[socket.socket] = []

    def join(self, meeting: int) -> None:
        """Meets the ranks that were given the same number."""
        try:
            if self._num_peers and self._rank == 0:
                self._accept_peers(meeting)
            elif self._num_peers:
                peer = connect_when_there(self._path, _JOIN_TIMEOUT_S, self._check)
                self._add(peer)
                peer.sendall(_HELLO.pack(meeting))
        except OSError as error:
            raise GroupError(f"rank {self._rank} did not meet the others: {error}") from error

    def all_reduce(self, values: UInt64Array) -> UInt64Array:
        """The sum over all ranks of ``values`` [n], the same on every rank; every rank must call."""
        try:
            if self._rank != 0:
                self._peers[0].sendall(values.tobytes())
                return _receive_words(self._peers[0], len(values))
            for peer in self._peers:
                values = values + _receive_words(peer, len(values))
            for peer in self._peers:
                peer.sendall(values.tobytes())
        except OSError as error:
            raise GroupError(f"rank {self._rank}: a peer of the collective is gone: {error}") from error
        return values

    def abort(self) -> None:
        """From any thread: ends every wait, now or later, until `leave`."""
        with self._lock:
            self._is_aborted = True
            for peer in self._peers:
                with contextlib.suppress(OSError):
                    peer.shutdown(socket.SHUT_RDWR)

    def leave(self) -> None:
        with self._lock:
            for peer in self._peers:
                peer.close()
            self._peers = []
            self._is_aborted = False

    def _accept_peers(self, meeting: int) -> None:
        deadline = time.monotonic() + _JOIN_TIMEOUT_S
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
            self._path.unlink(missing_ok=True)
            server.bind(str(self._path))
            server.listen(self._num_peers)
            server.settimeout(_POLL_S)
            while len(self._peers) < self._num_peers:
                self._check()
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{len(self._peers) + 1} of {self._num_peers + 1} ranks came")
                with contextlib.suppress(OSError):
                    peer, _ = server.accept()
                    peer.settimeout(_HELLO_WITHIN_S)
                    if _receive(peer, _HELLO.size) == _HELLO.pack(meeting):  # else it comes from a group that is broken
                        self._add(peer)

    def _add(self, peer: socket.socket) -> None:
        peer.settimeout(_STEP_TIMEOUT_S)
        with self._lock:
            self._peers.append(peer)
        self._check()  # an abort that came before did not see this peer

    def _check(self) -> None:
        if self._is_aborted:
            raise GroupError("the collective is aborted")


def _receive_words(peer: socket.socket, num: int) -> UInt64Array:
    return np.frombuffer(_receive(peer, 8 * num), dtype=np.uint64)


def _receive(peer: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        received = peer.recv_into(view)
        if not received:
            raise ConnectionResetError("closed")
        view = view[received:]
    return data
