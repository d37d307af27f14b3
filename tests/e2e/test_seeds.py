"""A request with a seed gives the same tokens and logprobs on a real model, whatever runs beside it, and however."""

import asyncio
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from albireo.model_spec import load_model_spec
from albireo.rpc import make_channel
from albireo.v1 import generation_pb2, generation_pb2_grpc
from albireo_kernels import reference
from albireo_kernels.reference import Params
from checkpoints import make_checkpoint
from sampling_rows import Row, as_float32, margin_of
from services import scheduler, worker_group

pytestmark = pytest.mark.e2e

NUM_REQUESTS = 64
NUM_ALONE = 20
TOKEN_BUDGET = 96
# Enough for one block of each of 24 sequences, which grow to four: some are preempted.
NUM_BLOCKS = 24
# Where the oracle's decision is closer than this, another order of float32 sums may turn it.
MIN_MARGIN = 1e-3


@dataclass(frozen=True)
class Request:
    """``params`` have neither prompt nor output."""

    prompt: list[int]
    params: Params
    max_tokens: int
    num_logprobs: int | None

    def message(self) -> generation_pb2.GenerateRequest:
        params = self.params
        sampling = generation_pb2.SamplingParams(
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
            seed=params.seed,
            max_tokens=self.max_tokens,
            ignore_eos=True,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            logit_bias=dict(params.biases),
            allowed_token_ids=generation_pb2.TokenIds(ids=params.allowed) if params.allowed else None,
            bad_words_token_ids=[generation_pb2.TokenIds(ids=word) for word in params.bad_words],
            logprobs=self.num_logprobs,
        )
        prompt = generation_pb2.TokenIds(ids=self.prompt)
        return generation_pb2.GenerateRequest(token_ids=prompt, sampling_params=sampling)


@dataclass
class Answer:
    tokens: list[int]
    logprobs: list[float]
    num_preemptions: int = 0


def make_requests(vocab_size: int) -> list[Request]:
    """Every parameter in some, most of them in one; few different tokens, so that penalties meet repetitions."""
    rng = random.Random(5)
    tokens = list(range(3, 40))
    requests = []
    for _ in range(NUM_REQUESTS):

        def maybe(value: object, otherwise: object) -> object:
            return value if rng.random() < 0.4 else otherwise

        params = Params(
            temperature=rng.choice([0.0, 0.5, 0.9, 1.5]),
            top_k=maybe(rng.choice([5, 50, 300]), 0),
            top_p=maybe(0.9, 1.0),
            min_p=maybe(0.02, 0.0),
            seed=rng.getrandbits(64),
            biases=maybe(dict.fromkeys(rng.sample(tokens, 8), 6.0), {}),
            allowed=maybe(rng.sample(range(vocab_size), 30), None),
            bad_words=maybe([rng.choices(tokens, k=2) for _ in range(60)] + [[rng.choice(tokens)]], ()),
            repetition_penalty=maybe(1.3, 1.0),
            presence_penalty=maybe(0.5, 0.0),
            frequency_penalty=maybe(0.4, 0.0),
        )
        prompt = rng.choices(range(3, vocab_size), k=rng.choice([1, 5, 31, 40]))
        requests.append(Request(prompt, as_float32(params), rng.randrange(50, 110), maybe(rng.choice([0, 3]), None)))
    return requests


async def ask(target: str, request: Request) -> Answer:
    answer = Answer([], [])
    async with make_channel(target) as channel:
        async for response in generation_pb2_grpc.GenerationStub(channel).Generate(request.message()):
            answer.tokens += response.token_ids
            answer.logprobs += [each.logprob for each in response.logprobs]
            if response.HasField("finish"):
                answer.num_preemptions = response.finish.timings.num_preemptions
    assert len(answer.tokens) == request.max_tokens
    return answer


async def ask_all(target: str, requests: Sequence[Request]) -> list[Answer]:
    return await asyncio.gather(*(ask(target, request) for request in requests))


async def ask_one_by_one(target: str, requests: Sequence[Request]) -> list[Answer]:
    return [await ask(target, request) for request in requests]


