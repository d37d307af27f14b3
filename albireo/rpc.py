"""What every gRPC server and channel of Albireo has in common: limits, keepalive, TLS, tokens, health, reflection."""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import grpc
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from albireo.authentication import ALL_ROLES, OPERATORS, SERVICES, Admit
from albireo.errors import ConfigError
from albireo.identity import Role
from albireo.security import OPEN, Security

# Reference servers of this field take 256 MiB both ways.
MAX_MESSAGE_BYTES = 256 << 20

_COMMON_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]

SERVER_OPTIONS: list[tuple[str, int]] = [
    *_COMMON_OPTIONS,
    # Clients may ping as often as they like: a ping costs less than the connection that its refusal would break.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 100),
    ("grpc.http2.max_ping_strikes", 0),
]

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    *_COMMON_OPTIONS,
    # Two clients of one process must not share a connection, and a server that restarts is found again at once.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),  # not the minimum, which is a connection attempt's time limit, too
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Channels inside the group of services never go through a web proxy of the environment.
    ("grpc.enable_http_proxy", 0),
]

# Between services, both sides ping: a process that is frozen, or a host that is gone, is noticed within 5 s.
_PEER_OPTIONS: list[tuple[str, int]] = [
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 2_500),
    ("grpc.http2.max_pings_without_data", 0),
]

# A client is given more time: its network may be slow, and its death costs one slot.
_CLIENT_OPTIONS: list[tuple[str, int]] = [
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
]


def make_server(
    reuse_port: bool = False,
    for_peers: bool = False,
    interceptors: "Sequence[aio.ServerInterceptor[Any, Any]]" = (),
    options: Mapping[str, int] | None = None,
    security: Security = OPEN,
    for_operators: Collection[str] = (),
) -> aio.Server:
    """A server with the limits above. It listens where `listen` says.

    Args:
        reuse_port: several processes listen on one port.
        for_peers: its clients are services, and nobody else; their freeze is noticed within 5 s.
        options: gRPC's, in place of those above.
        for_operators: methods ("/package.Service/Method") that tenants may not call.
    """
    admit = _admission(security, for_peers, frozenset(for_operators))
    common = dict([*SERVER_OPTIONS, *(_PEER_OPTIONS if for_peers else _CLIENT_OPTIONS)])
    common |= {"grpc.so_reuseport": int(reuse_port), **(options or {})}
    return aio.server(options=list(common.items()), interceptors=[*admit, *interceptors])


def _admission(security: Security, for_peers: bool, for_operators: frozenset[str]) -> list[Admit]:
    """Between services a certificate of their authority is enough, and the handshake asks for that."""
    if for_peers:
        return [Admit(security.tokens, lambda _: SERVICES)] if security.tokens is not None else []
    if security.tokens is None and not security.asks_for_certificates:
        return []

    def roles_for(method: str) -> Collection[Role]:
        return OPERATORS if method in for_operators else ALL_ROLES

    return [Admit(security.tokens, roles_for, security.asks_for_certificates)]


def listen(server: aio.Server, address: str, security: Security = OPEN) -> None:
    """Lets a server listen on ``host:port`` or ``unix:path``, which only this user can open then.

    Raises ConfigError where it cannot.
    """
    path = socket_path(address)
    credentials = security.server_credentials()
    try:
        if path is not None or credentials is None:
            server.add_insecure_port(address)
        else:
            server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise ConfigError(f"cannot listen on {address}: {error}") from error
    if path is not None:
        os.chmod(path, 0o600)


def socket_path(address: str) -> str | None:
    """Of ``unix:path``; None for ``host:port``."""
    return address.removeprefix("unix:").removeprefix("//") if address.startswith("unix:") else None


# Where a server closes an aged connection right after its last answer, a probe of the bandwidth that a delayed client
# writes then fails on a unix socket, and gRPC drops the answer unread.
_UNIX_OPTIONS: list[tuple[str, int]] = [("grpc.http2.bdp_probe", 0)]


def make_channel(target: str, to_peer: bool = False, security: Security = OPEN) -> aio.Channel:
    """A channel to ``host:port`` or ``unix:path``; ``to_peer``: its freeze is noticed within 5 s."""
    options: list[tuple[str, int | str]] = [*CHANNEL_OPTIONS, *(_PEER_OPTIONS if to_peer else [])]
    credentials = security.channel_credentials()
    if socket_path(target) is not None:
        channel = aio.insecure_channel(target, options=options + _UNIX_OPTIONS)
    elif credentials is None:
        channel = aio.insecure_channel(target, options=options)
    else:
        name = security.flags.tls_server_name
        named = [("grpc.ssl_target_name_override", name)] if name else []
        channel = aio.secure_channel(target, credentials, options=options + named)
    return _TokenChannel(channel, security) if security.sends_token else channel


class _TokenChannel(aio.Channel):
    """A channel whose calls carry this process's token.

    gRPC's call credentials need TLS, which sockets of this host do without; its interceptors put tasks and queues
    between a stream and its user.
    """

    def __init__(self, channel: aio.Channel, security: Security) -> None:
        self._channel = channel
        self._security = security

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_token(self._channel.unary_unary(*args, **kwargs))

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_token(self._channel.unary_stream(*args, **kwargs))

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_token(self._channel.stream_unary(*args, **kwargs))

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_token(self._channel.stream_stream(*args, **kwargs))

    def _with_token(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, metadata: Sequence[tuple[str, str]] | None = None, **kwargs: Any) -> Any:
            token = ("authorization", f"Bearer {self._security.own_token}")
            return method(*args, metadata=[*(metadata or ()), token], **kwargs)

        return call

    async def close(self, grace: float | None = None) -> None:
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._channel.channel_ready()

    async def __aenter__(self) -> "_TokenChannel":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()


class Health:
    """grpc.health.v1 and reflection of one server; made by `add_health`."""

    def __init__(self, servicer: Any, names: Sequence[str]) -> None:
        self._servicer = servicer
        self._names = names

    async def set_serving(self, serving: bool) -> None:
        """Sets the status of every service of this server, the overall one ("") included."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._names:
            await self._servicer.set(name, status)


async def add_health(server: aio.Server, service_names: Sequence[str]) -> Health:
    """Adds health and reflection to a server that has not started. All is NOT_SERVING until said otherwise: the
    library's own servicer begins with SERVING."""
    servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]  # bound at import time
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection([*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    added = Health(servicer, ["", *service_names])
    await added.set_serving(False)
    return added
