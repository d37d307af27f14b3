"""Load on a running server: requests of one shape, and the rates and latencies that they see."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING

from albireo.cli import client
from albireo.cli.client import CallFailed
from albireo.errors import ConfigError
from albireo.v1 import generation_pb2 as pb

if TYPE_CHECKING:
    from albireo.v1.generation_pb2_grpc import GenerationAsyncStub

SAMPLING = {
    # Complete, so that the model's own defaults do not change what is measured.
    "greedy": pb.SamplingParams(temperature=0.0, top_p=1.0, top_k=0),
    "sampled": pb.SamplingParams(temperature=0.8, top_p=0.95, top_k=50),
}
_NUM_WARM_UP_TOKENS = 6
# Prompts are drawn from these ids: past the special and single-byte tokens, below every vocabulary of note.
_PROMPT_IDS = range(300, 25_000)


@dataclass(frozen=True)
class Workload:
    """Requests of one shape; output lengths are fixed (ignore_eos)."""

    num_requests: int
    concurrency: int
    num_prompt_tokens: int
    num_output_tokens: int

    def clamped(self, max_model_len: int) -> "Workload":
        """The same shape, made to fit a context of ``max_model_len`` tokens."""
        if max_model_len < 2:
            raise ConfigError(f"a context of {max_model_len} tokens is too short to measure anything")
        total = self.num_prompt_tokens + self.num_output_tokens
        num_prompt_tokens = max(1, min(self.num_prompt_tokens, self.num_prompt_tokens * max_model_len // total))
        num_output_tokens = min(self.num_output_tokens, max_model_len - num_prompt_tokens)
        return replace(self, num_prompt_tokens=num_prompt_tokens, num_output_tokens=num_output_tokens)


async def run_load(
    stub: "GenerationAsyncStub",
    shape: Workload,
    vocab_size: int,
    *,
    reps: int,
    sampling: str = "greedy",
    on_done: Callable[[], object] = lambda: None,
) -> list[dict[str, float]]:
    """Puts the load on a server ``reps`` times, each time with prompts that no prefix cache has seen.

    Args:
        sampling: of `SAMPLING`.
        on_done: is called when a measured request is done.
    Returns:
        The figures of each repetition.
    """
    runs = []
    seed = time.time_ns()
    for rep in range(reps):
        prompts = _Prompts(Random(seed + rep), vocab_size)  # noqa: S311  # no secret
        load = _Load(stub, shape, SAMPLING[sampling], prompts, on_done)
        await load.warm_up()
        runs.append(await load.measure())
    return runs


class _Prompts:
    """Random prompts of one repetition."""

    def __init__(self, rng: Random, vocab_size: int) -> None:
        first = min(_PROMPT_IDS.start, vocab_size // 2)
        self._ids = range(first, max(first + 1, min(_PROMPT_IDS.stop, vocab_size)))
        self._rng = rng

    def draw(self, num_tokens: int) -> pb.TokenIds:
        return pb.TokenIds(ids=self._rng.choices(self._ids, k=num_tokens))


@dataclass(frozen=True)
class _Record:
    """When a request was sent, and when tokens of it arrived."""

    start_s: float
    arrivals_s: list[float]


class _Load:
    """One repetition of a workload."""

    def __init__(
        self,
        stub: "GenerationAsyncStub",
        shape: Workload,
        sampling: pb.SamplingParams,
        prompts: _Prompts,
        on_done: Callable[[], object],
    ) -> None:
        self._stub = stub
        self._shape = shape
        self._sampling = sampling
        self._prompts = prompts
        self._on_done = on_done

    async def warm_up(self) -> None:
        """As many short requests as will run at a time."""
        num_tokens = min(self._shape.num_output_tokens, _NUM_WARM_UP_TOKENS)
        await asyncio.gather(*[self._ask(self._request(num_tokens)) for _ in range(self._shape.concurrency)])

    async def measure(self) -> dict[str, float]:
        shape = self._shape
        requests = [self._request(shape.num_output_tokens) for _ in range(shape.num_requests)]
        gate = asyncio.Semaphore(shape.concurrency)

        async def ask(request: pb.GenerateRequest) -> _Record:
            async with gate:
                record = await self._ask(request)
            self._on_done()
            return record

        start_s = time.perf_counter()
        records = await asyncio.gather(*[ask(request) for request in requests])
        wall_s = time.perf_counter() - start_s
        first_s = [each.arrivals_s[0] - each.start_s for each in records]
        gaps_s = [
            after - before
            for each in records
            for before, after in zip(each.arrivals_s, each.arrivals_s[1:], strict=False)
        ]
        return {
            "out_tok_s": shape.num_requests * shape.num_output_tokens / wall_s,
            "total_tok_s": shape.num_requests * (shape.num_prompt_tokens + shape.num_output_tokens) / wall_s,
            "ttft_p50_ms": 1e3 * percentile(first_s, 50),
            "ttft_p99_ms": 1e3 * percentile(first_s, 99),
            "itl_p50_ms": 1e3 * percentile(gaps_s, 50),
            "itl_p99_ms": 1e3 * percentile(gaps_s, 99),
        }

    def _request(self, num_output_tokens: int) -> pb.GenerateRequest:
        sampling = pb.SamplingParams(max_tokens=num_output_tokens, ignore_eos=True, n=1)
        sampling.MergeFrom(self._sampling)
        return pb.GenerateRequest(token_ids=self._prompts.draw(self._shape.num_prompt_tokens), sampling_params=sampling)

    async def _ask(self, request: pb.GenerateRequest) -> _Record:
        record = _Record(time.perf_counter(), [])
        num_tokens = 0
        async for response in client.stream(self._stub, request):
            if response.token_ids:
                num_tokens += len(response.token_ids)
                record.arrivals_s.append(time.perf_counter())
        if num_tokens != request.sampling_params.max_tokens:
            message = f"an answer has {num_tokens} tokens, not {request.sampling_params.max_tokens}"
            raise CallFailed("INTERNAL", message)
        return record


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation; 0 when there are no values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
