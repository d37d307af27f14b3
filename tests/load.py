"""Clients of the stub engine that compare every token with the truth as it arrives."""

import asyncio
import contextlib
import json
import math
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import grpc
import numpy as np
from grpc import aio

from albireo.arrays import Int64Array
from albireo.ledger import rows_of
from albireo.rpc import make_channel
from albireo.v1 import generation_pb2 as pb
from albireo.v1 import generation_pb2_grpc as rpc
from albireo.v1 import ledger_pb2, ledger_pb2_grpc, plan_pb2
from services import read_metrics
from worker_svc.stub.truth import true_tokens

# Of the stub model (conftest).
VOCAB_SIZE = 1003
EOS = 2

# A stream that lasts this long hangs.
STREAM_TIMEOUT_S = 120.0
_RETRY_S = 0.05


def tenant_metadata(tenant: str) -> tuple[tuple[str, str], ...]:
    return (("x-tenant", tenant),) if tenant else ()


def random_tokens(rng: random.Random, num: int) -> list[int]:
    return [rng.randrange(3, VOCAB_SIZE) for _ in range(num)]


def true_output(
    prompt: list[int],
    max_tokens: int,
    ignore_eos: bool,
    stop_token_ids: frozenset[int] = frozenset(),
    **sampling: object,
) -> list[int]:
    """What the stub engine answers, the token that ends it included."""
    ends = stop_token_ids | (frozenset() if ignore_eos else frozenset({EOS}))
    packed = np.array(sorted(ends), dtype="<i4").tobytes()
    params = plan_pb2.Sampling(**{"top_p": 1.0, **sampling}, suppressed_token_ids=packed)
    return true_tokens(np.array(prompt, dtype=np.int32), params, ends, max_tokens, VOCAB_SIZE).tolist()


