"""Prompt logprobs of the real services: those of transformers on a model, exact on the truth machine."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto import vllm_engine_pb2_grpc as vllm_grpc
from torch import Tensor

from albireo.rpc import make_channel
from albireo.v1 import generation_pb2 as pb
from albireo.v1 import generation_pb2_grpc as rpc
from checkpoints import make_checkpoint
from load import VOCAB_SIZE
from services import scheduler, worker_group
from worker_svc.stub.truth import true_logprobs

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

NUM_TOP = 5
# Chunks of prompts end with the budget, with the places to sample in, and with blocks of 32 tokens.
LIMITS = {"max_num_seqs": 12, "max_num_batched_tokens": 24}
LENGTHS = (1, 2, 33, 70)
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("qwen3"), "qwen3")


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[tuple[int, ...], Tensor]:
    """Prompts, and log-probabilities [tokens, vocabulary] of what follows each of their tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    generator = np.random.default_rng(5)
    prompts = [tuple(generator.integers(3, 1003, length).tolist()) for length in LENGTHS]
    with torch.inference_mode():
        return {prompt: model(torch.tensor([prompt])).logits[0].log_softmax(-1) for prompt in prompts}


async def answer(target: str, prompt: tuple[int, ...], **params: Any) -> tuple[list[int], list[pb.TokenLogprobs]]:
    """Output tokens of a request, and the logprobs of its prompt."""
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt),
        sampling_params=pb.SamplingParams(max_tokens=6, ignore_eos=True, **{"temperature": 0, **params}),
    )
    tokens: list[int] = []
    told: list[pb.TokenLogprobs] = []
    async with make_channel(target) as channel:
        async for response in rpc.GenerationStub(channel).Generate(request):
            tokens += response.token_ids
            told += response.prompt_logprobs
    return tokens, told


def assert_as_oracle(told: list[pb.TokenLogprobs], prompt: tuple[int, ...], logprobs: Tensor) -> None:
    assert len(told) == len(prompt) - 1
    for token, each, of_position in zip(prompt[1:], told, logprobs, strict=False):
        assert abs(each.logprob - float(of_position[token])) < TOLERANCE
        is_likelier = of_position > of_position[token]
        is_near = (of_position - of_position[token]).abs() < TOLERANCE
        assert (is_likelier & ~is_near).sum() < each.rank <= (is_likelier | is_near).sum()
        top = torch.tensor([entry.logprob for entry in each.top])
        torch.testing.assert_close(top, of_position.topk(NUM_TOP).values, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(top, of_position[[entry.token_id for entry in each.top]], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({"tp": 1}, marks=pytest.mark.soak),
        {"tp": 2},
        {"tp": 2, "eager": True},
        pytest.param({"tp": 2, "sampler": "batch-sharded"}, marks=pytest.mark.soak),
        pytest.param({"tp": 1, "eager": True}, marks=pytest.mark.soak),
    ],
    ids=lambda flags: "-".join(f"{name}={value}" for name, value in flags.items()),
)
def test_prompts_have_the_logprobs_of_transformers(
    expected: dict[tuple[int, ...], Tensor], checkpoint: Path, tmp_path: Path, flags: dict[str, Any]
) -> None:
    """Alone and beside others that sample with penalties, whose tokens stay as they are."""

    async def check(target: str) -> None:
        sampled = {"temperature": 0.9, "seed": 3, "repetition_penalty": 1.3, "presence_penalty": 0.5}
        plain = await asyncio.gather(*(answer(target, prompt, **sampled) for prompt in expected))
        both = await asyncio.gather(
            *(answer(target, prompt, prompt_logprobs=NUM_TOP) for prompt in expected),
            *(answer(target, prompt, prompt_logprobs=NUM_TOP, **sampled) for prompt in expected),
        )
        for (prompt, logprobs), (tokens, told) in zip([*expected.items()] * 2, both, strict=True):
            assert_as_oracle(told, prompt, logprobs)
            assert len(tokens) == 6
        assert [tokens for tokens, _ in both[len(LENGTHS) :]] == [tokens for tokens, _ in plain]

    with (
        worker_group(tmp_path / "worker", checkpoint, dtype="float32", device="cpu", **flags, **LIMITS) as group,
        scheduler(tmp_path / "scheduler", checkpoint, group) as target,
    ):
        asyncio.run(check(target))


def test_both_apis_tell_the_truth_of_each_completion(tmp_path: Path, stub_model: Path) -> None:
    """Of prompts that begin alike, in more sequences than there are slots."""
    generator = np.random.default_rng(6)
    common = generator.integers(3, VOCAB_SIZE, 70).tolist()
    prompts = [[*common, *generator.integers(3, VOCAB_SIZE, length).tolist()] for length in (1, 30, 90)]

    async def check(target: str) -> None:
        async with make_channel(target) as channel:
            native, other = rpc.GenerationStub(channel), vllm_grpc.VllmEngineStub(channel)
            await asyncio.gather(*(_check_native(native, prompt) for prompt in prompts * 2))
            await asyncio.gather(*(_check_vllm(other, prompt, stream) for prompt in prompts for stream in (0, 1)))

    with (
        worker_group(tmp_path / "worker", stub_model, engine="stub", tp=2, **LIMITS) as group,
        scheduler(tmp_path / "scheduler", stub_model, group) as target,
    ):
        asyncio.run(check(target))


def _truth(prompt: list[int]) -> Any:
    first, others = np.split(np.array(prompt, dtype=np.int32), [1])
    return true_logprobs(first, others, NUM_TOP, VOCAB_SIZE)


async def _check_native(stub: Any, prompt: list[int]) -> None:
    params = pb.SamplingParams(max_tokens=9, n=3, prompt_logprobs=NUM_TOP)
    told: dict[int, list[pb.TokenLogprobs]] = {index: [] for index in range(3)}
    async for response in stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling_params=params)):
        told[response.index] += response.prompt_logprobs
    truth = _truth(prompt)
    for of_index in told.values():
        assert [each.logprob for each in of_index] == truth.logprobs.tolist()
        assert [each.rank for each in of_index] == truth.ranks.tolist()
        tops = [(top.token_id, top.logprob) for each in of_index for top in each.top]
        assert tops == list(zip(truth.top_token_ids.tolist(), truth.top_logprobs.tolist(), strict=True))


async def _check_vllm(stub: Any, prompt: list[int], stream: int) -> None:
    request = vllm.GenerateRequest(
        tokenized=vllm.TokenizedInput(input_ids=prompt),
        stream=bool(stream),
        sampling_params=vllm.SamplingParams(max_tokens=9, n=2, prompt_logprobs=NUM_TOP),
    )
    told: dict[int, Any] = {}
    async for response in stub.Generate(request):
        message = getattr(response, response.WhichOneof("response"))
        assert message.HasField("input_logprobs") is (message.index not in told)
        told.setdefault(message.index, message.input_logprobs)
    truth = _truth(prompt)
    assert sorted(told) == [0, 1]
    for of_index in told.values():
        assert list(of_index.token_ids) == prompt
        assert [each.value for each in of_index.token_logprobs] == [0, *truth.logprobs.tolist()]
        assert [token for top in of_index.top_logprobs for token in top.token_ids] == truth.top_token_ids.tolist()
