"""The whole service on the truth machine: over real sockets and processes, every token is exact."""

import asyncio
import contextlib
import random
from pathlib import Path

import grpc
import numpy as np
import pytest
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto import vllm_engine_pb2_grpc as vllm_grpc

from albireo.rpc import make_channel
from albireo.v1 import generation_pb2 as pb
from albireo.v1 import generation_pb2_grpc as rpc
from albireo.v1 import plan_pb2
from services import scheduler, worker_group
from worker_svc.stub.truth import true_tokens

pytestmark = pytest.mark.e2e

VOCAB_SIZE = 1003
EOS = 2


def true_output(prompt: list[int], max_tokens: int, ignore_eos: bool, **sampling: float) -> list[int]:
    ends = frozenset() if ignore_eos else frozenset({EOS})
    packed = np.array(sorted(ends), dtype="<i4").tobytes()
    params = plan_pb2.Sampling(**{"top_p": 1.0, **sampling}, suppressed_token_ids=packed)
    return true_tokens(np.array(prompt, dtype=np.int32), params, ends, max_tokens, VOCAB_SIZE).tolist()


async def check_one(stub: rpc.GenerationStub, rng: random.Random, cancel: bool) -> int:
    """A random request is exact; a cancelled one is a prefix. Returns how often it was preempted."""
    prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 60))]
    max_tokens, seed, ignore_eos = rng.randrange(1, 240), rng.getrandbits(64), rng.random() < 0.7
    temperature, min_tokens = rng.choice([0.0, 0.8]), min(rng.choice([0, 0, 20]), max_tokens)
    params = pb.SamplingParams(
        temperature=temperature, seed=seed, max_tokens=max_tokens, min_tokens=min_tokens, ignore_eos=ignore_eos
    )
    call = stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling_params=params))
    stop_after = rng.randrange(1, 40) if cancel else None
    got: list[int] = []
    finish = None
    async for response in call:
        got += response.token_ids
        finish = response.finish if response.HasField("finish") else finish
        if stop_after is not None and len(got) >= stop_after:
            call.cancel()
            break
    expected = true_output(prompt, max_tokens, ignore_eos, temperature=temperature, seed=seed, min_tokens=min_tokens)
    assert got == expected[: len(got)]
    if stop_after is None:
        assert got == expected
        assert finish is not None
        assert finish.usage.completion_tokens == len(expected)
        stops = not ignore_eos and expected[-1] == EOS and len(expected) > min_tokens
        assert finish.reason == (pb.FINISH_REASON_STOP if stops else pb.FINISH_REASON_LENGTH)
    return finish.timings.num_preemptions if finish is not None else 0


async def wait_until_idle(target: str) -> None:
    """Cancelled sequences leave soon: nothing runs, nothing waits."""
    async with make_channel(target) as channel:
        stub = vllm_grpc.VllmEngineStub(channel)
        for _ in range(100):
            info = await stub.GetServerInfo(vllm.GetServerInfoRequest())
            if info.active_requests == 0:
                return
            await asyncio.sleep(0.1)
    raise AssertionError(f"{info.active_requests} requests are active for ever")


