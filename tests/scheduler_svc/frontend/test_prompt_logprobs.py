"""Prompt logprobs and shortened prompts, from real clients to a scripted planner."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import aio
from smg_grpc_proto import vllm_engine_pb2

from albireo import logprobs
from albireo.arrays import unpack_int32
from albireo.logprobs import Logprobs
from albireo.v1 import frontend_pb2
from albireo.v1.generation_pb2 import (
    FINISH_REASON_ABORT,
    FINISH_REASON_LENGTH,
    GenerateRequest,
    SamplingParams,
    TokenIds,
)

Ids = Callable[..., list[int]]
pytestmark = pytest.mark.timeout(30)

PROMPT = [3, 1, 4, 1, 5]


def native(prompt: Any = PROMPT, **params: Any) -> GenerateRequest:
    return GenerateRequest(token_ids=TokenIds(ids=prompt), sampling_params=SamplingParams(**params))


def vllm(prompt: Any = PROMPT, stream: bool = False, **params: Any) -> Any:
    return vllm_engine_pb2.GenerateRequest(
        tokenized=vllm_engine_pb2.TokenizedInput(input_ids=prompt),
        stream=stream,
        sampling_params=vllm_engine_pb2.SamplingParams(**params),
    )


async def score(planner: Any, sequence_id: int, positions: range, num_top: int = 0, **fields: Any) -> None:
    """One message with logprobs of the prompt's tokens at these positions, -position each, and of the likeliest."""
    num = len(positions)
    scored = Logprobs(
        np.arange(num, dtype=np.int32),
        -np.array(positions, dtype=np.float32),
        np.array(positions, dtype=np.int32),
        np.full(num, num_top, dtype=np.int32),
        np.tile(np.arange(num_top, dtype=np.int32), num),
        np.tile(-np.arange(num_top, dtype=np.float32), num),
    )
    part = frontend_pb2.PromptLogprobs(
        sequence_id=sequence_id, first_position=positions.start, logprobs=logprobs.encode(scored)
    )
    await planner.send_message(frontend_pb2.PlannerMessage(prompt_logprobs=[part], **fields))


async def submitted(planner: Any, num: int = 1) -> list[Any]:
    async with asyncio.timeout(10):
        return [await planner.submits.get() for _ in range(num)]


