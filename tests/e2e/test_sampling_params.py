"""Every sampling parameter and logprobs, through both client APIs and real processes, exact on the truth machine."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import aio
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto import vllm_engine_pb2_grpc as vllm_grpc
from tokenizers import Tokenizer

from albireo.arrays import pack_float32, pack_int32
from albireo.logprobs import Logprobs
from albireo.rpc import make_channel
from albireo.v1 import generation_pb2 as pb
from albireo.v1 import generation_pb2_grpc as rpc
from albireo.v1 import plan_pb2
from load import EOS, VOCAB_SIZE
from services import scheduler, worker_group
from worker_svc.stub.truth import true_logprobs, true_tokens

pytestmark = pytest.mark.e2e

# Of one token: logprob, rank, likeliest tokens with theirs.
Entry = tuple[float, int, list[tuple[int, float]]]


@dataclass(frozen=True)
class Case:
    """A request of the native API and its answer. ``is_plain``: the other API can ask for the same."""

    prompt: list[int]
    params: pb.SamplingParams
    tokens: list[int]
    logprobs: list[Entry]

    @property
    def is_plain(self) -> bool:
        params = self.params
        return not (params.HasField("allowed_token_ids") or params.bad_words or params.bad_words_token_ids)


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Entry] = field(default_factory=list)
    text: str = ""
    finish: Any = None
    num_preemptions: int = 0


def entries(logprobs: Logprobs) -> list[Entry]:
    tops = list(zip(logprobs.top_token_ids.tolist(), logprobs.top_logprobs.tolist(), strict=True))
    starts = [0, *np.cumsum(logprobs.num_top).tolist()]
    columns = zip(logprobs.logprobs.tolist(), logprobs.ranks.tolist(), strict=True)
    return [(logprob, rank, tops[starts[i] : starts[i + 1]]) for i, (logprob, rank) in enumerate(columns)]


def resolved(params: pb.SamplingParams, tokenizer: Tokenizer) -> plan_pb2.Sampling:
    """What the parameters mean, from the API's description."""
    words = [list(word.ids) for word in params.bad_words_token_ids]
    for text in params.bad_words:
        bare, spaced = (tokenizer.encode(lead + text, add_special_tokens=False).ids for lead in ("", " "))
        words += [bare, spaced] if len(bare) == len(spaced) and bare[0] != spaced[0] else [bare]
    ids = sorted(params.logit_bias)
    return plan_pb2.Sampling(
        temperature=params.temperature,
        top_p=1,
        seed=params.seed,
        min_tokens=params.min_tokens,
        suppressed_token_ids=pack_int32([] if params.ignore_eos else [EOS]),
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        bias_token_ids=pack_int32(ids),
        biases=pack_float32([min(100, max(-100, params.logit_bias[token_id])) for token_id in ids]),
        allowed_token_ids=pack_int32(params.allowed_token_ids.ids),
        bad_words=[pack_int32(word) for word in words],
    )


def make_case(prompt: list[int], params: pb.SamplingParams, tokenizer: Tokenizer) -> Case:
    ids = np.array(prompt, dtype=np.int32)
    ends = frozenset() if params.ignore_eos else frozenset({EOS})
    output = true_tokens(ids, resolved(params, tokenizer), ends, params.max_tokens, VOCAB_SIZE)
    wanted = params.HasField("logprobs")
    logprobs = entries(true_logprobs(ids, output, params.logprobs, VOCAB_SIZE)) if wanted else []
    return Case(prompt, params, output.tolist(), logprobs)


def random_case(rng: random.Random, tokenizer: Tokenizer) -> Case:
    """Each parameter now and then; among few allowed tokens, bad words are often at hand."""
    allowed = rng.sample(range(VOCAB_SIZE), 6)
    some: Callable[[float], bool] = lambda part: rng.random() < part  # noqa: E731  # four uses
    params = pb.SamplingParams(
        temperature=rng.choice([0.0, 0.8]),
        seed=rng.getrandbits(31),
        max_tokens=rng.choice([1, 7, 80, 160, 240]),
        ignore_eos=some(0.7),
        min_p=rng.choice([0.0, 0.1]),
        repetition_penalty=rng.choice([1.0, 1.25]),
        presence_penalty=rng.choice([0.0, 0.0, -0.5]),
        frequency_penalty=rng.choice([0.0, 0.0, 1.5]),
        logit_bias={token_id: rng.choice([-200.0, 0.5]) for token_id in allowed[: rng.choice([0, 3])]},
        logprobs=rng.choice([None, 0, 3, 20]),
    )
    if some(0.4):
        params.allowed_token_ids.ids.extend(allowed)
    elif some(0.3):
        params.allowed_token_ids.ids.extend(range(0, VOCAB_SIZE, 3))  # they travel as a mask
    if some(0.4):
        params.bad_words.append(rng.choice(["a", "def", "import os"]))
        words = [rng.sample(allowed, rng.choice([1, 2, 2, 3])) for _ in range(8)]
        params.bad_words_token_ids.extend(pb.TokenIds(ids=word) for word in words)
    return make_case([rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 60))], params, tokenizer)


