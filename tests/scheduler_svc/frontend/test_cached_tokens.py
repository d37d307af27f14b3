"""How much of a prompt came from the prefix cache, in the usage of both client APIs, however a completion ends."""

from collections.abc import Callable
from typing import Any

import pytest
from smg_grpc_proto import vllm_engine_pb2

from albireo.v1 import frontend_pb2
from albireo.v1.generation_pb2 import (
    FINISH_REASON_ABORT,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    TokenIds,
)

Ids = Callable[..., list[int]]
pytestmark = pytest.mark.timeout(30)

ENDS = ["length", "stop token", "stop string", "abort", "abort before the first token"]


def ended(world: Any, how: str) -> frontend_pb2.Ended | None:
    """What the planner says of the sequence; nothing when a stop string ends it."""
    if how == "stop string":
        return None
    eos = world.planner.group.eos_token_ids[0]
    reasons: dict[str, FinishReason] = {"length": FINISH_REASON_LENGTH, "stop token": FINISH_REASON_STOP}
    return frontend_pb2.Ended(
        sequence_id=1,
        reason=reasons.get(how, FINISH_REASON_ABORT),
        matched_token_id=eos if how == "stop token" else None,
    )


async def play(world: Any, ids: Ids, how: str) -> None:
    """The planner's part: 64 tokens of the prompt are cached, two tokens come, and the end."""
    sequence_id = (await world.planner.submits.get()).sequence_id
    tokens = {"stop token": ids("a", "<|eos|>"), "abort before the first token": []}.get(how, ids("a", "b"))
    end = ended(world, how)
    await world.planner.send(started=((sequence_id, 64),))
    await world.planner.send(*[(sequence_id, token_id) for token_id in tokens], ended=() if end is None else (end,))


@pytest.mark.parametrize("how", ENDS)
async def test_native(world: Any, ids: Ids, how: str) -> None:
    params = SamplingParams(stop=["ab"] if how == "stop string" else [])
    call = world.native.Generate(GenerateRequest(token_ids=TokenIds(ids=[1, 2]), sampling_params=params))
    await play(world, ids, how)
    responses = [response async for response in call]
    assert responses[-1].finish.usage.cached_tokens == 64


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ENDS)
async def test_vllm(world: Any, ids: Ids, how: str, stream: bool) -> None:
    """In every chunk and at the end, as vLLM has it."""
    params = vllm_engine_pb2.SamplingParams(stop=["ab"] if how == "stop string" else [])
    call = world.vllm.Generate(vllm_engine_pb2.GenerateRequest(text="a", stream=stream, sampling_params=params))
    await play(world, ids, how)
    responses = [response async for response in call]
    assert responses[-1].WhichOneof("response") == "complete"
    assert [getattr(each, each.WhichOneof("response")).cached_tokens for each in responses] == [64] * len(responses)


async def test_each_completion_has_its_own(world: Any, ids: Ids) -> None:
    """One whose start is not told has none."""
    given = GenerateRequest(token_ids=TokenIds(ids=[1, 2]), sampling_params=SamplingParams(n=3))
    call = world.native.Generate(given)
    first, second, third = [(await world.planner.submits.get()).sequence_id for _ in range(3)]
    await world.planner.send(started=((first, 0), (second, 32)))
    for sequence_id in (first, second, third):
        await world.planner.run(sequence_id, ids("a"))
    usage = {response.index: response.finish.usage async for response in call}
    assert {index: each.cached_tokens for index, each in usage.items()} == {0: 0, 1: 32, 2: 0}
