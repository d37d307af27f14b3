"""albireo.v1.Generation, from a real client to a scripted planner."""

import asyncio
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import grpc
import numpy as np
import pytest
from grpc import aio

from albireo.arrays import unpack_float32, unpack_int32
from albireo.v1 import frontend_pb2
from albireo.v1.generation_pb2 import (
    FINISH_REASON_ABORT,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    AbortRequest,
    GenerateRequest,
    GetModelInfoRequest,
    SamplingParams,
    Timings,
    TokenIds,
)

Ids = Callable[..., list[int]]
pytestmark = pytest.mark.timeout(30)


def request(prompt: Any = (1, 2, 3), request_id: str = "r", **params: Any) -> GenerateRequest:
    given = GenerateRequest(request_id=request_id, sampling_params=SamplingParams(**params))
    if isinstance(prompt, str):
        given.text = prompt
    else:
        given.token_ids.CopyFrom(TokenIds(ids=prompt))
    return given


async def failure(call: Any) -> aio.AioRpcError:
    with pytest.raises(aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value


async def test_tokens_stream_as_text_and_ids(world: Any, ids: Ids) -> None:
    """One response per token while the client keeps up; prompt ids first, usage and timings last."""
    call = world.native.Generate(request(prompt="Hi", max_tokens=3))
    submit = await world.planner.submits.get()
    prompt = ids("H", "i")
    assert unpack_int32(submit.token_ids).tolist() == prompt
    responses = []
    for token_id in ids("Hello", " world"):
        await world.planner.send((submit.sequence_id, token_id))
        responses.append(await anext(aiter(call)))
    timings = Timings(queue_s=1, prefill_s=2, decode_s=3)
    await world.planner.run(submit.sequence_id, ids("ab"), num_output_tokens=3, timings=timings)
    responses += [response async for response in call]
    assert [response.text for response in responses] == ["Hello", " world", "ab"]
    assert [list(response.token_ids) for response in responses] == [[i] for i in ids("Hello", " world", "ab")]
    assert [list(response.prompt_token_ids) for response in responses] == [prompt, [], []]
    finish = responses[-1].finish
    assert not responses[0].HasField("finish")
    assert (finish.reason, finish.usage.prompt_tokens, finish.usage.completion_tokens) == (FINISH_REASON_LENGTH, 2, 3)
    assert finish.timings == timings
    assert finish.WhichOneof("matched_stop") is None


async def test_parameters_reach_the_planner_resolved(world: Any, ids: Ids) -> None:
    """Absent ones as the model states them, min_tokens with the ids that it suppresses."""
    given = request(top_p=0.25, seed=9, max_tokens=1000, min_tokens=2, stop_token_ids=[7, 5])
    given.priority = -3
    world.native.Generate(given, metadata=(("x-tenant", "acme"),)).cancel()
    call = world.native.Generate(given, metadata=(("x-tenant", "acme"),))
    submit = await world.planner.submits.get()
    sampling = submit.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.25, 7, 9)
    assert (submit.max_tokens, sampling.min_tokens) == (61, 2)
    assert unpack_int32(submit.stop_token_ids).tolist() == [5, 7]
    assert (submit.request_id, submit.priority, submit.tenant) == ("r", -3, "acme")
    call.cancel()


async def test_the_stop_token_is_among_the_ids_and_not_in_the_text(world: Any, ids: Ids) -> None:
    call = world.native.Generate(request())
    submit = await world.planner.submits.get()
    eos = ids("<|eos|>")[0]
    await world.planner.run(submit.sequence_id, ids("a", "<|eos|>"), reason=FINISH_REASON_STOP, matched_token_id=eos)
    responses = [response async for response in call]
    assert [i for response in responses for i in response.token_ids] == ids("a", "<|eos|>")
    assert "".join(response.text for response in responses) == "a"
    assert responses[-1].finish.matched_token_id == eos
    assert responses[-1].finish.usage.completion_tokens == 2


