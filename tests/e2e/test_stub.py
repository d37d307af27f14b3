"""The whole service on the truth machine: over real sockets and processes, every token is exact."""

import asyncio
import contextlib
import random
from pathlib import Path

import grpc
import pytest
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto import vllm_engine_pb2_grpc as vllm_grpc

from albireo.rpc import make_channel
from albireo.v1 import generation_pb2 as pb
from albireo.v1 import generation_pb2_grpc as rpc
from load import Answer, random_case, run_case, true_output
from services import scheduler, worker_group

pytestmark = pytest.mark.e2e


async def check_one(stub: rpc.GenerationStub, rng: random.Random, cancel: bool) -> int:
    """A random request is exact; a cancelled one is a prefix. Returns how often it was preempted."""
    answer = Answer(random_case(rng))
    await run_case(stub, answer, stop_after=rng.randrange(1, 40) if cancel else None)
    return answer.finish.timings.num_preemptions if answer.finish is not None else 0


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


@pytest.mark.parametrize("tp", [pytest.param(1, marks=pytest.mark.soak), 2, pytest.param(4, marks=pytest.mark.soak)])
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