@dataclass(frozen=True)
class Case:
    """A request and its answer."""

    prompt: list[int]
    params: pb.SamplingParams
    expected: list[int]
    tenant: str = ""
    priority: int = 0

    def request(self) -> pb.GenerateRequest:
        prompt = pb.TokenIds(ids=self.prompt)
        return pb.GenerateRequest(token_ids=prompt, sampling_params=self.params, priority=self.priority)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Of the call."""
        return tenant_metadata(self.tenant)

    def __str__(self) -> str:
        shown = f"temperature={self.params.temperature:g} seed={self.params.seed} min_tokens={self.params.min_tokens}"
        return f"<prompt of {len(self.prompt)}, {self.params.max_tokens} tokens at most, {shown}>"


def fixed_case(prompt: list[int], num_tokens: int, tenant: str = "", priority: int = 0) -> Case:
    """Greedy, with an answer of so many tokens."""
    params = pb.SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    return Case(prompt, params, true_output(prompt, num_tokens, True), tenant, priority)


def random_case(rng: random.Random, longest: int = 240) -> Case:
    """Any prompt, greedy or not, with and without end of sequence; ``longest`` is exclusive, in tokens of output."""
    prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 60))]
    max_tokens, seed, ignore_eos = rng.randrange(1, longest), rng.getrandbits(64), rng.random() < 0.7
    temperature, min_tokens = rng.choice([0.0, 0.8]), min(rng.choice([0, 0, 20]), max_tokens)
    params = pb.SamplingParams(
        temperature=temperature, seed=seed, max_tokens=max_tokens, min_tokens=min_tokens, ignore_eos=ignore_eos
    )
    expected = true_output(prompt, max_tokens, ignore_eos, temperature=temperature, seed=seed, min_tokens=min_tokens)
    return Case(prompt, params, expected)


class CasePool:
    """A bounded number of cases, each made when first drawn: the truth costs more than the service's tokens.

    Args:
        longest: of random cases, in tokens of output, exclusive.
        make: makes a case, in place of `random_case`.
    """

    def __init__(
        self, seed: object, size: int = 200, longest: int = 240, make: Callable[[random.Random], Case] | None = None
    ) -> None:
        self._seed = seed
        self._make = make or (lambda rng: random_case(rng, longest))
        self._cases: list[Case | None] = [None] * size

    def draw(self, rng: random.Random) -> Case:
        return self._get(rng.randrange(len(self._cases)))

    def fill(self) -> None:
        """Makes all cases now, where drawing them must take no time."""
        for index in range(len(self._cases)):
            self._get(index)

    def _get(self, index: int) -> Case:
        case = self._cases[index]
        if case is None:
            case = self._cases[index] = self._make(random.Random(f"{self._seed}/{index}"))
        return case


@dataclass
class Answer:
    """What has come of a case."""

    case: Case
    num_tokens: int = 0
    finish: pb.Finish | None = None
    longest_gap_s: float = 0.0  # without a token
    first_token_s: float | None = None  # from the request's start
    _started_at: float = field(default_factory=time.monotonic)
    _last_at: float = field(default_factory=time.monotonic)

    def take(self, response: pb.GenerateResponse) -> None:
        """Adds a response; AssertionError for a wrong token."""
        new = list(response.token_ids)
        expected = self.case.expected[self.num_tokens : self.num_tokens + len(new)]
        assert new == expected, f"{self.case}: after {self.num_tokens} tokens {new} came where {expected} is right"
        self.num_tokens += len(new)
        if response.HasField("finish"):
            self.finish = response.finish
        if new:
            now = time.monotonic()
            if self.first_token_s is None:
                self.first_token_s = now - self._started_at
            self.longest_gap_s, self._last_at = max(self.longest_gap_s, now - self._last_at), now

    def check_end(self) -> None:
        """The stream has ended in order: all tokens are there, and the finish is right."""
        case, expected = self.case, self.case.expected
        assert self.num_tokens == len(expected), f"{case}: {self.num_tokens} of {len(expected)} tokens"
        assert self.finish is not None, f"{case}: no finish"
        assert self.finish.usage.completion_tokens == len(expected)
        stops = not case.params.ignore_eos and expected[-1] == EOS and len(expected) > case.params.min_tokens
        assert self.finish.reason == (pb.FINISH_REASON_STOP if stops else pb.FINISH_REASON_LENGTH)


async def run_case(
    stub: rpc.GenerationStub,
    answer: Answer,
    *,
    stop_after: int | None = None,
    cancel_after_s: float | None = None,
    timeout_s: float = STREAM_TIMEOUT_S,
) -> None:
    """Runs one request, with every token and the end compared; what has come is in ``answer``, errors or not.

    Args:
        stop_after: the client cancels after so many tokens.
        cancel_after_s: the client cancels after so long.
        timeout_s: the call's deadline.
    """
    call = stub.Generate(answer.case.request(), timeout=timeout_s, metadata=answer.case.metadata())
    timer = None
    if cancel_after_s is not None:
        timer = asyncio.get_running_loop().call_later(cancel_after_s, call.cancel)
    try:
        async for response in call:
            answer.take(response)
            if stop_after is not None and answer.num_tokens >= stop_after:
                return
        answer.check_end()
    except asyncio.CancelledError:
        if timer is None or timer.when() > asyncio.get_running_loop().time():
            raise  # not the client's timer: the test itself is over
    finally:
        call.cancel()
        if timer is not None:
            timer.cancel()


class Load:
    """``num_streams`` clients on ``num_channels`` channels, each of which sends its next request when one ends.

    Use: an async context manager; `check` now and then, `finish` at the end. A wrong token and any error fail the load,
    with one exception: during a `frontend_outage`, streams may end with UNAVAILABLE; their clients try again.

    Args:
        cancels: part of the requests that the client cancels at a random moment.
    """

    def __init__(
        self,
        target: str,
        seed: object,
        num_streams: int,
        *,
        num_channels: int = 8,
        cases: CasePool | None = None,
        cancels: float = 0.0,
    ) -> None:
        self._target = target
        self._seed = seed
        self._num_streams = num_streams
        self._num_channels = num_channels
        self._cases = cases or CasePool(seed)
        self._canaries = CasePool(f"{seed}/canaries", size=50, longest=24)
        self._rng = random.Random(f"{seed}/canaries")
        self._cancels = cancels
        self._channels: list[aio.Channel] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._is_ending = False
        self._outages: list[float] = []  # their ends
        self.num_tokens = 0
        self.num_streams = 0
        self.num_unavailable = 0
        self.num_cancelled = 0
        self.longest_gaps_s: list[float] = []  # per stream that completed

    async def __aenter__(self) -> "Load":
        self._channels = [make_channel(self._target) for _ in range(self._num_channels)]
        self._tasks = [asyncio.create_task(self._run_client(index)) for index in range(self._num_streams)]
        return self

    async def __aexit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                await self.finish()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for channel in self._channels:
                await channel.close()

    def check(self) -> None:
        """Raises what a client failed with, if one has."""
        for task in self._tasks:
            if task.done():
                task.result()

    async def finish(self) -> None:
        """Sends no more requests and waits for those that run; raises what a client failed with."""
        self._is_ending = True
        await asyncio.gather(*self._tasks)

    @contextlib.contextmanager
    def frontend_outage(self) -> Iterator[None]:
        """Meanwhile a front end is dead, or frozen and about to be killed."""
        index = len(self._outages)
        self._outages.append(math.inf)
        try:
            yield
        finally:
            self._outages[index] = time.monotonic()

    async def canary(self) -> None:
        """A short request on a connection of its own, compared in the same way; tried again as the others are."""
        case = self._canaries.draw(self._rng)
        async with asyncio.timeout(STREAM_TIMEOUT_S):
            done = False
            while not done:
                async with make_channel(self._target) as channel:
                    done = await self._try(rpc.GenerationStub(channel), case)

    @contextlib.asynccontextmanager
    async def canaries(self, pause_s: float = 0.0) -> AsyncIterator[None]:
        """Meanwhile, a canary is sent again and again, with pauses of ``pause_s`` at most."""

        async def send() -> None:
            while True:
                await self.canary()
                await asyncio.sleep(self._rng.uniform(0, pause_s))

        sending = asyncio.create_task(send())
        try:
            yield
            if sending.done():
                sending.result()  # raises what it met
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    def report(self) -> dict[str, float]:
        """Figures for people."""
        gaps = self.longest_gaps_s or [0.0]
        return {
            "tokens_checked": self.num_tokens,
            "streams": self.num_streams,
            "cancelled_streams": self.num_cancelled,
            "unavailable_streams": self.num_unavailable,
            "longest_gap_p99_s": round(float(np.percentile(gaps, 99)), 3),
            "longest_gap_s": round(max(gaps), 3),
        }

    async def _run_client(self, index: int) -> None:
        rng = random.Random(f"{self._seed}/client/{index}")
        stub = rpc.GenerationStub(self._channels[index % self._num_channels])
        while not self._is_ending:
            cancel_after_s = rng.uniform(0, 2) if rng.random() < self._cancels else None
            await self._try(stub, self._cases.draw(rng), cancel_after_s)

    async def _try(self, stub: rpc.GenerationStub, case: Case, cancel_after_s: float | None = None) -> bool:
        """One request. False when its front end died."""
        since = time.monotonic()
        answer = Answer(case)
        try:
            await run_case(stub, answer, cancel_after_s=cancel_after_s)
        except aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE or not self._may_be_unavailable(since):
                where = f"{answer.num_tokens} tokens and {time.monotonic() - since:.1f} s"
                raise AssertionError(f"{case} ended after {where}: {error.code().name}: {error.details()}") from error
            self.num_unavailable += 1
            await asyncio.sleep(_RETRY_S)
            return False
        finally:
            self.num_tokens += answer.num_tokens
        if answer.finish is None:
            self.num_cancelled += 1
        else:
            self.num_streams += 1
            self.longest_gaps_s.append(answer.longest_gap_s)
        return True

    def _may_be_unavailable(self, since: float) -> bool:
        """Whether there was an outage since then."""
        return any(end >= since for end in self._outages)


# The planner's metrics when there is nothing to do and nothing was left behind.
EMPTY = {
    "albireo_running_sequences": 0.0,
    "albireo_waiting_sequences": 0.0,
    "albireo_kv_blocks_used": 0.0,
    "albireo_steps_in_flight": 0.0,
}


async def wait_for_metrics(port: int, wanted: Mapping[str, float], timeout_s: float = 20.0) -> None:
    """Waits until a process's metrics have these values."""
    deadline = time.monotonic() + timeout_s
    got: Mapping[str, float | None] = {}
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):  # it may be starting
            metrics = await asyncio.to_thread(read_metrics, port)
            got = {name: metrics.get(name) for name in wanted}
            if got == wanted:
                return
        await asyncio.sleep(0.1)
    raise AssertionError(f"after {timeout_s:g} s the metrics are {got}")


async def read_planner_page(channel: aio.Channel) -> dict[str, Int64Array]:
    """The planner's ledger by column, as a front end tells it."""
    pages = (await ledger_pb2_grpc.LedgerStub(channel).Read(ledger_pb2.ReadLedgerRequest())).pages
    (page,) = (page for page in pages if page.process == "planner")
    return rows_of(page)


async def count_computed_tokens(channel: aio.Channel) -> int:
    """Tokens of all steps that the planner's ledger keeps: of prompts, and those that were sampled before."""
    return int((await read_planner_page(channel))["num_tokens"].sum())


async def wait_until(is_so: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"after {timeout_s:g} s: not yet that {what}"
        await asyncio.sleep(0.05)


def write_report(report: Mapping[str, object]) -> None:
    """Prints results, and appends them as a line of JSON to the file that ALBIREO_RESULTS names."""
    line = json.dumps(report)
    print(line)  # noqa: T201  # for people: `pytest -s`, or the report of a failure
    if path := os.environ.get("ALBIREO_RESULTS"):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
