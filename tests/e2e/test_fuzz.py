"""Any client message, whole or broken, gets a right answer or a refusal that says why; the service goes on unharmed.

What is right is stated here again, from the API's description alone: which fields of a request are wrong, which
parameters are not served, and what the truth machine answers to the rest.
"""

import asyncio
import math
import random
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unicodedata import category

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from smg_grpc_proto import vllm_engine_pb2 as vllm
from tokenizers import Tokenizer

from albireo.arrays import pack_float32, pack_int32
from albireo.rpc import CHANNEL_OPTIONS, MAX_MESSAGE_BYTES
from albireo.v1 import generation_pb2 as pb
from fuzzing import any_message, damaged, mutated, weighted
from load import EMPTY, EOS, VOCAB_SIZE, CasePool, Load, true_output, wait_for_metrics
from services import Service, fixed_ports, scheduler_service, wait_until_serving, worker_service

pytestmark = pytest.mark.e2e

CONTEXT = 512
DEADLINE_S = 20.0
# A stream that brings more is cut off here: the answers of a fuzzed request are long by chance.
MAX_TOKENS_READ = 200

NATIVE = pb.DESCRIPTOR.services_by_name["Generation"]
ENGINE = vllm.DESCRIPTOR.services_by_name["VllmEngine"]
METHODS: list[MethodDescriptor] = [*NATIVE.methods, *ENGINE.methods]
NATIVE_GENERATE = NATIVE.methods_by_name["Generate"]
ENGINE_GENERATE = ENGINE.methods_by_name["Generate"]

OK, INVALID, UNSERVED = grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


def request_class(method: MethodDescriptor) -> type[Message]:
    return message_factory.GetMessageClass(method.input_type)


# What a request means.


@dataclass
class Meaning:
    """Of a Generate request, whichever API it came by."""

    prompt: list[int] = field(repr=False)
    params: Any = field(repr=False)  # the message with the sampling parameters
    temperature: float
    seed: int | None
    n: int
    bad_words: list[list[int]] = field(repr=False)  # token ids
    wrong: set[str] = field(default_factory=set)  # fields with values that cannot be served
    unserved: set[str] = field(default_factory=set)  # parameters that are not served

    @property
    def ends(self) -> frozenset[int]:
        return frozenset(self.params.stop_token_ids) | (frozenset() if self.params.ignore_eos else frozenset({EOS}))

    @property
    def max_tokens(self) -> int:
        left = CONTEXT - len(self.prompt)
        return min(self.params.max_tokens, left) if self.params.HasField("max_tokens") else left

    def truth(self, num_tokens: int) -> list[int]:
        """The first tokens of completion 0, and of all when they are greedy."""
        greedy = self.temperature < 1e-5
        return true_output(
            self.prompt,
            min(num_tokens, self.max_tokens),
            self.params.ignore_eos,
            frozenset(self.params.stop_token_ids),
            temperature=0.0 if greedy else self.temperature,
            seed=0 if greedy or self.seed is None else self.seed % (1 << 64),
            min_tokens=min(self.params.min_tokens, self.max_tokens),
            repetition_penalty=self.params.repetition_penalty,
            presence_penalty=self.params.presence_penalty,
            frequency_penalty=self.params.frequency_penalty,
            bias_token_ids=pack_int32(sorted(self.params.logit_bias)),
            biases=pack_float32([min(100, max(-100, bias)) for _, bias in sorted(self.params.logit_bias.items())]),
            allowed_token_ids=pack_int32(allowed_ids(self.params)),
            bad_words=[pack_int32(word) for word in self.bad_words],
        )

    def is_determined(self, index: int) -> bool:
        return self.temperature < 1e-5 or (index == 0 and self.seed is not None)


def native_meaning(request: pb.GenerateRequest, tokenizer: Tokenizer) -> Meaning:
    params = request.sampling_params
    which = request.WhichOneof("prompt")
    num_last = last_tokens(params)
    prompt, wrong = prompt_of(which, request.text, request.token_ids.ids, "token_ids", tokenizer, num_last)
    meaning = Meaning(
        prompt=prompt,
        params=params,
        temperature=params.temperature if params.HasField("temperature") else 1.0,
        seed=params.seed if params.HasField("seed") else None,
        n=params.n if params.HasField("n") else 1,
        bad_words=[list(word.ids) for word in params.bad_words_token_ids],
        wrong=wrong,
    )
    if params.HasField("repetition_penalty") and params.repetition_penalty == 0:
        meaning.wrong.add("repetition_penalty")
    meaning.wrong |= wrong_words(meaning, tokenizer)
    meaning.wrong |= wrong_fields(meaning, params.top_p if params.HasField("top_p") else 1.0, request.request_id)
    return meaning


