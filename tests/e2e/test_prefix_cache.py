"""The prefix cache over real sockets and processes: what is computed once, for whom, and that every token is exact."""

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from grpc import aio
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto import vllm_engine_pb2_grpc as vllm_grpc
from smg_grpc_proto.generated import common_pb2

from albireo.rpc import make_channel
from albireo.v1 import generation_pb2 as pb
from albireo.v1 import generation_pb2_grpc as rpc
from load import (
    EMPTY,
    Answer,
    Case,
    count_computed_tokens,
    fixed_case,
    random_tokens,
    run_case,
    tenant_metadata,
    true_output,
    wait_for_metrics,
)
from services import fixed_ports, read_metrics, scheduler, worker_group
from worker_svc.stub.hashing import mix

pytestmark = pytest.mark.e2e

NUM_REQUESTS = 16
NUM_SHARED = 512
NUM_OWN = 20
NUM_OUTPUT = 4


@dataclass(frozen=True)
class Services:
    """Two front ends with one planner and a group of two ranks."""

    frontends: tuple[str, str]
    metrics_port: int


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory, stub_model: Path) -> Iterator[Services]:
    directory, ports = tmp_path_factory.mktemp("prefix-cache"), fixed_ports(5)
    with (
        worker_group(directory / "g", stub_model, engine="stub", tp=2, max_model_len=1024, max_num_seqs=32) as group,
        scheduler(directory / "s", stub_model, group, port=ports, frontends=2, metrics_port=ports + 1),
    ):
        yield Services((f"unix:{directory}/s/frontend-0.sock", f"unix:{directory}/s/frontend-1.sock"), ports + 1)


def prompts(seed: str) -> list[list[int]]:
    rng = random.Random(seed)
    shared = random_tokens(rng, NUM_SHARED)
    return [shared + random_tokens(rng, NUM_OWN) for _ in range(NUM_REQUESTS)]


async def run_all(channels: list[aio.Channel], cases: list[Case]) -> tuple[list[int], int]:
    """Runs ``cases`` at once, through all front ends. Returns how many tokens of each were cached, in order of size,
    and how many tokens were computed for all."""
    before = await count_computed_tokens(channels[0])
    answers = [Answer(case) for case in cases]
    stubs = [rpc.GenerationStub(channel) for channel in channels]
    await asyncio.gather(*(run_case(stubs[i % len(stubs)], answer) for i, answer in enumerate(answers)))
    computed = await count_computed_tokens(channels[0]) - before
    cached = [answer.finish.usage.cached_tokens for answer in answers if answer.finish is not None]
    return sorted(cached), computed


async def test_sixteen_requests_compute_their_shared_prefix_once_per_tenant(services: Services):
    """They come together, by two front ends; the first computes the prefix, all others find it. Nobody finds what is
    another tenant's."""
    texts = prompts("shared")
    of_first_tenant = 0
    async with make_channel(services.frontends[0]) as first, make_channel(services.frontends[1]) as second:
        for tenant in ("a", "b", ""):
            metrics = read_metrics(services.metrics_port)
            cases = [fixed_case(prompt, NUM_OUTPUT, tenant) for prompt in texts]
            cached, computed = await run_all([first, second], cases)
            assert cached == [0] + [NUM_SHARED] * (NUM_REQUESTS - 1), f"tenant {tenant!r}"
            of_first_tenant = of_first_tenant or computed
            # Each answer's last token is sampled and goes into no further step.
            assert computed == of_first_tenant == NUM_SHARED + NUM_REQUESTS * (NUM_OWN + NUM_OUTPUT - 1)
            for name, num in (
                ("albireo_prompt_tokens_total", NUM_REQUESTS * (NUM_SHARED + NUM_OWN)),
                ("albireo_cached_tokens_total", (NUM_REQUESTS - 1) * NUM_SHARED),
            ):
                assert read_metrics(services.metrics_port)[name] - metrics[name] == num
        cached, computed = await run_all([first, second], [fixed_case(prompt, NUM_OUTPUT, "a") for prompt in texts])
        assert cached == [NUM_SHARED] * NUM_REQUESTS
        assert computed == of_first_tenant - NUM_SHARED
    await wait_for_metrics(services.metrics_port, EMPTY)