async def ask_native(channel: aio.Channel, case: Case) -> Answer:
    answer = Answer()
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=case.prompt), sampling_params=case.params)
    async for response in rpc.GenerationStub(channel).Generate(request, timeout=60):
        answer.tokens += response.token_ids
        answer.text += response.text
        assert len(response.logprobs) in ({len(response.token_ids)} if case.logprobs else {0})
        for each in response.logprobs:
            answer.logprobs.append((each.logprob, each.rank, [(top.token_id, top.logprob) for top in each.top]))
        answer.finish = response.finish
    answer.num_preemptions = answer.finish.timings.num_preemptions
    return answer


def vllm_request(case: Case, stream: bool) -> Any:
    params = case.params
    plain = {"temperature", "max_tokens", "ignore_eos", "min_p", "seed", "logit_bias"}
    plain |= {"repetition_penalty", "presence_penalty", "frequency_penalty", "stop"}
    fields = {one.name: value for one, value in params.ListFields() if one.name in plain}
    fields |= {"logprobs": params.logprobs} if params.HasField("logprobs") else {}
    prompt = vllm.TokenizedInput(input_ids=case.prompt)
    sampling = vllm.SamplingParams(**{"temperature": 0.0, "top_p": 1.0, **fields})
    return vllm.GenerateRequest(request_id="r", tokenized=prompt, sampling_params=sampling, stream=stream)


async def ask_vllm(channel: aio.Channel, case: Case, stream: bool) -> Answer:
    """Its answers carry no ranks; they are filled in."""
    answer = Answer()
    async for response in vllm_grpc.VllmEngineStub(channel).Generate(vllm_request(case, stream), timeout=60):
        is_chunk = response.HasField("chunk")
        tokens = response.chunk.token_ids if is_chunk else response.complete.output_ids
        logprobs = response.chunk.output_logprobs if is_chunk else response.complete.output_logprobs
        answer.tokens += tokens
        assert list(logprobs.token_ids) == (list(tokens) if case.logprobs else [])
        tops = [list(zip(top.token_ids, top.values, strict=True)) for top in logprobs.top_logprobs]
        for i, logprob in enumerate(logprobs.token_logprobs):
            rank = case.logprobs[len(answer.logprobs)][1]
            answer.logprobs.append((logprob, rank, tops[i] if case.params.logprobs else []))
        answer.finish = response
    return answer


async def check(channel: aio.Channel, case: Case, way: int) -> int:
    """One request is exact; returns how often it was preempted."""
    if case.is_plain and way:
        answer = await ask_vllm(channel, case, stream=way == 1)
        # The end-of-sequence token is not among its ids.
        has_ended = answer.finish.complete.finish_reason == "stop"
        num = len(case.tokens) - has_ended
    else:
        answer, num = await ask_native(channel, case), len(case.tokens)
    assert answer.tokens == case.tokens[:num], case.params
    assert answer.logprobs == case.logprobs[:num], case.params
    return answer.num_preemptions


@pytest.fixture(scope="module")
def cases(stub_model: Path) -> list[Case]:
    """The truth takes longer than the service."""
    tokenizer, rng = Tokenizer.from_file(str(stub_model / "tokenizer.json")), random.Random(1)
    return [random_case(rng, tokenizer) for _ in range(64)]