def engine_meaning(request: Any, tokenizer: Tokenizer) -> Meaning:
    params = request.sampling_params
    which = request.WhichOneof("input")
    num_last = last_tokens(params)
    num_last = CONTEXT - 1 if num_last == -1 else num_last
    prompt, wrong = prompt_of(which, request.text, request.tokenized.input_ids, "input_ids", tokenizer, num_last)
    meaning = Meaning(
        prompt=prompt,
        params=params,
        temperature=params.temperature if params.HasField("temperature") else 1.0,
        seed=params.seed if params.HasField("seed") else None,
        n=params.n or 1,
        bad_words=[],
        wrong=wrong,
        unserved=unserved_fields(request),
    )
    meaning.wrong |= wrong_fields(meaning, params.top_p or 1.0, request.request_id)
    if request.data_parallel_rank < 0:
        meaning.wrong.add("data_parallel_rank")
    return meaning


def allowed_ids(params: Any) -> list[int]:
    is_given = "allowed_token_ids" in params.DESCRIPTOR.fields_by_name
    return list(params.allowed_token_ids.ids) if is_given else []


def wrong_words(meaning: Meaning, tokenizer: Tokenizer) -> set[str]:
    """Wrong fields of those that only the native API has; adds the bad words of text to the meaning's."""
    params = meaning.params
    wrong = {"bad_words_token_ids"} if any(not is_word(word) for word in meaning.bad_words) else set()
    if len(params.bad_words) + len(params.bad_words_token_ids) > 256:
        return wrong | {"bad_words" if params.bad_words else "bad_words_token_ids"}
    for text in params.bad_words:
        if len(text) > 1024:
            return wrong | {"bad_words"}
        bare, spaced = (tokenizer.encode(lead + text.lstrip(), add_special_tokens=False).ids for lead in ("", " "))
        words = [bare, spaced] if bare and len(bare) == len(spaced) and bare[0] != spaced[0] else [bare]
        meaning.bad_words += words
        wrong |= {"bad_words"} if not all(map(is_word, words)) else set()
    ids = params.allowed_token_ids.ids
    if params.HasField("allowed_token_ids") and (not ids or any(token >= VOCAB_SIZE for token in ids)):
        wrong.add("allowed_token_ids")
    return wrong


def is_word(ids: list[int]) -> bool:
    return 1 <= len(ids) <= 64 and all(0 <= token < VOCAB_SIZE for token in ids)


def last_tokens(params: Any) -> int | None:
    """So many of the prompt's last tokens count; None: all."""
    return params.truncate_prompt_tokens if params.HasField("truncate_prompt_tokens") else None


def prompt_of(
    which: str | None, text: str, ids: Iterable[int], ids_field: str, tokenizer: Tokenizer, num_last: int | None
) -> tuple[list[int], set[str]]:
    """The prompt's tokens and, when something is wrong with them, the field's name."""
    if num_last is not None and num_last < 1:
        return [], {"truncate_prompt_tokens"}
    if which is None:
        return [], {"prompt"}
    if which == "text" and len(text) > 64 * CONTEXT:
        return [], {"text"}
    prompt = tokenizer.encode(text).ids if which == "text" else list(ids)
    prompt = prompt if num_last is None else prompt[-num_last:]
    is_right = 1 <= len(prompt) < CONTEXT and all(0 <= token < VOCAB_SIZE for token in prompt)
    return prompt, set() if is_right else {"text" if which == "text" else ids_field}


