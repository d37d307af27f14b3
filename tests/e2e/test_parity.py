"""Greedy tokens of the real services equal those of transformers' generate, at the float32 level."""

import asyncio
import random
from pathlib import Path

import pytest
import torch

from albireo.model_spec import DEMO_MODEL
from albireo.rpc import make_channel
from albireo.v1 import generation_pb2, generation_pb2_grpc
from checkpoints import make_checkpoint
from e2e_oracle import Case, Oracle
from services import scheduler, worker_group

pytestmark = pytest.mark.e2e

NUM_REQUESTS = 64
# So small that most prompts run in chunks beside other rows.
TOKEN_BUDGET = 96


def make_cases(oracle: Oracle, rng: random.Random) -> list[Case]:
    """Requests of mixed lengths: from one token to more than the budget of a step."""
    cases = []
    for number in range(NUM_REQUESTS):
        length = rng.choice([1, 2, 31, 32, 33, rng.randrange(3, 60), rng.randrange(60, 140)]) if number else 200
        prompt = [rng.randrange(3, oracle.vocab_size) for _ in range(length)]
        max_tokens = rng.randrange(1, 25)
        cases.append(Case(prompt, max_tokens, oracle.generate(prompt, max_tokens)))
    return cases


async def generate(target: str, case: Case) -> list[int]:
    """One request over the native API; its token ids."""
    request = generation_pb2.GenerateRequest(
        token_ids=generation_pb2.TokenIds(ids=case.prompt),
        sampling_params=generation_pb2.SamplingParams(temperature=0, max_tokens=case.max_tokens),
    )
    tokens: list[int] = []
    async with make_channel(target) as channel:
        async for response in generation_pb2_grpc.GenerationStub(channel).Generate(request):
            tokens += response.token_ids
    return tokens


async def generate_all(target: str, cases: list[Case]) -> list[list[int]]:
    return await asyncio.gather(*(generate(target, case) for case in cases))


@pytest.fixture(scope="module", params=["demo", "llama", "mistral", "qwen2", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle, list[Case]]:
    """A checkpoint, its oracle and the oracle's answers. Vocabulary 1003 and 2 KV heads but for the demo."""
    torch.set_num_threads(2)
    directory = DEMO_MODEL
    if request.param != "demo":
        tie = request.param in ("qwen2", "llama")
        directory = make_checkpoint(tmp_path_factory.mktemp(request.param), request.param, tie=tie)
    oracle = Oracle(directory)
    return directory, oracle, make_cases(oracle, random.Random(request.param))


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.timeout(600)
def test_64_concurrent_greedy_requests_equal_transformers(model: tuple[Path, Oracle, list[Case]], tmp_path, tp):
    """At TP 1, 2 and 4, at depth 1, 2 and 3, with chunked prefill; one group serves three schedulers in turn."""
    directory, oracle, cases = model
    flags = {"tp": tp, "dtype": "float32", "max_num_batched_tokens": TOKEN_BUDGET, "max_num_seqs": NUM_REQUESTS}
    with worker_group(tmp_path / "group", directory, device="cpu", **flags) as group:
        for depth in (1, 2, 3):
            with scheduler(tmp_path / f"depth-{depth}", directory, group, depth=depth) as target:
                answers = asyncio.run(generate_all(target, cases))
            for case, got in zip(cases, answers, strict=True):
                oracle.assert_equal(case, got)
