"""The sampler draws what the oracle draws, from the right distribution, whatever else is in the batch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from albireo.arrays import Int32Array, Int64Array
from albireo_kernels import reference
from worker_svc.row_sampling import RowSampling
from worker_svc.sharding import ModelShard
from worker_svc.torch_engine import sampler
from worker_svc.torch_engine.collectives import SingleRank


def vocab_shard(ids: range, widths: tuple[int, ...]) -> ModelShard:
    return ModelShard(0, len(widths), range(1), range(1), range(1), ids, widths)


def parameters(
    num_rows: int,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    seed: int | Sequence[int] = 0,
    suppressed: tuple[tuple[int, Int32Array], ...] = (),
) -> RowSampling:
    def row_values(value: object, dtype: type) -> np.ndarray:
        return np.broadcast_to(np.array(value, dtype=dtype), num_rows).copy()

    return RowSampling(
        row_values(temperature, np.float32),
        row_values(top_p, np.float32),
        row_values(top_k, np.int32),
        row_values(seed, np.uint64),
        suppressed,
    )


def draw(logits: Tensor, sampling: RowSampling, positions: Int64Array) -> list[int]:
    vocab_size = logits.shape[1]
    shard = vocab_shard(range(vocab_size), (vocab_size,))
    tokens: list[int] = sampler.sample(logits.clone(), sampling, positions, shard, SingleRank()).tolist()
    return tokens


def oracle(logits: Tensor, sampling: RowSampling, positions: Int64Array) -> list[int]:
    return [
        reference.sample_row(
            logits[row],
            float(sampling.temperature[row]),
            int(sampling.top_k[row]),
            float(sampling.top_p[row]),
            int(sampling.seed[row]),
            int(positions[row]),
        )
        for row in range(len(logits))
    ]


def mixed_rows(num_rows: int, generator: np.random.Generator) -> RowSampling:
    """Rows that take every route through the sampler."""
    return parameters(
        num_rows,
        temperature=generator.choice([0.0, 0.3, 1.0, 2.0], num_rows),
        top_k=generator.choice([0, 1, 2, 7, 50, 256, 257, 400, 10**9], num_rows),
        top_p=generator.choice([0.0, 0.1, 0.5, 0.9, 1.0, 1.0], num_rows),
        seed=generator.integers(0, 2**64, num_rows, dtype=np.uint64),
    )


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), spread=st.sampled_from([0.0, 0.5, 2.0, 8.0]), levels=st.sampled_from([1, 4, 1000]))
def test_mixed_batches_draw_what_the_oracle_draws(seed: int, spread: float, levels: int) -> None:
    """Few levels give many ties, among them ties at the edges of top-k and top-p, and between 0 and -0."""
    generator = np.random.default_rng(seed)
    values = (generator.normal(size=(24, 600)) * spread * levels).round() / levels
    logits = torch.from_numpy(values.astype(np.float32))
    sampling, positions = mixed_rows(24, generator), generator.integers(0, 1000, 24)
    assert draw(logits, sampling, positions) == oracle(logits, sampling, positions)


def test_a_draw_does_not_depend_on_the_rows_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, in another order, or with rows in several parts: a row's token follows from its own parameters."""
    generator = np.random.default_rng(1)
    logits = torch.from_numpy(generator.normal(size=(40, 300)).astype(np.float32))
    sampling, positions = mixed_rows(40, generator), generator.integers(0, 1000, 40)

    def of_rows(rows: Int64Array) -> list[int]:
        taken = replace(
            sampling,
            temperature=sampling.temperature[rows],
            top_p=sampling.top_p[rows],
            top_k=sampling.top_k[rows],
            seed=sampling.seed[rows],
        )
        return draw(logits[torch.from_numpy(rows)], taken, positions[rows])

    together = of_rows(np.arange(40))
    assert [of_rows(np.array([row]))[0] for row in range(40)] == together
    order = generator.permutation(40)
    assert of_rows(order) == [together[row] for row in order]
    monkeypatch.setitem(sampler._MAX_LOGITS_AT_ONCE, "cpu", 900)
    assert of_rows(np.arange(40)) == together