async def failure(call: Any) -> aio.AioRpcError:
    with pytest.raises(aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value


async def test_the_first_response_tells_of_the_whole_prompt(world: Any, ids: Ids) -> None:
    """However many messages they come in, and no other response does."""
    call = world.native.Generate(native(prompt_logprobs=2, logprobs=0))
    (submit,) = await submitted(world.planner)
    assert (submit.num_prompt_logprobs, submit.num_scored_tokens) == (2, 0)
    await score(world.planner, submit.sequence_id, range(1, 3), 2)
    await score(world.planner, submit.sequence_id, range(3, 5), 2)
    await world.planner.send_logprobs(submit.sequence_id, ids("a"), 0)
    first = await anext(aiter(call))
    await world.planner.send_logprobs(submit.sequence_id, ids("ab"), 0)
    end = frontend_pb2.Ended(sequence_id=submit.sequence_id, reason=FINISH_REASON_LENGTH, num_output_tokens=2)
    await world.planner.send(ended=(end,))
    others = [response async for response in call]
    assert list(first.prompt_token_ids) == PROMPT
    assert [(each.logprob, each.rank) for each in first.prompt_logprobs] == [(-1, 1), (-2, 2), (-3, 3), (-4, 4)]
    assert {tuple((top.token_id, top.logprob) for top in each.top) for each in first.prompt_logprobs} == {
        ((0, 0), (1, -1))
    }
    assert not any(response.prompt_logprobs for response in others)


async def test_no_completion_is_told_before_the_prompt_is_scored(world: Any, ids: Ids) -> None:
    """One sequence scores for all of them; another may be faster, and wait, even for its end."""
    call = world.native.Generate(native(n=3, prompt_logprobs=0))
    first, *others = await submitted(world.planner, 3)
    assert [submit.HasField("num_prompt_logprobs") for submit in (first, *others)] == [True, False, False]
    for submit in others:
        await world.planner.run(submit.sequence_id, ids("a", "b"))
    await score(world.planner, first.sequence_id, range(1, 4))
    while world.sequences[first.sequence_id].num_scored != 4:
        await asyncio.sleep(0.002)
    assert not world.core.metrics.num_responses
    await score(world.planner, first.sequence_id, range(4, 5))
    await world.planner.run(first.sequence_id, ids("Hello"))
    of_index: dict[int, list[Any]] = {}
    async for response in call:
        of_index.setdefault(response.index, []).append(response)
    assert sorted(of_index) == [0, 1, 2]
    for responses in of_index.values():
        assert [len(response.prompt_logprobs) for response in responses] == [4] + [0] * (len(responses) - 1)
        assert responses[-1].HasField("finish")


async def test_a_prompt_of_one_token_waits_for_nothing(world: Any, ids: Ids) -> None:
    for stub, request in ((world.native, native([7], prompt_logprobs=3)), (world.vllm, vllm([7], prompt_logprobs=3))):
        call = stub.Generate(request)
        (submit,) = await submitted(world.planner)
        await world.planner.run(submit.sequence_id, ids("a"))
        responses = [response async for response in call]
    (response,) = responses
    told = response.complete.input_logprobs
    assert [each.HasField("value") for each in told.token_logprobs] == [False]
    assert (list(told.token_ids), len(told.top_logprobs)) == ([7], 0)


@pytest.mark.parametrize("num_top", [0, 2])
@pytest.mark.parametrize("stream", [False, True])
async def test_arrays_of_the_other_api_are_parallel(world: Any, ids: Ids, stream: bool, num_top: int) -> None:
    """The first token has a place in all of them, and no value; in a stream the first chunk has them alone."""
    call = world.vllm.Generate(vllm(stream=stream, prompt_logprobs=num_top))
    (submit,) = await submitted(world.planner)
    await score(world.planner, submit.sequence_id, range(1, 5), num_top)
    await world.planner.run(submit.sequence_id, ids("a", "b"))
    responses = [response async for response in call]
    messages = [getattr(response, response.WhichOneof("response")) for response in responses]
    assert [message.HasField("input_logprobs") for message in messages] == [True] + [False] * (len(messages) - 1)
    told = messages[0].input_logprobs
    assert list(told.token_ids) == PROMPT
    assert [each.value if each.HasField("value") else None for each in told.token_logprobs] == [None, -1, -2, -3, -4]
    tops = [(list(top.token_ids), list(top.values)) for top in told.top_logprobs]
    assert tops == ([([], []), *[([0, 1], [0, -1])] * 4] if num_top else [])


async def test_a_stream_that_ends_without_a_token_tells_them_with_its_end(world: Any, ids: Ids) -> None:
    call = world.vllm.Generate(vllm(stream=True, prompt_logprobs=0))
    (submit,) = await submitted(world.planner)
    await score(world.planner, submit.sequence_id, range(1, 5))
    (eos,) = ids("<|eos|>")
    await world.planner.run(submit.sequence_id, [eos], matched_token_id=eos)
    (response,) = [response async for response in call]
    assert len(response.complete.input_logprobs.token_logprobs) == 5


async def test_an_aborted_prompt_tells_none(world: Any) -> None:
    """Some of them say nothing."""
    call = world.native.Generate(native(n=2, prompt_logprobs=0))
    submits = await submitted(world.planner, 2)
    await score(world.planner, submits[0].sequence_id, range(1, 3))
    ends = [frontend_pb2.Ended(sequence_id=submit.sequence_id, reason=FINISH_REASON_ABORT) for submit in submits]
    await world.planner.send(ended=(ends[1],))
    await world.planner.send(ended=(ends[0],))
    responses = [response async for response in call]
    assert [response.finish.reason for response in responses] == [FINISH_REASON_ABORT] * 2
    assert not any(response.prompt_logprobs for response in responses)


async def test_a_lost_planner_scores_only_the_rest(
    world: Any, planner_server: aio.Server, restart_planner: Callable[[], Awaitable[None]], ids: Ids
) -> None:
    """The next one is told how far the first had come, of the one sequence that scores."""
    call = world.native.Generate(native(n=2, prompt_logprobs=1))
    first, _ = await submitted(world.planner, 2)
    await score(world.planner, first.sequence_id, range(1, 3))
    while world.sequences[first.sequence_id].num_scored != 3:
        await asyncio.sleep(0.002)
    await planner_server.stop(None)
    await restart_planner()
    again = await submitted(world.planner, 2)
    wanted = [(one.HasField("num_prompt_logprobs"), one.num_prompt_logprobs, one.num_scored_tokens) for one in again]
    assert wanted == [(True, 1, 3), (False, 0, 0)]
    await score(world.planner, first.sequence_id, range(3, 5))
    for submit in again:
        await world.planner.run(submit.sequence_id, ids("a"))
    told = [response.prompt_logprobs async for response in call]
    assert [[each.logprob for each in one] for one in told if one] == [[-1, -2, -3, -4]] * 2


@pytest.mark.parametrize("flags", [{"max_backlog_kib": 1}])
async def test_they_count_as_backlog_until_all_have_told_them(world: Any, ids: Ids) -> None:
    """A token with 20 likeliest ones has 172 bytes: five fit, six do not."""
    call = world.native.Generate(native([1] * 6, n=2, prompt_logprobs=20))
    submits = await submitted(world.planner, 2)
    await score(world.planner, submits[0].sequence_id, range(1, 6), 20)
    for _ in range(3):
        for submit in submits:
            await world.planner.send((submit.sequence_id, ids("a")[0]))
        for _ in submits:
            await anext(aiter(call))
    await world.planner.send(*[(submits[0].sequence_id, ids("a")[0])] * 20)
    await anext(aiter(call))
    call.cancel()
    call = world.native.Generate(native([1] * 7, prompt_logprobs=20))
    (submit,) = await submitted(world.planner)
    await score(world.planner, submit.sequence_id, range(1, 7), 20)
    error = await failure(call)
    assert (error.code(), error.details()) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "the client reads too slowly: more than 1 KiB wait for it",
    )