@pytest.mark.parametrize(
    ("tp", "depth"), [pytest.param(1, 2, marks=pytest.mark.soak), pytest.param(2, 1, marks=pytest.mark.soak), (4, 2)]
)
async def test_64_requests_with_mixed_parameters_are_exact(
    tmp_path: Path, stub_model: Path, cases: list[Case], tp: int, depth: int
):
    """Together, with blocks for a fraction of them, and one after the other; the same as the definition."""
    pool_gib = 20 * 32 * (8 // tp) * 8 / 2**30  # 20 blocks: 16 hold one longest sequence
    with (
        worker_group(tmp_path / "g", stub_model, engine="stub", tp=tp, kv_cache_gib=pool_gib, max_num_seqs=32) as group,
        scheduler(tmp_path / "s", stub_model, group, depth=depth) as target,
    ):
        async with make_channel(target) as channel:
            together = await asyncio.gather(*(check(channel, case, i % 3) for i, case in enumerate(cases)))
            assert sum(together) > 0
            for i, case in enumerate(cases[:8]):
                await check(channel, case, i % 3)


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("min_p", {"min_p": 1.5}),
    ("presence_penalty", {"presence_penalty": 2.5}),
    ("frequency_penalty", {"frequency_penalty": float("nan")}),
    ("repetition_penalty", {"repetition_penalty": -1.0}),
    ("logit_bias", {"logit_bias": {VOCAB_SIZE: 1.0}}),
    ("logit_bias", {"logit_bias": {1: float("inf")}}),
    ("logprobs", {"logprobs": 21}),
    ("allowed_token_ids", {"allowed_token_ids": pb.TokenIds()}),
    ("allowed_token_ids", {"allowed_token_ids": pb.TokenIds(ids=[VOCAB_SIZE])}),
    ("bad_words", {"bad_words": ["a"] * 257}),
    ("bad_words_token_ids", {"bad_words_token_ids": [pb.TokenIds(ids=[1] * 65)]}),
]


async def refusal(call: Any) -> str:
    with pytest.raises(aio.AioRpcError) as refused:
        async for _ in call:
            pass
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    return refused.value.details() or ""


async def test_stop_strings_cut_logprobs_and_wrong_parameters_are_named(tmp_path: Path, stub_model: Path):
    """Streamed and in full, of several completions; a request from which bad words leave no token still ends."""
    tokenizer = Tokenizer.from_file(str(stub_model / "tokenizer.json"))
    with (
        worker_group(tmp_path / "g", stub_model, engine="stub", tp=2) as group,
        scheduler(tmp_path / "s", stub_model, group) as target,
    ):
        async with make_channel(target) as channel:
            params = pb.SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=2, frequency_penalty=1)
            whole = make_case([5, 6, 7], params, tokenizer)
            start = next(i for i in range(10, 40) if tokenizer.decode(whole.tokens[i : i + 1]).isascii())
            params.stop.append(tokenizer.decode(whole.tokens[start : start + 1]))
            case = Case(whole.prompt, params, whole.tokens, whole.logprobs)
            answer = await ask_native(channel, case)
            num = answer.finish.usage.completion_tokens
            assert answer.finish.matched_stop_str
            assert num <= start + 1
            assert (answer.tokens, answer.logprobs) == (case.tokens[:num], case.logprobs[:num])
            for stream in (True, False):
                other = await ask_vllm(channel, case, stream)
                assert (other.tokens, other.logprobs) == (answer.tokens, answer.logprobs)

            params.n = 3
            request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=case.prompt), sampling_params=params)
            got: dict[int, list[float]] = {}
            async for response in rpc.GenerationStub(channel).Generate(request):
                got.setdefault(response.index, []).extend(each.logprob for each in response.logprobs)
            assert got == {index: [logprob for logprob, _, _ in answer.logprobs] for index in range(3)}

            nothing_left = pb.SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
            nothing_left.allowed_token_ids.ids.append(9)
            nothing_left.bad_words_token_ids.add(ids=[9, 9])
            assert len((await ask_native(channel, make_case([5], nothing_left, tokenizer))).tokens) == 5

            native, engine = rpc.GenerationStub(channel), vllm_grpc.VllmEngineStub(channel)
            prompt = pb.TokenIds(ids=[5])
            nothing_left.bad_words_token_ids.add(ids=[9])
            call = native.Generate(pb.GenerateRequest(token_ids=prompt, sampling_params=nothing_left))
            assert await refusal(call) == "allowed_token_ids and bad_words of one token leave no token to sample"
            for name, fields in WRONG:
                sampling = pb.SamplingParams(**fields)
                call = native.Generate(pb.GenerateRequest(token_ids=prompt, sampling_params=sampling))
                assert f"sampling_params.{name}" in await refusal(call)
                if name in vllm.SamplingParams.DESCRIPTOR.fields_by_name:
                    theirs = vllm.SamplingParams(**fields)
                    ids = vllm.TokenizedInput(input_ids=[5])
                    call = engine.Generate(vllm.GenerateRequest(tokenized=ids, sampling_params=theirs))
                    assert f"sampling_params.{name}" in await refusal(call)
