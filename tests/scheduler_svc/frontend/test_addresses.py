"""Addresses and ports that pass from a front end to its successor."""

import asyncio
import os
import socket
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from grpc import aio

from albireo.errors import ConfigError
from albireo.rpc import add_health, make_channel, make_server
from scheduler_svc.frontend.addresses import Addresses
from scheduler_svc.frontend.metrics import Metrics, MetricsPage

pytestmark = pytest.mark.timeout(30)
Serve = Callable[[Addresses], Awaitable[aio.Server]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    servers = []

    async def serve(addresses: Addresses) -> aio.Server:
        servers.append(server := make_server(reuse_port=True))
        await add_health(server, ["x"])
        addresses.bind(server)
        await server.start()
        addresses.take_over()
        return server

    yield serve
    for server in servers:
        await server.stop(None)


async def connect(address: str) -> aio.Channel:
    channel = make_channel(address)
    await channel.channel_ready()
    return channel


async def test_a_path_passes_to_the_successor_and_is_not_deleted_by_the_predecessor(
    serve: Serve, tmp_path: Path
) -> None:
    path = tmp_path / "own.sock"
    address = f"unix:{path}"
    first, second = Addresses([address]), Addresses([address])
    first_server = await serve(first)
    channels = [await connect(address)]
    assert not await first.have_successor()
    assert first.num_connections() == 1
    await serve(second)
    assert await first.have_successor()
    channels.append(await connect(address))
    first.remove()
    await first_server.stop(None)
    assert os.listdir(tmp_path) == ["own.sock"]
    channels.append(await connect(address))
    second.remove()
    assert not path.exists()
    for channel in channels:
        await channel.close()


async def test_a_port_is_given_up_while_its_connections_go_on(serve: Serve, unused_tcp_port: int) -> None:
    address = f"127.0.0.1:{unused_tcp_port}"
    addresses = Addresses([address])
    await serve(addresses)
    channel = await connect(address)
    assert addresses.num_connections() == 1
    addresses.close()
    assert not await addresses.have_successor()
    with pytest.raises(OSError, match="Connect"):
        await asyncio.open_connection("127.0.0.1", unused_tcp_port)
    assert addresses.num_connections() == 1
    with socket.create_server(("127.0.0.1", unused_tcp_port)):
        assert await addresses.have_successor()
    await channel.close()
    while addresses.num_connections():
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("address", "message"),
    [("nonsense", "neither host:port nor unix:path"), ("unix:/tmp/" + "x" * 60 + "/" + "y" * 60, "107 bytes at most")],
)
async def test_what_is_no_address_is_a_configuration_error(serve: Serve, address: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        await serve(Addresses([address]))


async def test_a_metrics_port_is_waited_for(unused_tcp_port: int) -> None:
    pages = [MetricsPage("127.0.0.1", unused_tcp_port, Metrics()) for _ in range(2)]
    for page in pages:
        await page.open()
    await pages[0].close()
    while pages[1]._server is None:
        await asyncio.sleep(0.01)
    url = f"http://127.0.0.1:{unused_tcp_port}/metrics"
    text: Any = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
    assert "albireo_frontend_streams_open" in text
    await pages[1].close()


async def test_a_metrics_port_that_cannot_be_had_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="--metrics-port 9"):
        await MetricsPage("192.0.2.1", 9, Metrics()).open()
