"""Ports that a server is to listen on, and how this machine reaches them."""

import errno
import ipaddress
import socket

from albireo.errors import ConfigError


def check_port(host: str, port: int, port_flag: str, host_flag: str = "--host") -> int:
    """The port itself, or a free one for 0. Raises ConfigError when nothing could listen there."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"{port_flag} {port}: not a port (0 to 65535)")
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ConfigError(f"{host_flag} {host}: {error.strerror}") from error
    bound: list[int] = []
    errors: list[OSError] = []
    for family, kind, protocol, _, where in addresses:
        try:
            with socket.socket(family, kind, protocol) as probe:
                # Connections that an earlier server has closed must not be in the way. Not SO_REUSEPORT: it would
                # share the port with a server that runs.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(where)
                bound.append(probe.getsockname()[1])
        except OSError as error:
            errors.append(error)
    # A name may have an IPv6 address on a machine without IPv6; only a port in use is wrong at any of them.
    for each in errors:
        if each.errno == errno.EADDRINUSE or not bound:
            raise ConfigError(f"{port_flag} {port}: cannot listen at {host}:{port}: {each.strerror}") from each
    return bound[0]


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches what listens at ``host``, which `check_port` has let through."""
    addresses = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return all(ipaddress.ip_address(where[0]).is_loopback for *_, where in addresses)


def address(host: str, port: int) -> str:
    """Where a client on this machine reaches what listens there."""
    host = reachable(host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def reachable(host: str) -> str:
    """The host by which this machine reaches what listens at ``host``."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # compared, not bound
