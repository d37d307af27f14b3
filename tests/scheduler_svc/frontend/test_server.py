"""The front end as a whole: readiness, loss of the planner, bugs, metrics, shutdown."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import generate_latest
from smg_grpc_proto import vllm_engine_pb2

from albireo.errors import ConfigError, GroupUnavailable
from albireo.v1.generation_pb2 import GenerateRequest, GetModelInfoRequest, SamplingParams, TokenIds
from scheduler_svc.frontend.config import FrontendConfig
from scheduler_svc.frontend.model import load_served_model
from scheduler_svc.frontend.server import FrontendServer

Ids = Callable[..., list[int]]
pytestmark = pytest.mark.timeout(30)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
REQUEST = GenerateRequest(token_ids=TokenIds(ids=[1, 2]), sampling_params=SamplingParams(stop=["x"]))


async def health_of(world: Any, service: str = "") -> Any:
    stub: Any = health_pb2_grpc.HealthStub(world.channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


async def until_health(world: Any, status: Any) -> None:
    while await health_of(world) != status:
        await asyncio.sleep(0.002)


async def failure(call: Any) -> aio.AioRpcError:
    with pytest.raises(aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value


async def test_while_the_group_loads_the_server_answers_that_it_is_unavailable(
    planner: Any, loading_world: Any
) -> None:
    """It listens at once, so that clients need not come back for a connection; health tells when it serves."""
    world = loading_world
    assert await health_of(world) == NOT_SERVING
    error = await failure(world.native.Generate(REQUEST))
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "the model is loading")
    with pytest.raises(aio.AioRpcError, match="the model is loading"):
        await world.native.GetModelInfo(GetModelInfoRequest())
    answer = await world.vllm.HealthCheck(vllm_engine_pb2.HealthCheckRequest())
    assert (answer.healthy, answer.message) == (False, "the model is loading")
    planner.ready.set()
    await world.wait_until_ready()
    while await health_of(world, "albireo.v1.Generation") != SERVING:
        await asyncio.sleep(0.002)
    assert await health_of(world, "vllm.grpc.engine.VllmEngine") == SERVING


async def test_a_planner_that_is_there_is_attached_to_before_clients_can_come(
    planner_server: Any, config: FrontendConfig
) -> None:
    """So that a front end which joins others at their port refuses nobody."""
    server = FrontendServer(config, load_served_model(config))
    await server.start()
    assert server._link.is_serving
    await server.stop(0)


@pytest.mark.parametrize("flags", [{"recovery_timeout": 0.5}])
async def test_without_a_planner_requests_wait_and_fail_after_the_recovery_timeout(
    world: Any, ids: Ids, restart_planner: Any
) -> None:
    """Health says so at once; when the planner is back the server goes on."""
    calls = [world.native.Generate(REQUEST), world.vllm.Generate(vllm_engine_pb2.GenerateRequest(text="a"))]
    for _ in calls:
        await world.planner.submits.get()
    await world.planner_server.stop(None)
    await until_health(world, NOT_SERVING)
    answer = await world.vllm.HealthCheck(vllm_engine_pb2.HealthCheckRequest())
    assert (answer.healthy, "the planner is gone" in answer.message) == (False, True)
    calls.append(world.native.Generate(REQUEST))  # it waits like the others
    for call in calls:
        error = await failure(call)
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert "the link to the planner is lost" in (error.details() or "")
    error = await failure(world.native.Generate(REQUEST))
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "there is no link to the planner")
    await restart_planner()
    await until_health(world, SERVING)
    call = world.native.Generate(REQUEST)
    submit = await world.planner.submits.get()
    await world.planner.run(submit.sequence_id, ids("a"))
    assert [response.text async for response in call] == ["a"]


async def test_requests_go_on_where_they_were_when_the_planner_is_back(
    world: Any, ids: Ids, restart_planner: Any
) -> None:
    call = world.native.Generate(REQUEST)
    submit = await world.planner.submits.get()
    await world.planner.send((submit.sequence_id, ids("a")[0]))
    assert (await anext(aiter(call))).text == "a"
    await world.planner_server.stop(None)
    await until_health(world, NOT_SERVING)
    waiting = world.native.Generate(REQUEST)
    await restart_planner()
    for _ in range(2):
        submit = await world.planner.submits.get()
        await world.planner.run(submit.sequence_id, ids("b"))
    assert [response.text async for response in call] == ["b"]
    assert [response.text async for response in waiting] == ["b"]


async def test_health_follows_what_the_planner_says_of_its_group(world: Any, ids: Ids) -> None:
    """Requests are taken all the same: they wait there."""
    await world.planner.say_serving(False)
    await until_health(world, NOT_SERVING)
    answer = await world.vllm.HealthCheck(vllm_engine_pb2.HealthCheckRequest())
    assert (answer.healthy, "makes no progress" in answer.message) == (False, True)
    call = world.native.Generate(REQUEST)
    submit = await world.planner.submits.get()
    await world.planner.say_serving(True)
    await until_health(world, SERVING)
    await world.planner.run(submit.sequence_id, ids("a"))
    assert [response.text async for response in call] == ["a"]


async def test_a_planner_that_serves_another_model_ends_the_run(world: Any, restart_planner: Any) -> None:
    await world.planner_server.stop(None)
    world.planner.group.vocab_size += 1
    await restart_planner()
    with pytest.raises(GroupUnavailable, match="another model"):
        await world.running
    await until_health(world, NOT_SERVING)


async def test_a_bug_fails_its_own_request_only(world: Any, ids: Ids, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the handler, and where tokens arrive."""
    with monkeypatch.context() as patch:
        patch.setattr("scheduler_svc.frontend.core.validate", lambda *_args: 1 / 0)
        error = await failure(world.native.Generate(REQUEST))
        assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, "internal error")
    call = world.native.Generate(REQUEST)
    submit = await world.planner.submits.get()
    with monkeypatch.context() as patch:
        patch.setattr("scheduler_svc.frontend.text.StopMatcher.push", lambda *_args, **_kwargs: 1 / 0)
        await world.planner.send((submit.sequence_id, ids("a")[0]))
        assert (await failure(call)).code() == grpc.StatusCode.INTERNAL
    assert await world.planner.cancels.get() == submit.sequence_id
    call = world.native.Generate(REQUEST)
    submit = await world.planner.submits.get()
    await world.planner.run(submit.sequence_id, ids("a"))
    assert [response.text async for response in call] == ["a"]


