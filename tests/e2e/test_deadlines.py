"""Deadlines over real sockets: what cannot be met is refused at once and costs nothing, what can be met is."""

import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from grpc import aio
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto import vllm_engine_pb2_grpc as vllm_grpc

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
    true_output,
    wait_for_metrics,
    write_report,
)
from services import fixed_ports, read_metrics, scheduler, worker_group

pytestmark = [pytest.mark.e2e, pytest.mark.alone]

STEP_S = 0.01
MAX_NUM_SEQS = 2
NUM_TRIES = 5
MAX_REFUSAL_S = 0.05


@dataclass(frozen=True)
class Services:
    address: str
    metrics_port: int


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory, stub_model: Path) -> Iterator[Services]:
    """Steps last 10 ms, two sequences run at once; the planner has seen what prompts and tokens take."""
    directory, ports = tmp_path_factory.mktemp("deadlines"), fixed_ports(4)
    flags = {"engine": "stub", "stub_step_ms": STEP_S * 1000, "max_num_seqs": MAX_NUM_SEQS, "max_model_len": 1024}
    with (
        worker_group(directory / "g", stub_model, **flags) as group,
        scheduler(directory / "s", stub_model, group, port=ports, metrics_port=ports + 1) as target,
    ):
        asyncio.run(warm_up(target))
        yield Services(target, ports + 1)


async def warm_up(target: str) -> None:
    rng = random.Random("warm-up")
    async with make_channel(target) as channel:
        stub = rpc.GenerationStub(channel)
        for num in (5, 50, 200, 50):
            await asyncio.gather(
                *(run_case(stub, Answer(fixed_case(random_tokens(rng, num), 20))) for _ in range(MAX_NUM_SEQS))
            )


def native_call(channel: aio.Channel, case: Case, n: int, timeout_s: float) -> Awaitable[object]:
    request = case.request()
    request.sampling_params.n = n
    return anext(aiter(rpc.GenerationStub(channel).Generate(request, timeout=timeout_s)))


def vllm_call(channel: aio.Channel, case: Case, n: int, timeout_s: float) -> Awaitable[object]:
    sampling = vllm.SamplingParams(max_tokens=case.params.max_tokens, ignore_eos=True, temperature=0, n=n)
    tokens = vllm.TokenizedInput(input_ids=case.prompt)
    request = vllm.GenerateRequest(request_id="r", tokenized=tokens, sampling_params=sampling)
    return anext(aiter(vllm_grpc.VllmEngineStub(channel).Generate(request, timeout=timeout_s)))


@pytest.mark.parametrize("call", [native_call, vllm_call], ids=["native", "vllm"])
async def test_what_cannot_be_met_is_refused_at_once_and_computes_nothing(
    services: Services, call: Callable[[aio.Channel, Case, int, float], Awaitable[object]]
):
    """500 tokens take 5 s; with 0.5 s to go, the server says so within 50 ms."""
    case = fixed_case(random_tokens(random.Random(call.__name__), 300), 500)
    async with make_channel(services.address) as channel:
        await rpc.GenerationStub(channel).GetModelInfo(pb.GetModelInfoRequest())  # the connection is there
        metrics, computed = read_metrics(services.metrics_port), await count_computed_tokens(channel)
        times: list[float] = []
        for n in (1, 1, 1, 1, 1, 3):
            start = time.monotonic()
            with pytest.raises(aio.AioRpcError) as refused:
                await call(channel, case, n, 0.5)
            times.append(time.monotonic() - start)
            assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            # The server's words, not the client's own.
            details = refused.value.details() or ""
            assert "300 prompt tokens and 500 output tokens take" in details
            assert "s are left" in details
        await asyncio.sleep(0.1)
        assert await count_computed_tokens(channel) == computed
        after = read_metrics(services.metrics_port)
    names = "albireo_prompt_tokens_total", "albireo_output_tokens_total", "albireo_planned_steps_total"
    assert [after[name] for name in names] == [metrics[name] for name in names]
    refusal_s = statistics.median(times[:NUM_TRIES])
    write_report({"test": "refusal", "api": call.__name__, "median_ms": round(refusal_s * 1000, 2)})
    assert refusal_s < MAX_REFUSAL_S
    await wait_for_metrics(services.metrics_port, EMPTY)


async def test_what_waits_too_long_is_dropped_and_what_is_feasible_finishes(services: Services):
    """Both slots are taken for 3 s. A request that needs 1 s of its 3 waits until it is too late, not until it is over;
    one that has time enough waits, runs and is exact."""
    rng = random.Random("queue")
    occupants = [Answer(fixed_case(random_tokens(rng, 5), 300)) for _ in range(MAX_NUM_SEQS)]
    late, feasible = (Answer(fixed_case(random_tokens(rng, 20), 100)) for _ in range(2))
    async with make_channel(services.address) as channel:
        stub = rpc.GenerationStub(channel)
        overdue = read_metrics(services.metrics_port)["albireo_overdue_total"]
        running = [asyncio.create_task(run_case(stub, each)) for each in occupants]
        while not all(each.num_tokens for each in occupants):
            await asyncio.sleep(0.01)
        start = time.monotonic()
        waiting = asyncio.create_task(run_case(stub, feasible, timeout_s=20))
        with pytest.raises(aio.AioRpcError) as dropped:
            await run_case(stub, late, timeout_s=3.0)
        dropped_s = time.monotonic() - start
        assert dropped.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "too late to begin" in (dropped.value.details() or "")
        assert 0.3 < dropped_s < 2.7
        assert late.num_tokens == feasible.num_tokens == 0
        assert read_metrics(services.metrics_port)["albireo_overdue_total"] == overdue + 1
        await asyncio.gather(*running, waiting)
    assert feasible.finish is not None
    await wait_for_metrics(services.metrics_port, EMPTY)


async def test_a_running_request_ends_with_its_deadline_and_leaves_nothing(services: Services):
    """It may have met its end of sequence any time, so it was taken. What came until then is exact."""
    prompt = next(
        prompt
        for prompt in (random_tokens(random.Random(i), 40) for i in range(100))
        if len(true_output(prompt, 300, False)) == 300
    )
    params = pb.SamplingParams(temperature=0, max_tokens=300)
    answer = Answer(Case(prompt, params, true_output(prompt, 300, False)))
    async with make_channel(services.address) as channel:
        start = time.monotonic()
        with pytest.raises(aio.AioRpcError) as over:
            await run_case(rpc.GenerationStub(channel), answer, timeout_s=0.6)
        assert over.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert 0.5 < time.monotonic() - start < 2.0
        assert 5 < answer.num_tokens < 70
        await wait_for_metrics(services.metrics_port, EMPTY, timeout_s=1.0)
