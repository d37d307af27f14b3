"""Where a front end listens, and how it gives that up to a successor without a client seeing an error.

gRPC's server cannot stop accepting short of stopping, and one that stops drops the requests that are on their way to it
or wait in its queue: their clients see CANCELLED. So an address is given up around gRPC: its listening sockets are shut
down, connections leave when they reach their age limit (gRPC sends GOAWAY then and serves what was sent before it, for
as long as that takes), and only then the server stops.

On a unix socket that has one gap, and only a client can close it: gRPC closes an aged connection right after its last
answer, and a client that writes before it has read that answer (gRPC's bandwidth probe does, ``grpc.http2.bdp_probe``)
gets a broken pipe and drops the answer with the connection. On TCP such a write succeeds.
"""

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from grpc import aio

from albireo.errors import ConfigError
from albireo.rpc import listen
from albireo.security import OPEN, Security

_MAX_PATH_BYTES = 107  # of a unix socket, without the terminating zero


class Addresses:
    """Of a process's only server: ``host:port``, shared with other processes, or ``unix:path``, taken over from a
    predecessor.

    Use: `bind`, start the server, `take_over`; at the end `close`, `have_successor` and `num_connections`, `remove`.
    """

    def __init__(self, addresses: Sequence[str], security: Security = OPEN) -> None:
        self._security = security
        self.names = tuple(addresses)
        self._tcp = [_host_and_port(address) for address in addresses if not address.startswith("unix:")]
        self._paths = {_path(address): _bound_path(address) for address in addresses if address.startswith("unix:")}
        self._inodes: dict[Path, os.stat_result] = {}  # of the paths that are ours

    def bind(self, server: aio.Server) -> None:
        """Raises ConfigError where it cannot listen. A path is bound under another name at first: gRPC deletes the name
        that it has bound when it stops, and a successor may have taken the real one by then."""
        for address in self.names:
            bound = address
            if address.startswith("unix:"):
                path = _path(address)
                bound = f"unix:{self._paths[path]}"
                if max(len(os.fsencode(path)), len(os.fsencode(self._paths[path]))) > _MAX_PATH_BYTES:
                    raise ConfigError(
                        f"cannot listen on {address}: a socket's path has {_MAX_PATH_BYTES} bytes at most"
                    )
            listen(server, bound, self._security)

    def take_over(self) -> None:
        """From now on new connections to our paths come here."""
        for path, bound in self._paths.items():
            bound.rename(path)
            self._inodes[path] = path.stat()

    def close(self) -> None:
        """No new connections come here by the ports that we share. Connections that are open go on."""
        for each in self._sockets():
            if each.family != socket.AF_UNIX and each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                each.shutdown(socket.SHUT_RDWR)

    async def have_successor(self) -> bool:
        """Whether another process listens on one of our addresses; call after `close`."""
        if any(path.exists() and not self._is_ours(path) for path in self._inodes):
            return True
        for host, port in self._tcp:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection(host, port)
                writer.close()
                return True
        return False

    def num_connections(self) -> int:
        return sum(_is_connected(each) for each in self._sockets())

    def remove(self) -> None:
        """Removes our paths, where they still are ours."""
        for path in self._paths:
            if self._is_ours(path):
                path.unlink(missing_ok=True)

    def _is_ours(self, path: Path) -> bool:
        try:
            return path in self._inodes and os.path.samestat(path.stat(), self._inodes[path])
        except OSError:
            return False

    def _sockets(self) -> Iterator[socket.socket]:
        """This process's sockets with one of our addresses at their near end: listening ones and connections. Each is a
        duplicate, closed when the next is asked for."""
        ports = {port for _, port in self._tcp}
        paths = {str(bound) for bound in self._paths.values()}
        for name in os.listdir("/dev/fd"):
            try:
                if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                    continue
                with socket.socket(fileno=os.dup(int(name))) as each:
                    near = each.getsockname()
                    is_port = each.family in (socket.AF_INET, socket.AF_INET6) and near[1] in ports
                    if is_port or (each.family == socket.AF_UNIX and near in paths):
                        yield each
            except OSError:  # closed meanwhile
                continue


def _is_connected(each: socket.socket) -> bool:
    try:
        each.getpeername()
    except OSError:
        return False
    return True


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        raise ConfigError(f"cannot listen on {address}: neither host:port nor unix:path")
    return host.strip("[]"), int(port)


def _path(address: str) -> Path:
    return Path(address.removeprefix("unix:").removeprefix("//")).absolute()


def _bound_path(address: str) -> Path:
    """Beside the path, so that it can be renamed; short, because socket paths are."""
    return _path(address).with_name(f".{os.getpid()}")
