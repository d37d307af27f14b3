"""The compiled sampler draws what the oracle draws, by every route, and alike on all threads and ranks."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo_kernels import reference
from albireo_kernels.cpu import UNPINNED, Device, GroupMemory, Library, Program, StepData, allocate, sample
from albireo_kernels.reference.sampling import MIN_TEMPERATURE
from cpu_kernels import DEVICES, Array, run, step_of, tensor

# Where the oracle's own decision is as close as this, rounding may turn it.
NARROW = 1e-5
SPARE = 3  # logits between rows


@dataclass(frozen=True)
class Request:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    position: int = 0
    suppressed: tuple[int, ...] = ()


def keys_of(requests: Sequence[Request]) -> tuple[Array, Array]:
    seeds = np.array([request.seed for request in requests], dtype=np.uint64)
    return reference.noise_keys(seeds, np.array([request.position for request in requests]))


def sample_step(requests: Sequence[Request]) -> tuple[StepData, Array]:
    """A step, and the last tokens of its slots, which lie in reverse."""
    count = len(requests)
    k0, k1 = keys_of(requests)
    last_tokens = np.full(count, -1, dtype=np.int32)
    step = step_of(
        [1] * count,
        sampled=range(count),
        sample_slots=np.arange(count, dtype=np.int32)[::-1].copy(),
        temperature=np.array([request.temperature for request in requests], dtype=np.float32),
        top_k=np.array([request.top_k for request in requests], dtype=np.int32),
        top_p=np.array([request.top_p for request in requests], dtype=np.float32),
        noise_keys=k0.astype(np.uint64) | k1.astype(np.uint64) << np.uint64(32),
        suppressed_starts=np.cumsum([0, *(len(request.suppressed) for request in requests)]),
        suppressed_ids=np.array([token for request in requests for token in request.suppressed], dtype=np.int32),
        last_tokens=last_tokens,
    )
    return step, last_tokens


def shared_logits(logits: Array) -> Array:
    buffer = allocate((len(logits), logits.shape[1] + SPARE), np.float32)
    buffer[...] = np.nan
    buffer[:, : logits.shape[1]] = logits
    return buffer[:, : logits.shape[1]]


def scratch_of(library: Library, num_threads: int, vocab_size: int) -> Array:
    return allocate((num_threads, library.sample_scratch_bytes(vocab_size)), np.uint8)


def draw(library: Library, num_threads: int, logits: Array, requests: Sequence[Request]) -> list[int]:
    step, last_tokens = sample_step(requests)
    shared_tokens = np.full(len(requests), -1, dtype=np.int32)
    scratch = scratch_of(library, num_threads, logits.shape[1])
    run(library, num_threads, step, sample(shared_logits(logits), shared_tokens, scratch))
    assert step.tokens.tolist() == shared_tokens.tolist() == last_tokens[::-1].tolist()
    return list(step.tokens.tolist())


def oracle(logits: Array, request: Request) -> tuple[int, float]:
    """The token, and how much the decision could shift without another outcome."""
    row, temperature = tensor(logits.copy()), float(np.float32(request.temperature))
    row[list(request.suppressed)] = -torch.inf
    top_k, top_p = request.top_k, float(np.float32(request.top_p))
    token = reference.sample_row(row, temperature, top_k, top_p, request.seed, request.position)
    if temperature < MIN_TEMPERATURE or top_k == 1:
        return token, np.inf
    scaled = row / temperature
    ids = reference.survivors(scaled, top_k, top_p)
    k0, k1 = (torch.from_numpy(key) for key in keys_of([request]))
    scores = (scaled[ids] + reference.gumbel_noise(ids, k0, k1)[0]).double().topk(min(2, len(ids))).values
    margin = float(scores[0] - scores[-1]) if len(ids) > 1 else np.inf
    if top_p < 1:
        weights = scaled[reference.survivors(scaled, top_k, 1.0)].double().softmax(dim=0)
        margin = min(margin, float((weights.cumsum(dim=0) - weights - top_p).abs().min()))
    return token, margin


def assert_as_oracle(library: Library, num_threads: int, logits: Array, requests: Sequence[Request]) -> None:
    tokens = draw(library, num_threads, logits, requests)
    for row, request in enumerate(requests):
        expected, margin = oracle(logits[row], request)
        assert tokens[row] == expected or margin < NARROW, request


def random_logits(rng: np.random.Generator, num_rows: int, vocab_size: int, kind: str) -> Array:
    logits = rng.standard_normal((num_rows, vocab_size)) * 3
    if kind == "ties":
        logits = np.round(logits)
    elif kind == "equal":
        logits = np.zeros_like(logits)
    elif kind == "signed zeros":
        logits = np.where(logits > 8, 1, np.copysign(0, logits))
    elif kind == "few":
        logits[rng.random(logits.shape) < 0.97] = -np.inf
    elif kind == "ascending":
        logits.sort(axis=1)
    elif kind == "one chunk":
        logits[:, :64] += 50
    return logits.astype(np.float32)


KINDS = ["normal", "ties", "equal", "signed zeros", "few", "ascending", "one chunk"]
vocab_sizes = st.one_of(st.integers(1, 200), st.sampled_from([1003, 4096, 20_011]))
requests_strategy = st.builds(
    Request,
    temperature=st.one_of(st.just(1.0), st.sampled_from([0.0, 1e-4, 0.01, 100.0]), st.floats(0.1, 5.0)),
    top_k=st.one_of(st.just(0), st.integers(1, 40), st.sampled_from([150, 1000, 4095, 4096, 30_000])),
    top_p=st.one_of(st.just(1.0), st.sampled_from([0.0, 0.001, 0.95, 0.9999]), st.floats(0.01, 1.0)),
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**31),
)


@settings(max_examples=60, deadline=None)
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


def test_ranks_share_the_rows_and_agree(native: Library) -> None:
    num_ranks, num_threads, vocab_size = 3, 2, 5000
    memory = GroupMemory.create(native.group_bytes())
    rng = np.random.default_rng(3)
    shared_tokens = np.full(64, -1, dtype=np.int32)
    devices = [Device(native, [UNPINNED] * num_threads) for _ in range(num_ranks)]
    try:
        with ThreadPoolExecutor(num_ranks) as pool:
            list(pool.map(lambda rank: devices[rank].join(memory.array, rank, num_ranks, 30.0), range(num_ranks)))
        scratches = [scratch_of(native, num_threads, vocab_size) for _ in devices]
        buffer = allocate((64, vocab_size), np.float32)
        for count in (1, 2, 3, 7, 64):
            logits = random_logits(rng, count, vocab_size, "normal")
            requests = [Request(top_k=(0, 1, 20)[row % 3], top_p=0.9, seed=row) for row in range(count)]
            buffer[:count] = logits
            steps = [sample_step(requests) for _ in devices]
            for device, scratch, (step, _) in zip(devices, scratches, steps, strict=True):
                op = sample(buffer[:count], shared_tokens[:count], scratch)
                device.submit(Program(()), Program((op,)), step)
            for device, (step, _) in zip(devices, steps, strict=True):
                device.wait(step, 30.0)
            alone = draw(native, 1, logits, requests)
            for step, last_tokens in steps:
                assert step.tokens.tolist() == alone == last_tokens[::-1].tolist()
    finally:
        for device in devices:
            device.close()


def test_no_samples_are_no_work(native: Library) -> None:
    step, _ = sample_step([])
    scratch = scratch_of(native, 2, 100)
    DEVICES.get(native, 2).run(Program((sample(allocate((1, 100), np.float32), np.zeros(1, np.int32), scratch),)), step)
