"""The compiled sampler draws what the oracle draws, by every route, and alike on all threads and ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sampling_rows
from albireo_kernels import reference
from albireo_kernels.cpu import (
    MAX_TOP,
    Edits,
    Library,
    Logprobs,
    Op,
    Program,
    RankSampling,
    Sampling,
    SharedSampling,
    SlotTokens,
    StepData,
    allocate,
    sampling_ops,
)
from cpu_kernels import DEVICES, Array, run, step_of, tensor
from sampling_rows import Row, expected_token, margin_of

# Where the oracle's own decision is as close as this, rounding may turn it.
NARROW = 1e-5
SPARE = 3  # logits between rows


@dataclass(frozen=True)
class Request:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0
    suppressed: tuple[int, ...] = ()

    @property
    def row(self) -> Row:
        biases = dict.fromkeys(self.suppressed, -np.inf)
        params = reference.Params(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
            biases=biases,
        )
        return Row(params, self.position)


def keys_of(requests: Sequence[Request]) -> tuple[Array, Array]:
    seeds = np.array([request.seed for request in requests], dtype=np.uint64)
    return reference.noise_keys(seeds, np.array([request.position for request in requests]))


def biases_of(requests: Sequence[Request]) -> Edits:
    count = len(requests)
    ids = [token for request in requests for token in request.suppressed]
    ones, zeros = np.ones(count, dtype=np.float32), np.zeros(count, dtype=np.float32)
    return Edits(
        bias_starts=np.cumsum([0, *(len(request.suppressed) for request in requests)]),
        bias_ids=np.array(ids, dtype=np.int32),
        biases=np.full(len(ids), -np.inf, dtype=np.float32),
        allowed=np.zeros(count, dtype=np.uint64),
        word_starts=np.zeros(count + 1, dtype=np.int64),
        word_token_starts=np.zeros(1, dtype=np.int64),
        word_tokens=np.zeros(0, dtype=np.int32),
        repetition_penalty=ones,
        presence_penalty=zeros,
        frequency_penalty=zeros,
        has_history=np.zeros(count, dtype=np.bool_),
    )


def sample_step(requests: Sequence[Request], logprobs: Logprobs | None = None) -> tuple[StepData, Array]:
    """A step, and the last tokens of its slots, which lie in reverse."""
    count = len(requests)
    k0, k1 = keys_of(requests)
    last_tokens = np.full(count, -1, dtype=np.int32)
    step = step_of(
        [1] * count,
        sampled=range(count),
        sample_slots=np.arange(count, dtype=np.int32)[::-1].copy(),
        sampling=Sampling(
            temperature=np.array([request.temperature for request in requests], dtype=np.float32),
            top_p=np.array([request.top_p for request in requests], dtype=np.float32),
            min_p=np.array([request.min_p for request in requests], dtype=np.float32),
            top_k=np.array([request.top_k for request in requests], dtype=np.int32),
            noise_keys=k0.astype(np.uint64) | k1.astype(np.uint64) << np.uint64(32),
            edits=biases_of(requests) if any(request.suppressed for request in requests) else None,
            logprobs=logprobs,
        ),
        last_tokens=last_tokens,
    )
    return step, last_tokens


def shared_logits(logits: Array) -> Array:
    buffer = allocate((len(logits), logits.shape[1] + SPARE), np.float32)
    buffer[...] = np.nan
    buffer[:, : logits.shape[1]] = logits
    return buffer[:, : logits.shape[1]]


def program(library: Library, num_threads: int, logits: Array) -> list[Op]:
    """Samples on a rank alone."""
    num_rows, vocab_size = logits.shape
    scratch = allocate((num_threads, library.sample_scratch_bytes(vocab_size)), np.uint8)
    own = RankSampling(0, range(vocab_size), SlotTokens(num_rows, 1), scratch)
    return sampling_ops("merge", SharedSampling.alone(logits), own)


def draw(library: Library, num_threads: int, logits: Array, requests: Sequence[Request]) -> list[int]:
    step, last_tokens = sample_step(requests)
    run(library, num_threads, step, *program(library, num_threads, shared_logits(logits)))
    assert step.tokens.tolist() == last_tokens[::-1].tolist()
    return list(step.tokens.tolist())


def assert_as_oracle(library: Library, num_threads: int, logits: Array, requests: Sequence[Request]) -> None:
    tokens = draw(library, num_threads, logits, requests)
    for token, of_row, request in zip(tokens, logits, requests, strict=True):
        is_expected = token == expected_token(tensor(of_row), request.row)
        assert is_expected or margin_of(tensor(of_row), request.row) < NARROW, request


def random_logits(rng: np.random.Generator, num_rows: int, vocab_size: int, kind: str) -> Array:
    return sampling_rows.random_logits(rng, num_rows, vocab_size, kind).numpy()


KINDS = ["normal", "ties", "equal", "signed zeros", "few", "ascending", "one chunk"]
vocab_sizes = st.one_of(st.integers(1, 200), st.sampled_from([1003, 4096, 20_011]))
requests_strategy = st.builds(
    Request,
    temperature=st.one_of(st.just(1.0), st.sampled_from([0.0, 1e-4, 0.01, 100.0]), st.floats(0.1, 5.0)),
    top_k=st.one_of(st.just(0), st.integers(1, 40), st.sampled_from([150, 1000, 4095, 4096, 30_000])),
    top_p=st.one_of(st.just(1.0), st.sampled_from([0.0, 0.001, 0.95, 0.9999]), st.floats(0.01, 1.0)),
    min_p=st.one_of(st.just(0.0), st.sampled_from([1.0, 1e-6]), st.floats(0.001, 0.5)),
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**31),
)


@settings(max_examples=30, deadline=None)
@given(
    vocab_size=vocab_sizes,
    kind=st.sampled_from(KINDS),
    requests=st.lists(requests_strategy, min_size=1, max_size=6),
    num_suppressed=st.integers(0, 10),
    num_threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 2**31),
)
def test_rows_are_drawn_as_the_oracle_draws_them(
    library: Library,
    vocab_size: int,
    kind: str,
    requests: list[Request],
    num_suppressed: int,
    num_threads: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    logits = random_logits(rng, len(requests), vocab_size, kind)
    suppressed = [tuple(rng.integers(0, vocab_size, num_suppressed).tolist()) for _ in requests]
    requests = [replace(request, suppressed=ids) for request, ids in zip(requests, suppressed, strict=True)]
    assert_as_oracle(library, num_threads, logits, requests)


@pytest.mark.parametrize("kind", KINDS)
def test_large_vocabularies_by_every_route(library: Library, num_threads: int, kind: str) -> None:
    routes = [
        Request(temperature=0),
        Request(),
        Request(top_k=50),
        Request(top_k=50, top_p=0.9, temperature=0.7),
        Request(top_k=1000, top_p=0.95),
        Request(top_p=0.95),
        Request(top_p=0.999, temperature=20),
        Request(top_k=5000),
        Request(top_k=151_935, top_p=0.5),
        Request(min_p=0.02),
        Request(top_k=200, min_p=0.01, top_p=0.9),
    ]
    requests = [replace(request, seed=seed, suppressed=(0, 9)) for seed, request in enumerate(routes)]
    logits = random_logits(np.random.default_rng(7), len(requests), 151_936, kind)
    assert_as_oracle(library, num_threads, logits, requests)


FILTERS = [Request(temperature=0), Request(), Request(top_k=2), Request(top_k=80), Request(top_p=0.9)]


@pytest.mark.parametrize("fill", [np.nan, -np.inf, np.inf])
@pytest.mark.parametrize("vocab_size", [1, 70, 1000])
def test_rows_of_nothing_but_one_broken_value_give_the_first_id(library: Library, fill: float, vocab_size: int) -> None:
    logits = np.full((len(FILTERS), vocab_size), fill, dtype=np.float32)
    assert draw(library, 1, logits, FILTERS) == [0] * len(FILTERS)


@pytest.mark.parametrize("vocab_size", [70, 1000])
def test_nan_is_never_drawn(library: Library, vocab_size: int) -> None:
    logits = np.full((len(FILTERS), vocab_size), np.nan, dtype=np.float32)
    logits[:, 66] = -5.0
    assert draw(library, 1, logits, FILTERS) == [66] * len(FILTERS)


@pytest.mark.parametrize("vocab_size", [70, 1000])
def test_infinite_logits_win_and_the_first_of_them(library: Library, vocab_size: int) -> None:
    logits = np.zeros((len(FILTERS), vocab_size), dtype=np.float32)
    logits[:, 65:67] = np.inf
    assert draw(library, 1, logits, FILTERS) == [65] * len(FILTERS)


def test_suppressed_ids_are_not_drawn_and_all_may_be(library: Library) -> None:
    everything = tuple(range(70))
    requests = [replace(request, suppressed=everything[:-1]) for request in FILTERS]
    assert draw(library, 2, np.zeros((len(requests), 70), dtype=np.float32), requests) == [69] * len(requests)
    requests = [replace(request, suppressed=everything) for request in FILTERS]
    assert draw(library, 2, np.zeros((len(requests), 70), dtype=np.float32), requests) == [0] * len(requests)


def test_values_that_become_equal_by_the_temperature_are_ordered_by_id(library: Library) -> None:
    """Different logits whose quotients are the same float32: top-k takes the lower ids, and not the higher logits."""
    temperature = 1.5
    ascending = np.float32(1.9) + np.arange(256, dtype=np.float32) * np.float32(2.0**-23)
    assert len(np.unique(ascending / np.float32(temperature))) < len(ascending)
    logits = np.full((40, 1000), -50, dtype=np.float32)
    logits[:, 300:556] = ascending
    for top_k in (2, 3, 100):
        requests = [Request(temperature, top_k, seed=seed) for seed in range(len(logits))]
        assert_as_oracle(library, 1, logits, requests)


@pytest.mark.parametrize("vocab_size", [70, 1000, 9000])
def test_the_last_survivor_among_equal_logits_is_exact(native: Library, vocab_size: int) -> None:
    """Equal tokens are drawn equally often, so that one survivor more or less shows."""
    rng = np.random.default_rng(vocab_size)
    for is_signed in (False, True):
        logits = np.zeros((300, vocab_size), dtype=np.float32)
        if is_signed:
            logits = np.copysign(logits, rng.standard_normal(logits.shape)).astype(np.float32)
        most = min(vocab_size, 12) if is_signed else vocab_size
        requests = [
            Request(top_k=int(rng.integers(2, most)), top_p=float(rng.choice([1, 0.61, 0.93])), seed=seed)
            for seed in range(len(logits))
        ]
        assert_as_oracle(native, 2, logits, requests)


def test_noise_decides_among_equal_logits_as_often_as_it_should(native: Library) -> None:
    """Four survivors of equal mass: each about a quarter of 4000 rows."""
    logits = np.full((4000, 100), -100.0, dtype=np.float32)
    logits[:, [3, 50, 64, 99]] = 1.0
    for request in (Request(), Request(top_k=4), Request(top_p=0.9)):
        tokens = draw(native, 2, logits, [replace(request, seed=seed) for seed in range(len(logits))])
        counts = np.bincount(tokens, minlength=100)
        assert counts[[3, 50, 64, 99]].sum() == len(logits)
        assert counts[[3, 50, 64, 99]].min() > 880  # 1000, and less than 5 standard deviations below


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_are_those_of_the_model(library: Library, num_threads: int, kind: str) -> None:
    """Of the logits before anything is done to them, whatever is suppressed or filtered."""
    rng = np.random.default_rng(11)
    for vocab_size in (1, 70, 5003):
        logits = random_logits(rng, 5, vocab_size, kind)
        requests = [Request(top_k=(0, 3)[row % 2], seed=row, suppressed=(0,)[: row % 2]) for row in range(5)]
        told = Logprobs(np.array([-1, 0, 1, 5, MAX_TOP], dtype=np.int32))
        step, _ = sample_step(requests, told)
        run(library, num_threads, step, *program(library, num_threads, shared_logits(logits)))
        for row in range(1, 5):
            num_top = min(int(told.num_top[row]), vocab_size)
            expected = reference.token_logprobs(tensor(logits[row]), int(step.tokens[row]), num_top)
            np.testing.assert_allclose(told.logprobs[row], expected.logprob, rtol=1e-6, atol=1e-5)
            assert told.ranks[row] == expected.rank
            top = slice(0, len([x for x in expected.top_logprobs if x > -np.inf]))
            assert told.top_ids[row, :num_top][top].tolist() == expected.top_ids[top]
            np.testing.assert_allclose(told.top_logprobs[row, :num_top][top], expected.top_logprobs[top], atol=1e-5)


def test_no_samples_are_no_work(native: Library) -> None:
    step, _ = sample_step([])
    DEVICES.get(native, 2).run(Program(program(native, 2, allocate((1, 100), np.float32))), step)
