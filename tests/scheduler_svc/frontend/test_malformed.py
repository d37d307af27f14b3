"""Bytes that are no valid request."""

from typing import Any

import grpc
import pytest
from grpc import aio
from smg_grpc_proto import vllm_engine_pb2

from albireo.v1.generation_pb2 import GenerateRequest, GetModelInfoRequest
from scheduler_svc.frontend.malformed import RefuseMalformed

pytestmark = pytest.mark.timeout(30)
TRUNCATED = GenerateRequest(text="Hello").SerializeToString()[:-1]
NO_UTF8 = b"\x0a\x02\xff\xfe"


async def error_of(world: Any, method: str, data: bytes, streams: bool) -> aio.AioRpcError:
    call = world.channel.unary_stream(method)(data) if streams else world.channel.unary_unary(method)(data)
    with pytest.raises(aio.AioRpcError) as caught:
        await (call.read() if streams else call)
    return caught.value


@pytest.mark.parametrize("data", [TRUNCATED, NO_UTF8, b"\x07", b"\xff" * 100])
@pytest.mark.parametrize("service", ["albireo.v1.Generation", "vllm.grpc.engine.VllmEngine"])
@pytest.mark.parametrize(("method", "streams"), [("Generate", True), ("Abort", False)])
async def test_bytes_that_are_no_request_are_the_clients_error(
    world: Any, service: str, method: str, streams: bool, data: bytes
) -> None:
    """It names the message and says what the parser says; the server goes on."""
    error = await error_of(world, f"/{service}/{method}", data, streams)
    message = f"{service.rpartition('.')[0]}.{method}Request"
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert (error.details() or "").startswith(f"the request is no valid {message}: Error parsing message")
    assert (await world.native.GetModelInfo(GetModelInfoRequest())).name == "tiny"
    assert (await world.vllm.HealthCheck(vllm_engine_pb2.HealthCheckRequest())).healthy


async def test_other_services_pass_unchanged() -> None:
    """And so do requests that are streams, and methods that are not there."""
    guard = RefuseMalformed(["mine"])

    async def continuation(details: Any) -> Any:
        return handlers[details.method]

    handlers: dict[str, Any] = {
        "/other/M": grpc.unary_unary_rpc_method_handler(lambda *_: None),
        "/mine/M": grpc.stream_stream_rpc_method_handler(lambda *_: None),
        "/mine/None": None,
    }
    for method, handler in handlers.items():
        details: Any = type("Details", (), {"method": method})
        assert await guard.intercept_service(continuation, details) is handler