async def test_a_shortened_prompt_is_the_prompt(world: Any, ids: Ids) -> None:
    """Its last tokens are what runs, what is told and what is counted."""
    for stub, request in (
        (world.native, native(truncate_prompt_tokens=2)),
        (world.vllm, vllm(truncate_prompt_tokens=2)),
    ):
        call = stub.Generate(request)
        (submit,) = await submitted(world.planner)
        assert unpack_int32(submit.token_ids).tolist() == PROMPT[-2:]
        await world.planner.run(submit.sequence_id, ids("a"))
        responses = [response async for response in call]
        if stub is world.native:
            assert list(responses[0].prompt_token_ids) == PROMPT[-2:]
            assert responses[-1].finish.usage.prompt_tokens == 2
        else:
            assert responses[0].complete.prompt_tokens == 2


async def test_minus_one_keeps_what_fits_with_one_token_more(world: Any, ids: Ids) -> None:
    prompt = [token % 200 for token in range(100)]
    call = world.vllm.Generate(vllm(prompt, truncate_prompt_tokens=-1))
    (submit,) = await submitted(world.planner)
    assert unpack_int32(submit.token_ids).tolist() == prompt[-63:]
    assert submit.max_tokens == 1
    call.cancel()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"prompt_logprobs": -1}, "sampling_params.prompt_logprobs is -1; it must be 0 to 20"),
        ({"prompt_logprobs": 21}, "sampling_params.prompt_logprobs is 21; it must be 0 to 20"),
        ({"truncate_prompt_tokens": 0}, "sampling_params.truncate_prompt_tokens is 0; it must be 1 or more, or -1"),
        ({"truncate_prompt_tokens": -2}, "sampling_params.truncate_prompt_tokens is -2; it must be 1 or more, or -1"),
    ],
)
async def test_a_wrong_number_is_named_with_its_limit(world: Any, params: dict[str, int], message: str) -> None:
    calls = [world.vllm.Generate(vllm(**params))]
    if min(params.values()) >= 0:  # the native API has no negative ones
        calls.append(world.native.Generate(native(**params)))
    for call in calls:
        error = await failure(call)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.details().startswith(message)
