"""The sampler draws what the oracle draws, from the right distribution, whatever the scheme, the number of ranks and
whatever else is in the batch."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampler_ranks import Ranks
from torch import Tensor

from albireo.arrays import pack_int32
from albireo_kernels import reference
from albireo_kernels.reference import Params
from sampling_rows import (
    KINDS,
    SCHEMES,
    Row,
    assert_logprobs,
    assert_same_logprobs,
    batch_of,
    expected_token,
    make_batch,
    margin_of,
    random_logits,
    random_row,
    random_scored,
)
from worker_svc.row_sampling import SlotSampling
from worker_svc.torch_engine.sampling import draws

# Where the oracle's own decision is as close as this, rounding may turn it.
NARROW = 1e-5
TP_SIZES = (1, 2, 4, 8)
ROUTES = {
    "greedy": Params(temperature=0.0),
    "unfiltered": Params(temperature=0.7),
    "candidates": Params(top_k=50, top_p=0.9, min_p=0.01),
    "top-p": Params(top_p=0.9),
    "min-p": Params(min_p=0.05),
    "large top-k": Params(top_k=257),
}


def draw(logits: Tensor, rows: Sequence[Row], scheme: str = "merge", tp_size: int = 1) -> list[int]:
    vocab_size = logits.shape[1]
    return Ranks(scheme, tp_size, vocab_size).sample(logits, batch_of(rows, vocab_size))[0]


def draw_many(logits: Tensor, params: Params, num_draws: int, varies: str = "seed") -> list[int]:
    """One row's logits [vocab_size] drawn from with seeds 0, 1, ..., or at positions 0, 1, ..."""
    running, fixed = np.arange(num_draws), np.zeros(num_draws, dtype=np.int64)
    sampling = SlotSampling(num_draws, len(logits))
    for slot in range(num_draws):
        seed = slot if varies == "seed" else 77
        message = Row(params, 0).message
        message.seed = seed
        sampling.set(slot, message)
    batch = make_batch(range(num_draws), sampling, fixed if varies == "seed" else running)
    return Ranks("merge", 1, len(logits)).sample(logits.expand(num_draws, -1), batch)[0]


@settings(max_examples=8)
@given(
    seed=st.integers(0, 2**31),
    vocab_size=st.sampled_from([1003, 1003, 1000, 601, 130, 37, 3, 1]),
    kind=st.sampled_from(KINDS),
)
def test_every_scheme_and_number_of_ranks_draws_what_the_oracle_draws(seed: int, vocab_size: int, kind: str) -> None:
    """Tokens and logprobs of 64 rows a time, every parameter at random, and of others that score; the same bits in all
    twelve ways."""
    check_all_ways(seed, vocab_size, kind)


@pytest.mark.soak
def test_every_scheme_and_number_of_ranks_many_times() -> None:
    for seed in range(100):
        check_all_ways(seed, (1003, 1000, 601, 130)[seed % 4], KINDS[seed % len(KINDS)])


def check_all_ways(seed: int, vocab_size: int, kind: str) -> None:
    generator = np.random.default_rng(seed)
    rows, scored = [random_row(generator, vocab_size) for _ in range(64)], random_scored(generator, 5, vocab_size)
    logits, batch = random_logits(generator, 69, vocab_size, kind), batch_of(rows, vocab_size, scored)
    tokens, logprobs = Ranks("merge", 1, vocab_size).sample(logits, batch)
    for scheme in SCHEMES:
        for tp_size in TP_SIZES:
            others = Ranks(scheme, tp_size, vocab_size).sample(logits, batch)
            assert others[0] == tokens, (scheme, tp_size)
            assert_same_logprobs(others[1], logprobs)
    for row, of_row, token in zip(rows, logits[:64], tokens[:64], strict=True):
        assert token == expected_token(of_row, row) or margin_of(of_row, row) < NARROW, row
    assert tokens[64:] == [row.token for row in scored]
    assert_logprobs(logprobs, logits, [*rows, *scored], tokens)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("route", ROUTES)
def test_one_row_alone_for_more_ranks_than_rows(route: str, scheme: str) -> None:
    logits = random_logits(np.random.default_rng(3), 1, 1003, "normal")
    for num_logprobs in (-1, 2):
        row = Row(ROUTES[route], 4, num_logprobs)
        ranks = Ranks(scheme, 8, 1003)
        tokens, logprobs = ranks.sample(logits, batch_of([row], 1003))
        assert tokens == [expected_token(logits[0], row)]
        assert_logprobs(logprobs, logits, [row], tokens)


@pytest.mark.parametrize(
    ("scheme", "routes", "num_logprobs", "expected"),
    [
        ("merge", ["greedy", "unfiltered", "candidates"], -1, ["all-gather"]),
        ("merge", ["top-p"], -1, ["all-to-all", "all-gather"]),
        ("merge", ["greedy", "min-p"], 3, ["all-gather", "all-to-all", "all-gather"]),
        ("merge", ["greedy"], 0, ["all-gather", "all-to-all", "all-gather"]),
        ("batch-sharded", [*ROUTES], 3, ["all-to-all", "all-gather"]),
        ("gather", [*ROUTES], 3, ["all-gather"]),
    ],
)
def test_as_few_collectives_as_the_rows_need(
    scheme: str, routes: list[str], num_logprobs: int, expected: list[str]
) -> None:
    logits = random_logits(np.random.default_rng(4), len(routes), 1003, "normal")
    ranks = Ranks(scheme, 4, 1003)
    ranks.sample(logits, batch_of([Row(ROUTES[route], 0, num_logprobs) for route in routes], 1003))
    assert ranks.memory.calls == expected


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_a_step_without_sampling_rows_needs_no_collective(tp_size: int) -> None:
    ranks = Ranks("merge", tp_size, 1003)
    assert ranks.sample(torch.zeros(0, 1003), batch_of([], 1003)) == ([], None)
    assert ranks.memory.calls == []