class Oracle:
    """transformers' logits, and our definition of sampling."""

    def __init__(self, directory: Path) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    @torch.inference_mode()
    def check(self, request: Request, answer: Answer) -> None:
        """Tokens are the oracle's up to a near tie, if there is one; and logprobs up to there."""
        logits = self._model(torch.tensor([request.prompt + answer.tokens[:-1]])).logits[0]
        logits = logits[len(request.prompt) - 1 :]
        for position, token in enumerate(answer.tokens):
            params = replace(request.params, prompt=request.prompt, output=answer.tokens[:position])
            row = Row(params, position)
            expected = reference.sample_row(logits[position], row.params, position)
            if token != expected:
                assert margin_of(logits[position], row) < MIN_MARGIN, (position, token, expected, row.params)
                return
            if request.num_logprobs is not None:
                logprob = reference.token_logprobs(logits[position], token, 0).logprob
                np.testing.assert_allclose(answer.logprobs[position], logprob, atol=1e-3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Request], list[Answer]]:
    """A checkpoint, requests, and each one's answer by a rank alone, synchronously; the first ones were alone there."""
    torch.set_num_threads(2)
    directory = make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3")
    requests = make_requests(load_model_spec(directory).vocab_size)
    with served(tmp_path_factory.mktemp("served"), directory, tp=1, depth=1) as target:
        answers = asyncio.run(ask_one_by_one(target, requests[:NUM_ALONE]))
        answers += asyncio.run(ask_all(target, requests[NUM_ALONE:]))
    oracle = Oracle(directory)
    for request, answer in zip(requests, answers, strict=True):
        oracle.check(request, answer)
    return directory, requests, answers


@contextmanager
def served(
    run_dir: Path, directory: Path, *, tp: int, depth: int, is_small: bool = False, **flags: object
) -> Iterator[str]:
    spec = load_model_spec(directory)
    kv_heads = max(1, spec.num_kv_heads // tp)
    block_bytes = 2 * 32 * kv_heads * spec.head_dim * 4 * spec.num_layers
    common = {"dtype": "float32", "max_num_batched_tokens": TOKEN_BUDGET, "max_num_seqs": NUM_REQUESTS}
    if is_small:
        common["kv_cache_gib"] = NUM_BLOCKS * block_bytes / 2**30
    with (
        worker_group(run_dir / "group", directory, device="cpu", tp=tp, **common, **flags) as group,
        scheduler(run_dir / "scheduler", directory, group, depth=depth) as target,
    ):
        yield target


WAYS = {
    "TP 1, preempted": {"tp": 1, "depth": 2, "is_small": True},
    "TP 2": {"tp": 2, "depth": 2},
    "TP 4, preempted": {"tp": 4, "depth": 3, "is_small": True},
    "TP 2, gather": {"tp": 2, "depth": 2, "sampler": "gather"},
    "TP 2, batch-sharded": {"tp": 2, "depth": 1, "sampler": "batch-sharded"},
}
LONG = ("TP 2", "TP 2, gather")  # soaked: other tests cover what is apart in them


@pytest.mark.parametrize("way", [pytest.param(way, marks=[pytest.mark.soak] if way in LONG else []) for way in WAYS])
def test_seeded_requests_give_the_same_tokens(
    model: tuple[Path, list[Request], list[Answer]], tmp_path: Path, way: str
) -> None:
    """64 at once. What differs must differ at a near tie of the oracle's."""
    directory, requests, expected = model
    with served(tmp_path, directory, **WAYS[way]) as target:
        answers = asyncio.run(ask_all(target, requests))
    if WAYS[way].get("is_small"):
        assert sum(answer.num_preemptions for answer in answers) > 0
    oracle, num_equal = None, 0
    for request, answer, alone in zip(requests, answers, expected, strict=True):
        if answer.tokens == alone.tokens:
            num_equal += 1
            np.testing.assert_allclose(answer.logprobs, alone.logprobs, atol=1e-4)
            continue
        oracle = oracle or Oracle(directory)
        oracle.check(request, answer)
    assert num_equal >= NUM_REQUESTS - 3