def wrong_fields(meaning: Meaning, top_p: float, request_id: str) -> set[str]:
    params = meaning.params
    stop_ids = set(params.stop_token_ids)
    is_wrong = {
        "request_id": len(request_id) > 256 or any(category(char) in ("Cc", "Zl", "Zp") for char in request_id),
        "temperature": not (math.isfinite(meaning.temperature) and 0 <= meaning.temperature <= 100),
        "top_p": not 0 < top_p <= 1,
        "n": not 1 <= meaning.n <= 128,
        "min_p": not 0 <= params.min_p <= 1,
        "repetition_penalty": not 0 <= params.repetition_penalty < math.inf,
        "presence_penalty": not -2 <= params.presence_penalty <= 2,
        "frequency_penalty": not -2 <= params.frequency_penalty <= 2,
        "logit_bias": len(params.logit_bias) > 1024
        or not all(0 <= one < VOCAB_SIZE and math.isfinite(bias) for one, bias in params.logit_bias.items()),
        "logprobs": not 0 <= params.logprobs <= 20,
        "prompt_logprobs": not 0 <= params.prompt_logprobs <= 20,
        "max_tokens": params.HasField("max_tokens") and params.max_tokens == 0,
        "min_tokens": params.HasField("max_tokens") and params.min_tokens > params.max_tokens,
        "stop": len(params.stop) > 64 or any(not 1 <= len(stop) <= 1024 for stop in params.stop),
        "stop_token_ids": len(params.stop_token_ids) > 1024 or any(token >= VOCAB_SIZE for token in stop_ids),
    }
    return {name for name, is_so in is_wrong.items() if is_so} | fields_that_leave_nothing(meaning)


def fields_that_leave_nothing(meaning: Meaning) -> set[str]:
    """To sample, at the beginning at least."""
    is_left = set(allowed_ids(meaning.params) or range(VOCAB_SIZE))
    is_left -= {word[0] for word in meaning.bad_words if len(word) == 1}
    is_left -= meaning.ends if meaning.params.min_tokens else set()
    return set() if is_left else {"allowed_token_ids", "bad_words", "stop_token_ids"}