async def test_each_of_n_completions_has_its_own_sequence(world: Any, ids: Ids) -> None:
    """Same prompt, own seeds, own index, own end."""
    call = world.native.Generate(request(n=3, seed=1))
    submits = [await world.planner.submits.get() for _ in range(3)]
    assert [submit.sequence_id for submit in submits] == [1, 2, 3]
    assert submits[0].sampling.seed == 1
    assert len({submit.sampling.seed for submit in submits}) == 3
    for submit, word in zip(reversed(submits), ("ab", "Hello", "cab"), strict=True):
        await world.planner.run(submit.sequence_id, ids(word))
    responses = [response async for response in call]
    assert {response.index: response.text for response in responses} == {2: "ab", 1: "Hello", 0: "cab"}
    assert all(response.HasField("finish") and response.prompt_token_ids for response in responses)


async def test_a_stop_string_ends_the_sequence_at_the_planner(world: Any, ids: Ids) -> None:
    """It spans three tokens; the text ends before it, the ids with the token that completed it."""
    call = world.native.Generate(request(stop=["lo worlda"]))
    submit = await world.planner.submits.get()
    for token_id in ids("Hello", " world", "a", "b", "b"):
        await world.planner.send((submit.sequence_id, token_id))
    responses = [response async for response in call]
    truncate = await world.planner.truncates.get()
    assert (truncate.sequence_id, truncate.num_kept) == (submit.sequence_id, 3)
    assert "".join(response.text for response in responses) == "Hel"
    assert [i for response in responses for i in response.token_ids] == ids("Hello", " world", "a")
    finish = responses[-1].finish
    assert (finish.reason, finish.matched_stop_str) == (FINISH_REASON_STOP, "lo worlda")
    assert finish.usage.completion_tokens == 3
    assert world.planner.cancels.empty()


async def test_cancelling_the_call_cancels_what_still_runs(world: Any, ids: Ids) -> None:
    call = world.native.Generate(request(n=2))
    submits = [await world.planner.submits.get() for _ in range(2)]
    await world.planner.run(submits[0].sequence_id, ids("a"))
    assert (await anext(aiter(call))).index == 0
    call.cancel()
    assert await world.planner.cancels.get() == submits[1].sequence_id
    assert world.planner.cancels.empty()


async def test_abort_goes_to_the_planner_by_label(world: Any, ids: Ids) -> None:
    """The planner's answer ends the stream; text so far stays. An empty label stands for nothing."""
    call = world.native.Generate(request(request_id="mine"))
    submit = await world.planner.submits.get()
    await world.native.Abort(AbortRequest(request_ids=["", "mine", "other"]))
    assert [await world.planner.aborts.get() for _ in range(2)] == ["mine", "other"]
    await world.planner.run(submit.sequence_id, ids("Hello"), reason=FINISH_REASON_ABORT)
    responses = [response async for response in call]
    assert (responses[-1].text, responses[-1].finish.reason) == ("Hello", FINISH_REASON_ABORT)


async def test_a_request_without_a_label_gets_one(world: Any) -> None:
    call = world.native.Generate(request(request_id=""))
    assert (await world.planner.submits.get()).request_id
    call.cancel()


async def test_a_stream_that_waited_takes_everything_that_has_arrived(world: Any, ids: Ids) -> None:
    """While no write is free tokens gather; then one response has them all."""
    slots = world.core.write_slots
    slots._stall_s = 60
    others = [Mock() for _ in range(64)]
    for other in others:
        slots.ask(other)
    call = world.native.Generate(request())
    submit = await world.planner.submits.get()
    await world.planner.run(submit.sequence_id, ids("Hello") * 50)
    while world.core.metrics.num_output_tokens < 50:
        await asyncio.sleep(0.002)
    for other in others:
        slots.leave(other)
    responses = [response async for response in call]
    assert len(responses) == 1
    assert responses[0].text == "Hello" * 50


