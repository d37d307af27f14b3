"""What one client can take or hold up: requests, backlog, pending writes, labels, bytes. The others go on."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from smg_grpc_proto import vllm_engine_pb2

from albireo.limits import MAX_LOGPROBS
from albireo.rpc import CHANNEL_OPTIONS
from albireo.v1 import frontend_pb2, generation_pb2_grpc
from albireo.v1.generation_pb2 import FINISH_REASON_LENGTH, AbortRequest, GenerateRequest, SamplingParams, TokenIds
from scheduler_svc.frontend.config import FrontendConfig

Ids = Callable[..., list[int]]
pytestmark = pytest.mark.timeout(30)
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


def request(request_id: str = "", **params: Any) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id, token_ids=TokenIds(ids=[1, 2]), sampling_params=SamplingParams(**params)
    )


async def failure(call: Any) -> aio.AioRpcError:
    with pytest.raises(aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value


@pytest.fixture
async def small_window(world: Any, tmp_path: Path) -> AsyncIterator[Any]:
    """Stub of a client that takes few bytes before it reads."""
    options = [*CHANNEL_OPTIONS, ("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    async with aio.insecure_channel(f"unix:{tmp_path}/frontend.sock", options=options) as channel:
        yield generation_pb2_grpc.GenerationStub(channel)


async def park(world: Any, stub: Any, ids: Ids) -> tuple[Any, int]:
    """A stream whose client has stopped reading, with a write pending; and its sequence."""
    parked = stub.Generate(request())
    submit = await world.planner.submits.get()
    await flood(world, submit.sequence_id, ids("a")[0])
    return parked, submit.sequence_id


async def flood(world: Any, sequence_id: int, token_id: int) -> None:
    """100 KB of ids and text, in two messages that cannot be merged into one write."""
    for _ in range(2):
        await world.planner.send(*[(sequence_id, token_id)] * 25_000)
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("flags", [{"write_timeout": 0.5}])
async def test_a_client_that_does_not_read_is_cancelled_and_holds_up_nobody(
    world: Any, small_window: Any, ids: Ids
) -> None:
    """A canary beside it, of the same connection's server, is exact and undelayed."""
    parked, parked_id = await park(world, small_window, ids)
    canary = world.native.Generate(request())
    canary_id = (await world.planner.submits.get()).sequence_id
    latencies, texts = [], []
    for word in ["a", "b"] * 20:
        sent_at = time.monotonic()
        await world.planner.send((canary_id, ids(word)[0]))
        texts.append((await anext(aiter(canary))).text)
        latencies.append(time.monotonic() - sent_at)
        await asyncio.sleep(0.02)
    assert texts == ["a", "b"] * 20
    assert max(latencies) < 0.25, "the bound of the parked one is 0.5 s"
    assert await world.planner.cancels.get() == parked_id
    await world.planner.run(canary_id, ids("a"))
    assert [response.text async for response in canary] == ["a"]
    assert not world.sequences
    async with asyncio.timeout(5):
        await world.core.idle()
    error = await failure(parked)  # it reads at last
    assert (error.code(), error.details()) == (
        EXHAUSTED,
        "the client reads too slowly: a write has been pending for 0.5 s",
    )


@pytest.mark.parametrize("flags", [{"write_timeout": 0.1}])
async def test_a_first_response_may_be_the_one_that_is_not_read(world: Any, small_window: Any, ids: Ids) -> None:
    parked = small_window.Generate(request(max_tokens=50))
    submit = await world.planner.submits.get()
    await world.planner.send(*[(submit.sequence_id, ids("a")[0])] * 50_000)
    assert await world.planner.cancels.get() == submit.sequence_id
    async with asyncio.timeout(5):
        await world.core.idle()
    assert (await failure(parked)).code() == EXHAUSTED


@pytest.mark.parametrize("flags", [{"max_backlog_kib": 400}])
async def test_a_backlog_that_is_too_large_fails_its_request_at_once(world: Any, small_window: Any, ids: Ids) -> None:
    """The pending write, which has 30 s, is left at once."""
    parked, parked_id = await park(world, small_window, ids)
    await world.planner.send(*[(parked_id, ids("a")[0])] * 11_000)
    async with asyncio.timeout(5):
        assert await world.planner.cancels.get() == parked_id
        await world.core.idle()
    error = await failure(parked)
    assert (error.code(), error.details()) == (
        EXHAUSTED,
        "the client reads too slowly: more than 400 KiB wait for it",
    )
    assert not world.sequences


@pytest.mark.parametrize("flags", [{"max_backlog_kib": 1}])
async def test_an_answer_in_full_is_bounded_too(world: Any, ids: Ids) -> None:
    call = world.vllm.Generate(vllm_engine_pb2.GenerateRequest(text="a"))
    submit = await world.planner.submits.get()
    await world.planner.send(*[(submit.sequence_id, ids("a")[0])] * 26)
    error = await failure(call)
    assert (error.code(), error.details()) == (EXHAUSTED, "the answer in full takes more than 1 KiB: stream it")
    assert await world.planner.cancels.get() == submit.sequence_id