def test_a_draw_does_not_depend_on_the_rows_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, in another order, or with rows in several parts: a row's token follows from its own parameters."""
    generator = np.random.default_rng(1)
    logits = random_logits(generator, 40, 300, "normal")
    rows = [random_row(generator, 300) for _ in range(40)]

    def of_rows(indices: Sequence[int], tp_size: int = 1) -> list[int]:
        return draw(logits[list(indices)], [rows[index] for index in indices], "merge", tp_size)

    together = of_rows(range(40))
    for tp_size in (1, 4):
        assert [of_rows([row], tp_size)[0] for row in range(40)] == together
    order = generator.permutation(40).tolist()
    assert of_rows(order, 2) == [together[row] for row in order]
    monkeypatch.setitem(draws._MAX_LOGITS_AT_ONCE, "cpu", 900)
    assert of_rows(range(40)) == together


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tp_size", [1, 4])
def test_min_tokens_keeps_suppressed_ids_out_of_every_route(scheme: str, tp_size: int) -> None:
    """In rows below it, and in no others; a bias that makes them likely does not help."""
    vocab_size, forbidden = 1003, [0, 500, 1000]
    logits = torch.zeros(2 * len(ROUTES), vocab_size)
    logits[:, forbidden] = 50.0
    sampling, positions = SlotSampling(32, vocab_size), []
    for index, params in enumerate(ROUTES.values()):
        for position in (2, 3):
            message = Row(params, 0).message
            message.min_tokens, message.suppressed_token_ids = 3, pack_int32(forbidden)
            message.bias_token_ids, message.biases = pack_int32([500]), np.array([20], "<f4").tobytes()
            sampling.set(2 * index + position - 2, message)
            positions.append(position)
    batch = make_batch(range(2 * len(ROUTES)), sampling, np.array(positions))
    tokens, _ = Ranks(scheme, tp_size, vocab_size).sample(logits, batch)
    assert not set(tokens[::2]) & set(forbidden)
    assert tokens[1::2] == [500] * len(ROUTES)


@pytest.mark.parametrize("top_k", [3, 300])
def test_top_k_never_leaves_its_k_tokens_when_all_values_tie(top_k: int) -> None:
    """Those with the lowest ids can be drawn, and all of them are."""
    assert set(draw_many(torch.zeros(440), Params(top_k=top_k), 4000)) == set(range(top_k))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_broken_logits_still_give_legal_ids(scheme: str) -> None:
    """A row without values draws token 0, infinite logits win and the first of them, NaN is never drawn."""
    params = [*ROUTES.values(), Params(temperature=1e-30), Params(top_p=0.0), Params(min_p=1.0)]
    rows = [Row(of_row, 0, 2) for of_row in params]
    for value in (torch.nan, torch.inf, -torch.inf):
        assert draw(torch.full((len(rows), 300), value), rows, scheme, 4) == [0] * len(rows)
    logits = torch.full((len(rows), 300), torch.nan)
    logits[:, 200] = -5.0
    assert draw(logits, rows, scheme, 4) == [200] * len(rows)
    logits[:, [201, 290]] = torch.inf
    assert draw(logits, rows, scheme, 4) == [201] * len(rows)


def test_no_more_logprobs_than_there_are_tokens() -> None:
    """More of the likeliest tokens than there are, beside a row that wants none of them."""
    logits = random_logits(np.random.default_rng(8), 2, 5, "ties")
    rows = [Row(Params(), 0, 20), Row(Params(), 0, 0)]
    tokens, logprobs = Ranks("merge", 2, 5).sample(logits, batch_of(rows, 5))
    assert logprobs is not None
    assert logprobs.num_top.tolist() == [5, 0]
    assert_logprobs(logprobs, logits, rows, tokens)


@pytest.mark.parametrize(
    "params",
    [
        Params(),
        Params(temperature=0.5),
        Params(temperature=1.7),
        Params(top_k=12),
        Params(top_k=290),  # sorted
        Params(top_p=0.8),
        Params(min_p=0.1),
        Params(temperature=0.8, top_k=20, top_p=0.7),
        Params(temperature=1.2, top_k=20, top_p=0.95, min_p=0.05),
    ],
)
@pytest.mark.parametrize("varies", ["seed", "position"])
def test_draws_follow_the_filtered_softmax(params: Params, varies: str) -> None:
    """Chi-square of 20,000 draws against the exact distribution, over seeds and over the positions of one seed."""
    num_draws, vocab_size = 20_000, 300
    logits = 2 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(5))
    tokens = draw_many(logits, params, num_draws, varies)

    expected = torch.zeros(vocab_size, dtype=torch.float64)
    kept = reference.survivors(logits / params.temperature, params.top_k, params.top_p, params.min_p)
    expected[kept] = (logits[kept].double() / params.temperature).softmax(0) * num_draws
    counts = torch.bincount(torch.tensor(tokens), minlength=vocab_size).double()
    assert counts[expected == 0].sum() == 0
    # Tokens too rare for the approximation are counted together.
    rare = expected < 5
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    is_possible = expected > 0
    statistic = ((counts - expected)[is_possible].square() / expected[is_possible]).sum()
    degrees = int(is_possible.sum()) - 1
    assert torch.special.gammaincc(torch.tensor(degrees / 2, dtype=torch.float64), statistic / 2) > 0.001