async def test_many_streams_at_once_get_their_own_tokens(world: Any, ids: Ids) -> None:
    """100 streams, more than there are write slots, 20 steps of one token each."""
    calls = [world.native.Generate(request(request_id=f"r{i}")) for i in range(100)]
    submits = [await world.planner.submits.get() for _ in calls]
    number = {submit.sequence_id: int(submit.request_id[1:]) for submit in submits}

    async def step(last: bool) -> None:
        ended = [frontend_pb2.Ended(sequence_id=i, reason=FINISH_REASON_LENGTH, num_output_tokens=20) for i in number]
        await world.planner.send(*number.items(), ended=tuple(ended) if last else ())

    async def read(call: Any) -> list[int]:
        return [token_id async for response in call for token_id in response.token_ids]

    reading = [asyncio.create_task(read(call)) for call in calls]
    for i in range(20):
        await step(last=i == 19)
    assert await asyncio.gather(*reading) == [[i] * 20 for i in range(100)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (GenerateRequest(), "the request has no prompt"),
        (request(prompt=""), "text is empty"),
        (request(prompt=[]), "token_ids is empty"),
        (request(prompt=[5000]), r"token_ids\[0\] is 5000; the vocabulary has ids 0 to"),
        (request(prompt="x" * 64), "text has 64 tokens; the context of 64 tokens takes 63 at most"),
        (request(top_p=0.0), "sampling_params.top_p is 0; it must be in (0, 1]"),
        (request(max_tokens=0), "sampling_params.max_tokens is 0"),
        (request(n=0), "sampling_params.n is 0; it must be 1 to 128"),
        (request(stop=[""]), "sampling_params.stop[0] is empty"),
    ],
)
async def test_a_wrong_request_is_refused_before_the_planner_sees_it(
    world: Any, given: GenerateRequest, message: str
) -> None:
    error = await failure(world.native.Generate(given))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert message.replace("\\", "") in (error.details() or "")
    assert world.planner.submits.empty()


async def test_long_text_is_tokenised_beside_the_event_loop(world: Any) -> None:
    """And refused with its number of tokens."""
    error = await failure(world.native.Generate(request(prompt="x" * 3000)))
    assert "text has 3000 tokens" in (error.details() or "")


async def test_a_refusal_of_the_planner_keeps_its_status(world: Any) -> None:
    """One sequence of two is refused: the request fails, the other is cancelled."""
    call = world.native.Generate(request(n=2))
    submits = [await world.planner.submits.get() for _ in range(2)]
    refusal = frontend_pb2.Refusal(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], message="queue is full")
    end = frontend_pb2.Ended(sequence_id=submits[0].sequence_id, refusal=refusal)
    await world.planner.send(ended=(end,))
    error = await failure(call)
    assert (error.code(), error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "queue is full")
    assert await world.planner.cancels.get() == submits[1].sequence_id


async def test_model_info(world: Any, model_path: Any, ids: Ids) -> None:
    info = await world.native.GetModelInfo(GetModelInfoRequest())
    assert (info.name, info.path, info.max_model_len, info.tp_size) == ("tiny", str(model_path), 64, 2)
    assert list(info.eos_token_ids) == ids("<|eos|>")
    defaults = info.default_sampling_params
    assert (defaults.temperature, defaults.top_p, defaults.top_k) == (np.float32(0.5), 1, 7)


async def test_parameters_of_logits_reach_the_planner(world: Any, ids: Ids) -> None:
    params = SamplingParams(
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.5,
        logit_bias={3: 200.0},
        allowed_token_ids=TokenIds(ids=[7, 5, 7]),
        bad_words=["ab"],
        bad_words_token_ids=[TokenIds(ids=[1, 2])],
        logprobs=0,
    )
    call = world.native.Generate(GenerateRequest(token_ids=TokenIds(ids=[1]), sampling_params=params))
    sampling = (await world.planner.submits.get()).sampling
    for name in ("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert getattr(sampling, name) == getattr(params, name)
    assert unpack_int32(sampling.bias_token_ids).tolist() == [3]
    assert unpack_float32(sampling.biases).tolist() == [100]
    assert unpack_int32(sampling.allowed_token_ids).tolist() == [5, 7]
    assert [unpack_int32(word).tolist() for word in sampling.bad_words] == [ids("a", "b"), [1, 2]]
    assert (sampling.HasField("num_logprobs"), sampling.num_logprobs) == (True, 0)
    call.cancel()


async def test_logprobs_come_with_the_token_ids(world: Any, ids: Ids) -> None:
    """Every response has as many as token ids."""
    call = world.native.Generate(request(logprobs=2, stop=["lo wo"]))
    submit = await world.planner.submits.get()
    await world.planner.send_logprobs(submit.sequence_id, ids("Hello", " world", "a"), 2)
    responses = [response async for response in call]
    assert all(len(response.logprobs) == len(response.token_ids) for response in responses)
    logprobs = [each for response in responses for each in response.logprobs]
    assert [(each.logprob, each.rank) for each in logprobs] == [(-1, 1), (-2, 2)]
    assert [[(top.token_id, top.logprob) for top in each.top] for each in logprobs] == [[(10, -0.5), (11, -0.75)]] * 2