async def test_completions_of_one_request_share_the_prompt(services: Services):
    """Full blocks are computed once, the partial one by each; every completion's tokens are exact."""
    prompt, seed = random_tokens(random.Random("n"), 100), 77
    params = pb.SamplingParams(temperature=1, seed=seed, max_tokens=50, ignore_eos=True, n=4)
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling_params=params)
    tokens: dict[int, list[int]] = {index: [] for index in range(4)}
    cached: dict[int, int] = {}
    async with make_channel(services.frontends[0]) as channel:
        before = await count_computed_tokens(channel)
        async for response in rpc.GenerationStub(channel).Generate(request):
            tokens[response.index] += response.token_ids
            if response.HasField("finish"):
                cached[response.index] = response.finish.usage.cached_tokens
        computed = await count_computed_tokens(channel) - before
    # Completion 0 keeps the seed, the others have seeds that follow from it.
    golden = 0x9E3779B97F4A7C15
    seeds = [seed, *(int(mix(np.array([(seed + index * golden) % 2**64], dtype=np.uint64))[0]) for index in (1, 2, 3))]
    assert tokens == {i: true_output(prompt, 50, True, temperature=1, seed=seeds[i]) for i in range(4)}
    assert len({tuple(each) for each in tokens.values()}) == 4
    assert sorted(cached.values()) == [0, 96, 96, 96]
    assert computed == 100 + 3 * 4 + 4 * 49


async def ask_vllm(stub: vllm_grpc.VllmEngineStub, case: Case, stream: bool) -> tuple[list[int], set[int]]:
    """One request over the vLLM API; tokens, and what its messages say of cached tokens."""
    sampling = vllm.SamplingParams(max_tokens=case.params.max_tokens, ignore_eos=True, temperature=0)
    request = vllm.GenerateRequest(
        request_id="r", tokenized=vllm.TokenizedInput(input_ids=case.prompt), sampling_params=sampling, stream=stream
    )
    tokens: list[int] = []
    cached: set[int] = set()
    async for response in stub.Generate(request, metadata=tenant_metadata(case.tenant)):
        part = response.chunk if response.HasField("chunk") else response.complete
        tokens += part.token_ids if response.HasField("chunk") else part.output_ids
        cached.add(part.cached_tokens)
    return tokens, cached


async def test_the_vllm_api_tells_what_was_cached_and_flushes_it(services: Services):
    """Both APIs share one cache; after FlushCache the next request computes its whole prompt."""
    case = fixed_case(random_tokens(random.Random("vllm"), 300), 40, "v")
    async with make_channel(services.frontends[1]) as channel:
        engine, native = vllm_grpc.VllmEngineStub(channel), rpc.GenerationStub(channel)
        for stream in (True, False):
            before = await count_computed_tokens(channel)
            assert await ask_vllm(engine, case, stream) == (case.expected, {0})
            assert await ask_vllm(engine, case, stream) == (case.expected, {288})
            answer = Answer(case)
            await run_case(native, answer)
            assert answer.finish is not None
            assert answer.finish.usage.cached_tokens == 288
            assert await count_computed_tokens(channel) - before == 300 + 2 * 12 + 3 * 39
            flushed = await engine.FlushCache(common_pb2.FlushCacheRequest())
            assert flushed.success
        answer = Answer(case)
        await run_case(native, answer)
        assert answer.finish is not None
        assert answer.finish.usage.cached_tokens == 0


async def test_a_conversation_finds_its_last_answer(services: Services):
    """The next turn begins with the prompt and answer of the last one: both are found, up to the last full block."""
    rng = random.Random("conversation")
    async with make_channel(services.frontends[0]) as first, make_channel(services.frontends[1]) as second:
        history = random_tokens(rng, 50)
        for turn, channel in enumerate((first, second, first, second)):
            answer = Answer(fixed_case(history, 60, "talker"))
            await run_case(rpc.GenerationStub(channel), answer)
            assert answer.finish is not None
            # The last answer but its last token was computed.
            known = len(history) - 10 - 1 if turn else 0
            assert answer.finish.usage.cached_tokens == known // 32 * 32
            history = history + answer.case.expected + random_tokens(rng, 10)