_SERVED = {"request_id", "tokenized", "text", "sampling_params", "stream"}
_SERVED_SAMPLING = {"temperature", "top_p", "top_k", "seed", "max_tokens", "min_tokens", "stop", "stop_token_ids"}
_SERVED_SAMPLING |= {"ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "n"}
_SERVED_SAMPLING |= {"min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs"}
_SERVED_SAMPLING |= {"prompt_logprobs", "truncate_prompt_tokens"}
_SERVED_SAMPLING |= {"spaces_between_special_tokens"}  # asks for nothing: answers are token ids


def unserved_fields(request: Any) -> set[str]:
    names = {field.name for field, value in request.ListFields() if field.name not in _SERVED and not is_zero(value)}
    if request.data_parallel_rank <= 0:
        names.discard("data_parallel_rank")
    for one, value in request.sampling_params.ListFields():
        is_neutral = not one.has_presence and is_zero(value)
        if one.name not in _SERVED_SAMPLING and not is_neutral:
            names.add(one.name)
    return names


def is_zero(value: Any) -> bool:
    """-0.0 is a field that is set to nothing."""
    return isinstance(value, float) and value == 0


# What came back.


@dataclass
class Outcome:
    """``code`` is None when the stream was cut off by us."""

    code: grpc.StatusCode | None
    details: str
    responses: list[Any] = field(repr=False)


@dataclass
class Completion:
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: Any = None


def check_generate(outcome: Outcome, meaning: Meaning, read: Callable[[list[Any]], dict[int, Completion]]) -> None:
    """The outcome of a request whose bytes are a message."""
    if outcome.code is UNSERVED:
        assert names_one_of(meaning.unserved, outcome.details), (outcome, meaning)
    elif outcome.code is INVALID:
        assert names_one_of(meaning.wrong, outcome.details), (outcome, meaning)
    elif outcome.code is not EXHAUSTED:
        assert outcome.code in (OK, None), outcome
        assert not meaning.unserved, (outcome, meaning)
        assert not meaning.wrong, (outcome, meaning)
        check_completions(read(outcome.responses), meaning, is_whole=outcome.code is OK)


def names_one_of(names: Iterable[str], details: str) -> bool:
    return any(re.search(rf"\b{name}\b", details) for name in names)


def check_completions(completions: dict[int, Completion], meaning: Meaning, is_whole: bool) -> None:
    if is_whole:
        assert sorted(completions) == list(range(meaning.n))
        assert all(one.finish is not None for one in completions.values())
    truths: dict[int, list[int]] = {}
    for index, one in completions.items():
        assert all(0 <= token < VOCAB_SIZE for token in one.tokens)
        assert len(one.tokens) <= meaning.max_tokens
        if meaning.is_determined(index):
            num = meaning.max_tokens if one.finish is not None else len(one.tokens)
            truth = truths.get(num) or truths.setdefault(num, meaning.truth(num))
            check_tokens(one, truth, meaning)


def check_tokens(got: Completion, truth: list[int], meaning: Meaning) -> None:
    finish, num = got.finish, len(got.tokens)
    assert got.tokens == truth[:num], (got.tokens, truth)
    if finish is None:
        return
    which = finish.WhichOneof("matched_stop")
    if which == "matched_stop_str":
        assert finish.matched_stop_str in meaning.params.stop
        return
    if meaning.params.min_tokens == 0 and meaning.params.stop and got.text:
        assert not any(stop in got.text for stop in meaning.params.stop)
    has_ended = truth[-1] in meaning.ends and len(truth) > meaning.params.min_tokens
    assert which == ("matched_token_id" if has_ended else None)
    assert not has_ended or finish.matched_token_id == truth[-1]
    # The engine API leaves the token out that ended the sequence.
    leaves_out = has_ended and isinstance(finish, vllm.GenerateComplete)
    assert num == len(truth) - leaves_out


def check_other(method: MethodDescriptor, outcome: Outcome, request: Any) -> None:
    """Of any other call: an answer, or a refusal that names the call, or the field that is wrong."""
    wrong = wrong_in_others(method, request)
    if outcome.code is UNSERVED:
        assert method.name in outcome.details, outcome
    elif outcome.code is INVALID:
        assert names_one_of(wrong, outcome.details), (outcome, wrong)
    elif outcome.code is not EXHAUSTED:
        assert outcome.code in (OK, None), outcome
        assert not wrong, outcome
        assert method.name in _STREAMS or len(outcome.responses) == 1
        assert outcome.responses


_STREAMS = {"GetTokenizer", "SubscribeKvEvents"}


def wrong_in_others(method: MethodDescriptor, request: Any) -> set[str]:
    """Fields whose values cannot be served."""
    if method.name == "Abort":
        labels = request.request_ids
        return {"request_ids"} if len(labels) > 10_000 or any(len(label) > 256 for label in labels) else set()
    if method.name == "FlushCache":
        return set() if 0 <= request.timeout_s < math.inf else {"timeout_s"}
    return set()


def read_native(responses: list[pb.GenerateResponse]) -> dict[int, Completion]:
    completions: dict[int, Completion] = defaultdict(Completion)
    for response in responses:
        one = completions[response.index]
        assert one.finish is None, "something follows the end"
        one.tokens += response.token_ids
        one.text += response.text
        assert len(response.logprobs) in (0, len(response.token_ids))
        one.finish = response.finish if response.HasField("finish") else None
    return completions


def read_engine(responses: list[Any]) -> dict[int, Completion]:
    completions: dict[int, Completion] = defaultdict(Completion)
    for response in responses:
        if response.HasField("chunk"):
            completions[response.chunk.index].tokens += response.chunk.token_ids
        else:
            one = completions[response.complete.index]
            one.tokens += response.complete.output_ids
            one.finish = response.complete
            assert response.complete.completion_tokens == len(one.tokens)
            assert response.complete.finish_reason in ("stop", "length")
    return completions


# The server, and whom it serves beside.


class Canaries:
    """Exact streams in a thread of their own, for as long as the server is fuzzed."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="canaries")
        self.num_streams = 0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        self.check()

    def check(self) -> None:
        if self._error is not None:
            raise AssertionError("a canary met an error") from self._error

    def _run(self) -> None:
        try:
            asyncio.run(self._send())
        except AssertionError as error:
            self._error = error

    async def _send(self) -> None:
        cases = CasePool("fuzz", size=40, longest=60)
        async with Load(self._target, "fuzz", 3, num_channels=3, cases=cases) as load:
            while not self._stop.is_set():
                load.check()
                await asyncio.sleep(0.1)
            await load.finish()
            self.num_streams = load.num_streams


@dataclass
class Server:
    """The server under test, and a raw channel to it."""

    channel: grpc.Channel
    tokenizer: Tokenizer
    canaries: Canaries

    def send(self, method: MethodDescriptor, data: bytes) -> Outcome:
        """Any bytes; on the wire, a unary call is a stream of one message."""
        response_class = message_factory.GetMessageClass(method.output_type)
        call = self.channel.unary_stream(f"/{method.containing_service.full_name}/{method.name}")(
            data, timeout=DEADLINE_S
        )
        responses: list[Any] = []
        num_tokens = 0
        try:
            for response in call:
                responses.append(response_class.FromString(response))
                num_tokens += len(getattr(responses[-1], "token_ids", ()))
                num_tokens += len(responses[-1].chunk.token_ids) if hasattr(responses[-1], "chunk") else 0
                if num_tokens > MAX_TOKENS_READ or method.name == "SubscribeKvEvents":  # which never ends
                    call.cancel()
                    return Outcome(None, "", responses)
        except grpc.RpcError as error:
            return Outcome(error.code(), error.details() or "", responses)
        return Outcome(OK, "", responses)

    def check(self, method: MethodDescriptor, data: bytes) -> None:
        """Sends a message and judges what comes of it."""
        outcome = self.send(method, data)
        try:
            request: Any = request_class(method).FromString(data)
        except DecodeError:
            assert outcome.code is INVALID, outcome
            assert method.input_type.full_name in outcome.details, outcome
            return
        if method == NATIVE_GENERATE:
            check_generate(outcome, native_meaning(request, self.tokenizer), read_native)
        elif method == ENGINE_GENERATE:
            check_generate(outcome, engine_meaning(request, self.tokenizer), read_engine)
        else:
            check_other(method, outcome, request)
        self.canaries.check()


def service_pids(group: Service, scheduler: Service) -> list[int]:
    parts = [
        group.pids("--rank"),
        scheduler.pids("scheduler_svc", "planner"),
        scheduler.pids("scheduler_svc", "frontend"),
    ]
    assert [len(pids) for pids in parts] == [1, 1, 1]
    return [pid for pids in parts for pid in pids]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, stub_model: Path) -> Iterator[Server]:
    """One server for all; at the end it is the same as ever, and empty."""
    tmp_path, ports = tmp_path_factory.mktemp("fuzz"), fixed_ports(4)
    with (
        worker_service(tmp_path / "g", stub_model, engine="stub") as group,
        scheduler_service(tmp_path / "s", stub_model, group.address, port=ports, metrics_port=ports + 1) as scheduler,
    ):
        pids = service_pids(group, scheduler)
        canaries = Canaries(scheduler.address)
        canaries.start()
        try:
            options = [*CHANNEL_OPTIONS, ("grpc.max_send_message_length", -1)]
            with grpc.insecure_channel(scheduler.address, options=options) as channel:
                yield Server(channel, Tokenizer.from_file(str(stub_model / "tokenizer.json")), canaries)
        finally:
            canaries.stop()
        assert canaries.num_streams > 0
        assert service_pids(group, scheduler) == pids, "a process was replaced"
        wait_until_serving(scheduler.address)
        asyncio.run(wait_for_metrics(ports + 1, {**EMPTY, "albireo_frontends": 1.0}))
        asyncio.run(wait_for_metrics(ports + 3, {"albireo_frontend_streams_open": 0.0}))


# What is sent.

_TEXTS = ["a", "import os", "def f(x):\n    return x", "\U0001f600 \u00e9t\u00e9", " "]


@st.composite
def native_requests(draw: st.DrawFn) -> pb.GenerateRequest:
    """Valid, with short answers."""
    rng = random.Random(draw(st.integers(0, 1 << 32)))
    params = pb.SamplingParams(
        temperature=rng.choice([0.0, 0.7]), seed=rng.getrandbits(64), max_tokens=rng.randrange(1, 12)
    )
    prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 20))]
    if rng.random() < 0.3:
        return pb.GenerateRequest(text=rng.choice(_TEXTS), sampling_params=params)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling_params=params)


@st.composite
def engine_requests(draw: st.DrawFn) -> Any:
    """Valid, with short answers."""
    rng = random.Random(draw(st.integers(0, 1 << 32)))
    params = vllm.SamplingParams(
        temperature=rng.choice([0.0, 0.7]), seed=rng.getrandbits(31), max_tokens=rng.randrange(1, 12), top_p=1
    )
    request = vllm.GenerateRequest(request_id="fuzzed", sampling_params=params, stream=rng.random() < 0.6)
    if rng.random() < 0.3:
        request.text = rng.choice(_TEXTS)
    else:
        request.tokenized.input_ids.extend(rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 20)))
    return request


def base_requests(method: MethodDescriptor) -> st.SearchStrategy[Message]:
    """Valid requests of an RPC."""
    if method == NATIVE_GENERATE:
        return native_requests()
    if method == ENGINE_GENERATE:
        return engine_requests()
    return st.builds(request_class(method))


def with_little_work(request: Any) -> Any:
    """Many completions are short ones, and nobody waits long for a quiet moment."""
    if hasattr(request, "timeout_s"):
        request.timeout_s = 0.1 if 0.1 < request.timeout_s < math.inf else request.timeout_s
    if not hasattr(request, "sampling_params"):
        return request
    params = request.sampling_params
    if 4 < params.n <= 128 and not (params.HasField("max_tokens") and params.max_tokens <= 8):
        params.max_tokens = 8
        params.min_tokens = min(params.min_tokens, 8)
    return request


def requests(method: MethodDescriptor) -> st.SearchStrategy[Message]:
    """Of an RPC: valid but for a few fields, or set at random throughout."""
    base = base_requests(method)
    every = weighted((8, mutated(base)), (2, mutated(base, max_fields=12)), (1, any_message(request_class(method))))
    return every.map(with_little_work)


def costs_much(method: MethodDescriptor, data: bytes) -> bool:
    """Whether broken bytes happen to ask for more than a deadline allows, in an answer that cannot be cut off."""
    if method != ENGINE_GENERATE and method.name != "FlushCache":
        return False
    try:
        request: Any = request_class(method).FromString(data)
    except DecodeError:
        return False
    if method.name == "FlushCache":
        return 0.1 < request.timeout_s < math.inf
    params = request.sampling_params
    return not request.stream and params.n > 4 and not (params.HasField("max_tokens") and params.max_tokens <= 64)


def amounts(few: int, many: int) -> pytest.MarkDecorator:
    """Numbers of examples: in every run, and in a long one."""
    long = pytest.param(many, marks=[pytest.mark.soak, pytest.mark.timeout(3600)], id="many")
    return pytest.mark.parametrize("num", [pytest.param(few, id="few"), long])


def sent(request: Message) -> bytes:
    note(f"sent: {str(request)[:2000]}")
    return request.SerializeToString()


def fuzz(check: Callable[..., None], num: int, *examples: st.SearchStrategy[Any]) -> None:
    """Calls ``check`` with examples: the same ones every time in the short runs, new ones in the long."""
    suppressed = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    configured = settings(max_examples=num, derandomize=num < 500, suppress_health_check=suppressed, database=None)
    configured(given(*examples)(check))()


@amounts(100, 1600)
@pytest.mark.parametrize("method", [NATIVE_GENERATE, ENGINE_GENERATE], ids=["native", "engine"])
def test_generate_is_answered_rightly_or_refused_by_name(server: Server, method: MethodDescriptor, num: int):
    fuzz(lambda request: server.check(method, sent(request)), num, requests(method))


@amounts(40, 600)
def test_other_calls_are_answered_or_refused_by_name(server: Server, num: int):
    others = [method for method in METHODS if method not in (NATIVE_GENERATE, ENGINE_GENERATE)]
    examples = st.sampled_from(others).flatmap(lambda method: st.tuples(st.just(method), requests(method)))
    fuzz(lambda example: server.check(example[0], sent(example[1])), num, examples)


@amounts(60, 1200)
def test_broken_bytes_are_refused_or_are_another_message(server: Server, num: int):
    """Cut off, with flipped bits, with strings that are no UTF-8, or noise altogether."""

    def check(example: tuple[MethodDescriptor, bytes]) -> None:
        assume(not costs_much(*example))
        server.check(*example)

    methods = weighted((2, st.sampled_from([NATIVE_GENERATE, ENGINE_GENERATE])), (1, st.sampled_from(METHODS)))
    fuzz(check, num, methods.flatmap(lambda method: st.tuples(st.just(method), damaged(base_requests(method)))))


@pytest.mark.parametrize("method", [NATIVE_GENERATE, ENGINE_GENERATE], ids=["native", "engine"])
def test_a_message_beyond_the_limit_is_refused_for_its_size(server: Server, method: MethodDescriptor):
    outcome = server.send(method, bytes(MAX_MESSAGE_BYTES + 1))
    assert outcome.code is EXHAUSTED
    server.canaries.check()
