"""A client's deadline, in both client APIs: told to the planner, refused when over, obeyed when it passes."""

import asyncio
import time
from typing import Any

import grpc
import pytest
from grpc import aio
from smg_grpc_proto import vllm_engine_pb2

from albireo.errors import DeadlineExceeded
from albireo.v1 import frontend_pb2
from albireo.v1.generation_pb2 import GenerateRequest, SamplingParams, TokenIds
from scheduler_svc.frontend.config import FrontendConfig
from scheduler_svc.frontend.deadline import NO_DEADLINE, deadline_in, remaining_s
from scheduler_svc.frontend.native import GenerationServicer
from scheduler_svc.frontend.vllm_api import VllmEngineServicer

pytestmark = pytest.mark.timeout(30)
EXCEEDED = grpc.StatusCode.DEADLINE_EXCEEDED
APIS = ["native", "vllm", "vllm in full"]


def request(api: str) -> Any:
    """For two completions."""
    if api == "native":
        return GenerateRequest(token_ids=TokenIds(ids=[1, 2]), sampling_params=SamplingParams(n=2))
    params = vllm_engine_pb2.SamplingParams(n=2)
    return vllm_engine_pb2.GenerateRequest(text="ab", sampling_params=params, stream=api == "vllm")


def generate(world: Any, api: str, timeout: float | None) -> Any:
    stub = world.native if api == "native" else world.vllm
    return stub.Generate(request(api), timeout=timeout)


async def failure(call: Any) -> aio.AioRpcError:
    with pytest.raises(aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value


class LateContext:
    """Of a call whose deadline has passed when it arrives; notes how it is ended."""

    def __init__(self) -> None:
        self.status: tuple[Any, ...] = ()

    def time_remaining(self) -> float:
        return 0.0

    def invocation_metadata(self) -> None:
        return None

    async def abort(self, *status: Any) -> None:
        self.status = status


def test_what_remains_until_a_deadline() -> None:
    assert remaining_s(deadline_in(None)) == remaining_s(NO_DEADLINE) == 0
    assert 59 < remaining_s(deadline_in(60)) <= 60
    with pytest.raises(DeadlineExceeded):
        remaining_s(deadline_in(0))


@pytest.mark.parametrize("api", APIS)
async def test_the_planner_learns_what_remains(world: Any, api: str) -> None:
    call = generate(world, api, timeout=20)
    for _ in range(2):
        assert 15 < (await world.planner.submits.get()).remaining_s < 21, "gRPC rounds up"
    call.cancel()
    generate(world, api, timeout=None)
    assert (await world.planner.submits.get()).remaining_s == 0


@pytest.mark.parametrize("api", APIS)
async def test_a_deadline_that_is_over_at_arrival_is_refused(world: Any, api: str) -> None:
    servicer: Any = (
        GenerationServicer(world.core) if api == "native" else VllmEngineServicer(world.core, FrontendConfig())
    )
    context = LateContext()
    await servicer.Generate(request(api), context)
    assert context.status == (EXCEEDED, "the request's deadline has passed", ())
    assert world.planner.submits.empty()


async def test_a_deadline_that_passes_before_submission_leaves_nothing_at_the_planner(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the prompt was tokenised, say."""
    context = LateContext()
    monkeypatch.setattr("scheduler_svc.frontend.core.remaining_s", lambda deadline: 0.0)
    await GenerationServicer(world.core).Generate(request("native"), context)  # type: ignore[arg-type]
    assert context.status[0] is EXCEEDED
    assert world.planner.submits.empty()
    assert not world.sequences


@pytest.mark.parametrize("api", APIS)
async def test_a_deadline_that_passes_cancels_all_sequences(world: Any, api: str) -> None:
    call = generate(world, api, timeout=0.2)
    submits = [await world.planner.submits.get() for _ in range(2)]
    assert (await failure(call)).code() is EXCEEDED
    assert [await world.planner.cancels.get() for _ in range(2)] == [submit.sequence_id for submit in submits]
    assert not world.sequences


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("retry_after_s", [0.0, 1.5])
async def test_a_deadline_that_the_planner_cannot_meet_is_the_calls_status(
    world: Any, api: str, retry_after_s: float
) -> None:
    """With a hint when to try again or without."""
    call = generate(world, api, timeout=20)
    submits = [await world.planner.submits.get() for _ in range(2)]
    refusal = frontend_pb2.Refusal(code=EXCEEDED.value[0], message="it would take 30 s", retry_after_s=retry_after_s)
    await world.planner.send(ended=(frontend_pb2.Ended(sequence_id=submits[0].sequence_id, refusal=refusal),))
    error = await failure(call)
    hint = "; try again in 1.5 s" if retry_after_s else ""
    assert (error.code(), error.details()) == (EXCEEDED, f"it would take 30 s{hint}")
    assert ("grpc-retry-pushback-ms" in dict(error.trailing_metadata())) is bool(retry_after_s)
    assert await world.planner.cancels.get() == submits[1].sequence_id


async def test_a_deadline_holds_while_there_is_no_planner(world: Any) -> None:
    """Long before the planner is given up."""
    await world.planner_server.stop(None)
    while world.core.link.is_serving:
        await asyncio.sleep(0.002)
    started_at = time.monotonic()
    assert (await failure(generate(world, "native", timeout=0.3))).code() is EXCEEDED
    assert time.monotonic() - started_at < 5
    async with asyncio.timeout(5):
        await world.core.idle()
    assert not world.sequences
