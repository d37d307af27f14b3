"""A sum over the ranks of a stub group: a star of unix sockets around rank 0, no torch."""

import contextlib
import socket
from pathlib import Path

import numpy as np

from albireo.arrays import UInt64Array
from albireo.errors import GroupError
from worker_svc.relay import connect_when_there

_JOIN_TIMEOUT_S = 60.0
_STEP_TIMEOUT_S = 5.0


class StarCollective:
    """Joins ``tp_size`` ranks. No endless waits: a peer that is gone or silent for 5 s raises GroupError."""

    def __init__(self, path: Path, rank: int, tp_size: int) -> None:
        self._rank = rank
        self._peers = _accept_all(path, tp_size) if rank == 0 else [_connect(path, rank)]
        for peer in self._peers:
            peer.settimeout(_STEP_TIMEOUT_S)

    def all_reduce(self, values: UInt64Array) -> UInt64Array:
        """The sum over all ranks of ``values`` [n], the same on every rank; every rank must call."""
        try:
            if self._rank != 0:
                self._peers[0].sendall(values.tobytes())
                return _receive(self._peers[0], len(values))
            for peer in self._peers:
                values = values + _receive(peer, len(values))
            for peer in self._peers:
                peer.sendall(values.tobytes())
        except OSError as error:
            raise GroupError(f"rank {self._rank}: a peer of the collective is gone: {error}") from error
        return values

    def close(self) -> None:
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.close()


def _accept_all(path: Path, tp_size: int) -> list[socket.socket]:
    peers: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        path.unlink(missing_ok=True)
        server.bind(str(path))
        server.listen(tp_size)
        server.settimeout(_JOIN_TIMEOUT_S)
        while len(peers) < tp_size - 1:
            try:
                peer, _ = server.accept()
            except TimeoutError as error:
                raise GroupError(
                    f"{len(peers) + 1} of {tp_size} ranks joined within {_JOIN_TIMEOUT_S:.0f} s"
                ) from error
            peers[peer.recv(1)[0]] = peer
    return [peers[rank] for rank in sorted(peers)]


def _connect(path: Path, rank: int) -> socket.socket:
    peer = connect_when_there(path)
    peer.sendall(bytes([rank]))
    return peer


def _receive(peer: socket.socket, num: int) -> UInt64Array:
    data = bytearray(8 * num)
    view = memoryview(data)
    while view:
        received = peer.recv_into(view)
        if not received:
            raise ConnectionResetError("closed")
        view = view[received:]
    return np.frombuffer(data, dtype=np.uint64)
