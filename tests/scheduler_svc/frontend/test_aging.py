"""Connections reach their age limit while calls run on them and begin: no call may notice."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from grpc import aio

from albireo.rpc import CHANNEL_OPTIONS, make_server
from albireo.v1 import generation_pb2_grpc
from albireo.v1.generation_pb2 import GenerateRequest, GenerateResponse

pytestmark = pytest.mark.timeout(60)
AGE_S = 0.5


class Counting(generation_pb2_grpc.GenerationServicer):
    """As many responses as the request's priority says, 2 ms apart."""

    async def Generate(self, request: GenerateRequest, context: Any) -> None:  # type: ignore[override]
        for _ in range(request.priority):
            await context.write(GenerateResponse(text="a"))
            await asyncio.sleep(0.002)


@pytest.fixture(params=["unix", "tcp"])
async def stubs(request: Any, tmp_path: Path) -> AsyncIterator[list[Any]]:
    """Of eight connections. Their clients do not probe the bandwidth: a probe that meets a unix socket which the server
    has closed after its last answer takes that answer with it, unread (gRPC drops a connection at a failed write)."""
    server = make_server(options={"grpc.max_connection_age_ms": round(AGE_S * 1000)})
    generation_pb2_grpc.add_GenerationServicer_to_server(Counting(), server)
    path = f"unix:{tmp_path}/aging.sock"
    port = server.add_insecure_port(path if request.param == "unix" else "127.0.0.1:0")
    await server.start()
    target = path if request.param == "unix" else f"127.0.0.1:{port}"
    options = [*CHANNEL_OPTIONS, ("grpc.http2.bdp_probe", 0)]
    channels = [aio.insecure_channel(target, options=options) for _ in range(8)]
    yield [generation_pb2_grpc.GenerationStub(channel) for channel in channels]
    for channel in channels:
        await channel.close(None)
    await server.stop(None)


@pytest.mark.parametrize("duration_s", [2.0, pytest.param(10.0, marks=pytest.mark.soak)])
async def test_no_call_fails_when_its_connection_leaves(stubs: list[Any], duration_s: float) -> None:
    """Short calls all the time, and long ones that outlive their connection's age several times."""
    until = time.monotonic() + duration_s

    async def call(stub: Any, num_responses: int) -> int:
        num_calls = 0
        while time.monotonic() < until:
            responses = [response async for response in stub.Generate(GenerateRequest(priority=num_responses))]
            assert len(responses) == num_responses
            num_calls += 1
        return num_calls

    calls = [call(stub, num_responses) for stub in stubs for num_responses in (1, 1, 10, round(1000 * AGE_S))]
    assert sum(await asyncio.gather(*calls)) > 100
