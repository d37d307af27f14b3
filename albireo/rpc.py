"""What every gRPC server and channel of Albireo has in common: limits, keepalive, health, reflection."""

from collections.abc import Mapping, Sequence
from typing import Any

from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

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
) -> aio.Server:
    """A server with the limits above.

    Args:
        reuse_port: several processes listen on one port.
        for_peers: its clients are services, whose freeze is noticed within 5 s.
        options: gRPC's, in place of those above.
    """
    common = dict([*SERVER_OPTIONS, *(_PEER_OPTIONS if for_peers else _CLIENT_OPTIONS)])
    common |= {"grpc.so_reuseport": int(reuse_port), **(options or {})}
    return aio.server(options=list(common.items()), interceptors=interceptors)


# Where a server closes an aged connection right after its last answer, a probe of the bandwidth that a delayed client
# writes then fails on a unix socket, and gRPC drops the answer unread.
_UNIX_OPTIONS: list[tuple[str, int]] = [("grpc.http2.bdp_probe", 0)]


def make_channel(target: str, to_peer: bool = False) -> aio.Channel:
    """An insecure channel to ``host:port`` or ``unix:path``; ``to_peer``: its freeze is noticed within 5 s."""
    options = [*CHANNEL_OPTIONS, *(_PEER_OPTIONS if to_peer else [])]
    return aio.insecure_channel(target, options=options + (_UNIX_OPTIONS if target.startswith("unix:") else []))


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