async def test_an_answer_in_full_has_room_for_2048_tokens_with_all_logprobs(world: Any, ids: Ids) -> None:
    sampling = vllm_engine_pb2.SamplingParams(logprobs=MAX_LOGPROBS)
    call = world.vllm.Generate(vllm_engine_pb2.GenerateRequest(text="a", sampling_params=sampling))
    sequence_id = (await world.planner.submits.get()).sequence_id
    await world.planner.send_logprobs(sequence_id, ids("a") * 2048, MAX_LOGPROBS)
    end = frontend_pb2.Ended(sequence_id=sequence_id, reason=FINISH_REASON_LENGTH, num_output_tokens=2048)
    await world.planner.send(ended=(end,))
    (response,) = [response async for response in call]
    tops = response.complete.output_logprobs.top_logprobs
    assert (len(tops), {len(top.values) for top in tops}) == (2048, {MAX_LOGPROBS})


@pytest.mark.parametrize("flags", [{"max_backlog_kib": 1}])
async def test_what_is_taken_is_no_backlog(world: Any, ids: Ids) -> None:
    """With and without stop strings, several completions, far more tokens than fit at once."""
    for stop in ([], ["x"]):
        call = world.native.Generate(request(stop=stop, n=2))
        submits = [await world.planner.submits.get() for _ in range(2)]
        for _ in range(20):
            await world.planner.send(*[(submit.sequence_id, ids("a")[0]) for submit in submits for _ in range(5)])
            await anext(aiter(call))
            await anext(aiter(call))
        for submit in submits:
            await world.planner.run(submit.sequence_id, ids("a"))
        assert [response.text async for response in call] == ["a", "a"]


@pytest.mark.parametrize("flags", [{"max_streams": 2}])
async def test_more_requests_than_may_be_open_are_refused_with_a_hint(world: Any, ids: Ids) -> None:
    """Of both APIs together. gRPC's retry policies read the hint in the metadata."""
    calls = [world.native.Generate(request("first")), world.vllm.Generate(vllm_engine_pb2.GenerateRequest(text="a"))]
    submits = {submit.request_id: submit for submit in [await world.planner.submits.get() for _ in calls]}
    for refused in (world.native.Generate(request()), world.vllm.Generate(vllm_engine_pb2.GenerateRequest(text="a"))):
        error = await failure(refused)
        assert (error.code(), error.details()) == (
            EXHAUSTED,
            "2 requests are open, which is all that are taken; try again in 1 s",
        )
        assert ("grpc-retry-pushback-ms", "1000") in tuple(error.trailing_metadata())
    await world.planner.run(submits["first"].sequence_id, ids("a"))
    async for _ in calls[0]:
        pass
    calls[0] = world.native.Generate(request())
    assert await world.planner.submits.get()


async def test_the_planners_hint_goes_to_the_client(world: Any) -> None:
    call = world.native.Generate(request())
    submit = await world.planner.submits.get()
    refusal = frontend_pb2.Refusal(code=EXHAUSTED.value[0], message="the queue is full", retry_after_s=2.34)
    await world.planner.send(ended=(frontend_pb2.Ended(sequence_id=submit.sequence_id, refusal=refusal),))
    error = await failure(call)
    assert (error.code(), error.details()) == (EXHAUSTED, "the queue is full; try again in 2.3 s")
    assert ("grpc-retry-pushback-ms", "2340") in tuple(error.trailing_metadata())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a"] * 10_001, "request_ids has 10001 labels; 10000 at most"),
        (["a", "x" * 257], "request_ids[1] has 257 characters; 256 at most"),
    ],
)
async def test_too_much_to_abort_is_refused(world: Any, labels: list[str], message: str) -> None:
    for call in (
        world.native.Abort(AbortRequest(request_ids=labels)),
        world.vllm.Abort(vllm_engine_pb2.AbortRequest(request_ids=labels)),
    ):
        with pytest.raises(aio.AioRpcError) as caught:
            await call
        assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, message)
    assert world.planner.aborts.empty()


@pytest.mark.parametrize("flags", [{"max_message_mib": 1}])
async def test_a_request_that_is_too_large_is_refused(world: Any) -> None:
    error = await failure(world.native.Generate(GenerateRequest(text="x" * (2 << 20))))
    assert error.code() == EXHAUSTED
    assert "larger than max" in (error.details() or "")


@pytest.mark.parametrize("name", ["drain_timeout", "max_streams", "write_timeout", "max_backlog_kib"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_bounds_are_positive(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} {value}: a positive number"):
        FrontendConfig(**{name: value})


def test_a_message_has_a_size_that_grpc_can_count() -> None:
    with pytest.raises(ValueError, match="1024 at most"):
        FrontendConfig(max_message_mib=2048)


async def test_a_refusal_in_the_middle_of_a_write_ends_the_call(world: Any, small_window: Any, ids: Ids) -> None:
    """What was written before comes first."""
    parked, parked_id = await park(world, small_window, ids)
    end = frontend_pb2.Ended(sequence_id=parked_id, reason=FINISH_REASON_LENGTH)
    end.refusal.CopyFrom(frontend_pb2.Refusal(code=grpc.StatusCode.UNAVAILABLE.value[0], message="gone"))
    await world.planner.send(ended=(end,))
    async with asyncio.timeout(5):
        await world.core.idle()
    assert len((await anext(aiter(parked))).token_ids) == 25_000
    assert (await failure(parked)).details() == "gone"