async def test_requests_tokens_and_latencies_are_counted(world: Any, ids: Ids) -> None:
    call = world.native.Generate(REQUEST)
    submit = await world.planner.submits.get()
    assert "albireo_frontend_streams_open 1.0" in generate_latest(world.core.metrics.registry).decode()
    await world.planner.run(submit.sequence_id, ids("a", "a", "a"))
    num_responses = len([response async for response in call])
    await failure(world.native.Generate(GenerateRequest()))
    text = generate_latest(world.core.metrics.registry).decode()
    for line in (
        'albireo_frontend_requests_total{outcome="finished"} 1.0',
        'albireo_frontend_requests_total{outcome="invalid_argument"} 1.0',
        "albireo_frontend_prompt_tokens_total 2.0",
        "albireo_frontend_output_tokens_total 3.0",
        f"albireo_frontend_responses_total {num_responses}.0",
        "albireo_frontend_streams_open 0.0",
        'albireo_frontend_time_to_first_token_seconds_bucket{le="+Inf"} 1.0',
        'albireo_frontend_inter_token_latency_seconds_bucket{le="+Inf"} 2.0',
    ):
        assert line in text


async def test_services_can_be_listed(world: Any) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(world.channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    names = {service.name for service in (await call.read()).list_services_response.service}
    assert {
        "albireo.v1.Generation",
        "albireo.v1.Ledger",
        "vllm.grpc.engine.VllmEngine",
        "grpc.health.v1.Health",
    } <= names


async def test_stopping_lets_streams_finish_and_fails_the_rest(world: Any, ids: Ids) -> None:
    """What is new is refused."""
    finishing = world.native.Generate(REQUEST)
    submit = await world.planner.submits.get()
    hanging = world.native.Generate(REQUEST)
    await world.planner.submits.get()
    stopping = asyncio.create_task(world.frontend.stop(0.5))
    await until_health(world, NOT_SERVING)
    error = await failure(world.native.Generate(REQUEST))
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
    await world.planner.run(submit.sequence_id, ids("a"))
    assert [response.text async for response in finishing] == ["a"]
    error = await failure(hanging)
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
    await stopping
    assert not world.sequences


async def test_stopping_waits_for_nothing_when_nothing_runs(world: Any) -> None:
    """A client that is connected does not count, where there is no successor."""
    assert await health_of(world) == SERVING
    async with asyncio.timeout(5):
        await world.frontend.stop(60)


async def test_front_ends_share_a_port(model_path: Path, unused_tcp_port: int) -> None:
    config = FrontendConfig(model=str(model_path), port=unused_tcp_port)
    servers = [FrontendServer(config, load_served_model(config)) for _ in range(2)]
    for server in servers:
        await server.start()
    for server in servers:
        await server.stop(0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"port": 0}, "nowhere to listen"), ({"port": 0, "listen": "unix:/no/such/place"}, "cannot listen on")],
)
async def test_an_address_that_cannot_be_listened_on_is_a_configuration_error(
    model_path: Path, fields: Any, message: str
) -> None:
    config = FrontendConfig(model=str(model_path), **fields)
    server = FrontendServer(config, load_served_model(config))
    with pytest.raises(ConfigError, match=message):
        await server.start()
    await server.stop(0)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "no such file"),
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("generation_config.json", json.dumps({"temperature": "hot"}), "temperature is 'hot', not a number"),
        ("generation_config.json", json.dumps({"top_p": 2}), "top_p is 2"),
    ],
)
def test_a_model_that_cannot_be_served_is_a_configuration_error(
    model_path: Path, tmp_path: Path, file: str, content: str | None, message: str
) -> None:
    for source in model_path.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_served_model(FrontendConfig(model=str(tmp_path)))