@pytest.mark.parametrize("tp", [1, 2, 4])
async def test_128_requests_with_cancels_under_a_small_pool_are_exact(tmp_path: Path, stub_model: Path, tp: int):
    """Two front ends on one port, 32 slots, blocks for a fraction of them: queueing, preemption, cancellation."""
    pool_gib = 20 * 32 * (8 // tp) * 8 / 2**30  # 20 blocks: 16 hold one longest sequence
    with (
        worker_group(tmp_path / "g", stub_model, engine="stub", tp=tp, kv_cache_gib=pool_gib, max_num_seqs=32) as group,
        scheduler(tmp_path / "s", stub_model, group, frontends=2, depth=3) as target,
    ):
        async with contextlib.AsyncExitStack() as stack:
            channels = [await stack.enter_async_context(make_channel(target)) for _ in range(8)]
            stubs = [rpc.GenerationStub(channel) for channel in channels]
            rng = random.Random(tp)
            num_preemptions = await asyncio.gather(
                *(check_one(stubs[i % 8], random.Random(rng.random()), cancel=i % 3 == 0) for i in range(128))
            )
            assert sum(num_preemptions) > 0
            info = await stubs[0].GetModelInfo(pb.GetModelInfoRequest())
            assert (info.engine, info.tp_size, info.num_blocks) == ("stub", tp, 20)
        await wait_until_idle(target)


async def test_both_client_apis_answer_alike(tmp_path: Path, stub_model: Path):
    """n completions with their own seeds, stop ids, streaming and not, refusals: one core behind both services."""
    prompt = list(range(100, 140))
    with (
        worker_group(tmp_path / "g", stub_model, engine="stub") as group,
        scheduler(tmp_path / "s", stub_model, group) as target,
    ):
        async with make_channel(target) as channel:
            native, engine = rpc.GenerationStub(channel), vllm_grpc.VllmEngineStub(channel)
            params = pb.SamplingParams(temperature=1, seed=5, max_tokens=30, ignore_eos=True, n=3)
            answers: dict[int, list[int]] = {0: [], 1: [], 2: []}
            request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling_params=params)
            async for response in native.Generate(request):
                answers[response.index] += response.token_ids
            assert answers[0] == true_output(prompt, 30, True, temperature=1, seed=5)
            assert len({tuple(answer) for answer in answers.values()}) == 3

            for stream in (True, False):
                theirs: dict[int, list[int]] = {0: [], 1: [], 2: []}
                sampling = vllm.SamplingParams(temperature=1, seed=5, max_tokens=30, ignore_eos=True, n=3, top_p=1)
                request = vllm.GenerateRequest(
                    request_id="r",
                    tokenized=vllm.TokenizedInput(input_ids=prompt),
                    sampling_params=sampling,
                    stream=stream,
                )
                async for response in engine.Generate(request):
                    if response.HasField("chunk"):
                        theirs[response.chunk.index] += response.chunk.token_ids
                    else:
                        theirs[response.complete.index] += response.complete.output_ids
                        assert response.complete.finish_reason == "length"
                assert theirs == answers

            stop_id = answers[0][10]
            params = pb.SamplingParams(temperature=1, seed=5, max_tokens=30, ignore_eos=True, stop_token_ids=[stop_id])
            request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling_params=params)
            responses = [response async for response in native.Generate(request)]
            assert [i for response in responses for i in response.token_ids] == answers[0][
                : answers[0].index(stop_id) + 1
            ]
            assert responses[-1].finish.matched_token_id == stop_id

            too_long = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 512))
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await anext(aiter(native.Generate(too_long)))
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "512" in (refused.value.details() or "")


async def test_abort_reaches_sequences_of_every_front_end(tmp_path: Path, stub_model: Path):
    """A label aborts its requests whichever front end they came by; others go on."""
    with (
        worker_group(tmp_path / "g", stub_model, engine="stub", stub_step_ms=20) as group,
        scheduler(tmp_path / "s", stub_model, group, frontends=2) as target,
    ):
        own = [f"unix:{tmp_path}/s/frontend-{i}.sock" for i in range(2)]
        async with make_channel(own[0]) as first, make_channel(own[1]) as second:
            prompt = pb.TokenIds(ids=[5, 6, 7])
            params = pb.SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
            request = pb.GenerateRequest(request_id="a", token_ids=prompt, sampling_params=params)
            call = rpc.GenerationStub(first).Generate(request)
            params = pb.SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
            request = pb.GenerateRequest(request_id="b", token_ids=prompt, sampling_params=params)
            other = rpc.GenerationStub(first).Generate(request)
            await anext(aiter(call))
            await rpc.GenerationStub(second).Abort(pb.AbortRequest(request_ids=["a", "unknown"]))
            finish = None
            async for response in call:
                finish = response.finish
            assert finish is not None
            assert finish.reason == pb.FINISH_REASON_ABORT
            tokens = [token async for response in other for token in response.token_ids]
            assert tokens == true_output([5, 6, 7], 40, True)
        await wait_until_idle(target)
