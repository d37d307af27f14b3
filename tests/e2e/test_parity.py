"""Greedy tokens of the real services equal those of transformers' generate, at the float32 level."""

import asyncio
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from albireo.model_spec import DEMO_MODEL
from albireo.rpc import make_channel
from albireo.v1 import generation_pb2, generation_pb2_grpc
from checkpoints import make_checkpoint
from e2e_oracle import Case, Oracle, generate_completions
from services import scheduler, worker_group

pytestmark = pytest.mark.e2e

NUM_REQUESTS = 64
# So small that most prompts run in chunks beside other rows.
TOKEN_BUDGET = 96
# The prefix cache knows nothing of models, so one of them is enough: without a sliding window, in which a wrong block
# far back would not show.
WITH_WAVES = "qwen3"


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


@dataclass(frozen=True)
class Wave:
    """Requests that are sent together.

    Attributes:
        cached: how much of each prompt is in the cache, for each completion; None: it depends on who is first.
        num: completions of each.
    """

    cases: list[Case]
    cached: list[list[int] | None]
    num: int = 1


def make_waves(oracle: Oracle, rng: random.Random) -> list[Wave]:
    """Two documents of several blocks of 32 tokens; then questions on them, and what follows their first answers."""

    def tokens(num: int) -> list[int]:
        return [rng.randrange(3, oracle.vocab_size) for _ in range(num)]

    def case(prompt: list[int], max_tokens: int) -> Case:
        return Case(prompt, max_tokens, oracle.generate(prompt, max_tokens))

    first, second = tokens(100), tokens(165)
    opening = [case(first, 30), case(second, 9), case(second + tokens(2), 5)]
    questions = [case(first[:96] + tokens(num), 12) for num in (1, 31, 70)]
    questions += [case(second[:160], 12), case(second + tokens(40), 12), case(first[:40] + tokens(30), 12)]
    history = [*first, *opening[0].expected]
    return [
        Wave(opening, [[0], None, None]),
        Wave(questions, [[96], [96], [96], [128], [160], [32]]),
        Wave([case(history + tokens(5), 12)], [[(len(history) - 1) // 32 * 32]]),
        Wave([case(tokens(75), 15)], [[0, 64, 64]], num=3),
    ]


async def check_waves(target: str, oracle: Oracle, waves: list[Wave]) -> None:
    """Runs one wave after the other; every one but the first reads blocks that others have computed."""
    for wave in waves:
        answers = await asyncio.gather(*(generate_completions(target, case, wave.num) for case in wave.cases))
        for case, wanted, (completions, cached) in zip(wave.cases, wave.cached, answers, strict=True):
            for tokens in completions:
                oracle.assert_equal(case, tokens)
            assert wanted is None or sorted(cached) == wanted


# Of the others, tests/worker_svc/test_engine_models.py tells the same without services.
IN_SOAK = [pytest.param(name, marks=pytest.mark.soak) for name in ("llama", "mistral", "qwen2")]


@pytest.fixture(scope="module", params=["demo", "qwen3", *IN_SOAK])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Oracle, list[Case], list[Wave]]:
    """A checkpoint, its oracle and the oracle's answers: to requests that have nothing in common, and for
    one model to some whose prompts begin alike. Vocabulary 1003 and 2 KV heads but for the demo."""
    torch.set_num_threads(2)
    directory = DEMO_MODEL
    if request.param != "demo":
        tie = request.param in ("qwen2", "llama")
        directory = make_checkpoint(tmp_path_factory.mktemp(request.param), request.param, tie=tie)
    oracle = Oracle(directory)
    rng = random.Random(request.param)
    return directory, oracle, make_cases(oracle, rng), make_waves(oracle, rng) if request.param == WITH_WAVES else []


@pytest.mark.parametrize(("tp", "eager"), [(1, False), (2, False), (4, False), (2, True)])
@pytest.mark.timeout(600)
def test_64_concurrent_greedy_requests_equal_transformers(
    model: tuple[Path, Oracle, list[Case], list[Wave]], tmp_path: Path, tp: int, eager: bool
):
    """At TP 1, 2 and 4, at depth 1, 2 and 3, with chunked prefill; then waves that find their prompts' beginnings in
    the prefix cache. One group serves three schedulers in turn. The eager engine serves one."""
    directory, oracle, cases, waves = model
    if eager and directory != DEMO_MODEL:
        cases = cases[:16]  # op by op, which takes its time
    flags = {"tp": tp, "dtype": "float32", "max_num_batched_tokens": TOKEN_BUDGET, "max_num_seqs": NUM_REQUESTS}
    flags |= {"eager": True} if eager else {}
    with worker_group(tmp_path / "group", directory, device="cpu", **flags) as group:
        for depth in (2,) if eager else (1, 2, 3):
            with scheduler(tmp_path / f"depth-{depth}", directory, group, depth=depth) as target:
                answers = asyncio.run(generate_all(target, cases))
                asyncio.run(check_waves(target, oracle, waves))
            for case, got in zip(cases, answers, strict=True):
                oracle.assert_equal(case, got)