@dataclass
class GatheringGroup(SingleRank):
    """Stands for a group whose other shards are known."""

    whole: Tensor

    def all_gather(self, shard: Tensor, widths: Sequence[int]) -> Tensor:
        assert widths == (500, 0, 500)
        assert shard.shape[1] == 500
        return torch.cat((self.whole[:, :500], shard), dim=1)


def test_ids_and_suppressed_ids_are_global() -> None:
    """A rank that holds the ids from 500 on forbids among those only, and draws from all."""
    logits = torch.zeros(2, 1000)
    logits[:, 700], logits[:, 3] = 9.0, 8.0
    suppressed = ((1, np.array([700, 3, 4], dtype=np.int32)),)
    shard = vocab_shard(range(500, 1000), (500, 0, 500))
    tokens = sampler.sample(
        logits[:, 500:].clone(),
        parameters(2, 0.0, suppressed=suppressed),
        np.zeros(2, int),
        shard,
        GatheringGroup(logits),
    )
    assert tokens.tolist() == [700, 3]


def test_min_tokens_keeps_suppressed_ids_out_of_every_route() -> None:
    num_rows, forbidden = 400, np.array([0, 2], dtype=np.int32)
    logits = torch.tensor([5.0, 1.0, 4.0, 1.0]).expand(num_rows, 4)
    suppressed = tuple((row, forbidden) for row in range(0, num_rows, 2))
    for temperature, top_k, top_p in ((0.0, 0, 1.0), (1.0, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.9), (1.0, 3, 0.9)):
        sampling = parameters(num_rows, temperature, top_k, top_p, np.arange(num_rows), suppressed)
        tokens = draw(logits, sampling, np.zeros(num_rows, dtype=np.int64))
        assert set(tokens[::2]) <= {1, 3}
        assert 0 in tokens[1::2]


@pytest.mark.parametrize("top_k", [3, 300])
def test_top_k_never_leaves_its_k_tokens_when_all_values_tie(top_k: int) -> None:
    """Those with the lowest ids can be drawn, and all of them are."""
    sampling = parameters(4000, 1.0, top_k, 1.0, np.arange(4000))
    tokens = draw(torch.zeros(4000, 440), sampling, np.zeros(4000, dtype=np.int64))
    assert set(tokens) == set(range(top_k))


def test_broken_logits_still_give_legal_ids() -> None:
    sampling = parameters(5, [0.0, 1.0, 1.0, 1.0, 1e-30], [0, 0, 5, 0, 0], [1.0, 1.0, 0.9, 0.9, 0.9])
    for value in (torch.nan, torch.inf, -torch.inf):
        tokens = draw(torch.full((5, 300), value), sampling, np.zeros(5, dtype=np.int64))
        assert all(0 <= token < 300 for token in tokens)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 0, 1.0),
        (0.5, 0, 1.0),
        (1.7, 0, 1.0),
        (1.0, 12, 1.0),
        (1.0, 290, 1.0),  # sorted
        (1.0, 0, 0.8),
        (0.8, 20, 0.7),
    ],
)
@pytest.mark.parametrize("varies", ["seed", "position"])
def test_draws_follow_the_filtered_softmax(temperature: float, top_k: int, top_p: float, varies: str) -> None:
    """Chi-square of 20,000 draws against the exact distribution, over seeds and over the positions of one seed."""
    num_draws, vocab_size = 20_000, 300
    logits = 2 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(5))
    running, zeros = np.arange(num_draws), np.zeros(num_draws, dtype=np.int64)
    seeds, positions = (running, zeros) if varies == "seed" else (zeros + 77, running)
    sampling = parameters(num_draws, temperature, top_k, top_p, seeds)
    tokens = draw(logits.expand(num_draws, vocab_size), sampling, positions)

    expected = torch.zeros(vocab_size, dtype=torch.float64)
    kept = reference.survivors(logits / temperature, top_k, top_p)
    expected[kept] = (logits[kept].double() / temperature).softmax(0) * num_draws
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
