"""The sampling oracle: its integers, its noise, what it does to logits, and which tokens survive the filters."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from albireo_kernels import reference
from albireo_kernels.reference import Params

MASK32, MASK64 = 2**32 - 1, 2**64 - 1


def fmix32(h: int) -> int:
    h = (h ^ h >> 16) * 0x85EBCA6B & MASK32
    h = (h ^ h >> 13) * 0xC2B2AE35 & MASK32
    return h ^ h >> 16


def splitmix64(x: int) -> int:
    x = x + 0x9E3779B97F4A7C15 & MASK64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK64
    return x ^ x >> 31


def keys_of(seed: int, position: int) -> tuple[int, int]:
    key = splitmix64(splitmix64(seed) + position & MASK64)
    return key & MASK32, key >> 32


def gumbel(token_id: int, k0: int, k1: int) -> float:
    """In Python's integers and float64; the fraction is rounded to float32 where the definition says so."""
    h = fmix32(fmix32(token_id * 0x9E3779B9 & MASK32 ^ k0) + k1 & MASK32)
    v = min(float((np.float32(h) + np.float32(0.5)) * np.float32(2.0**-32)), 1 - 2.0**-24)
    return -math.log(-math.log1p(-v))


def test_published_values_of_the_two_mixers() -> None:
    """splitmix64 seeded with 0 first gives e220a8397b1dcdaf; MurmurHash3's finaliser maps 0 to 0, 1 to 514e28b7."""
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert reference.fmix32(torch.tensor([0, 1])).tolist() == [0, 0x514E28B7]


@given(st.integers(0, MASK32))
def test_fmix32_in_signed_64_bit_tensors_is_the_unsigned_one(h: int) -> None:
    assert reference.fmix32(torch.tensor([h])).item() == fmix32(h)


@given(st.integers(0, MASK64), st.integers(0, 2**40))
def test_noise_keys_follow_the_definition(seed: int, position: int) -> None:
    k0, k1 = reference.noise_keys(np.array([seed], dtype=np.uint64), np.array([position]))
    assert (k0.item(), k1.item()) == keys_of(seed, position)


@given(st.integers(0, MASK64), st.integers(0, 2**31), st.lists(st.integers(0, 2**18), min_size=1, max_size=40))
def test_noise_follows_the_definition(seed: int, position: int, ids: list[int]) -> None:
    k0, k1 = keys_of(seed, position)
    actual = reference.gumbel_noise(torch.tensor(ids), torch.tensor([k0]), torch.tensor([k1]))
    expected = torch.tensor([[gumbel(token_id, k0, k1) for token_id in ids]])
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-7)


def test_noise_is_pinned() -> None:
    """A seed's output is a promise to clients; a change of these values is a change of the interface."""
    k0, k1 = reference.noise_keys(np.array([42], dtype=np.uint64), np.array([7]))
    assert (k0.item(), k1.item()) == (0x89F83DF6, 0xFE2F1081)
    noise = reference.gumbel_noise(torch.tensor([0, 1, 151935]), torch.from_numpy(k0), torch.from_numpy(k1))
    torch.testing.assert_close(noise, torch.tensor([[0.1784976, -1.0372121, -0.1556056]]), rtol=1e-6, atol=1e-6)


def test_noise_is_standard_gumbel_and_independent_of_id_seed_and_position() -> None:
    """Mean 0.5772, variance pi^2 / 6, over ids of one row, over positions of one seed, and over seeds."""
    count = 200_000
    one = np.zeros(1, dtype=np.int64)
    over_ids = (np.array([9], dtype=np.uint64), one), torch.arange(count)
    over_positions = (np.full(count, 9, dtype=np.uint64), np.arange(count)), torch.tensor([5])
    over_seeds = (np.arange(count, dtype=np.uint64), np.zeros(count, dtype=np.int64)), torch.tensor([5])
    for (seeds, positions), ids in (over_ids, over_positions, over_seeds):
        k0, k1 = (torch.from_numpy(key) for key in reference.noise_keys(seeds, positions))
        noise = reference.gumbel_noise(ids, k0, k1).flatten().double()
        assert noise.mean().item() == pytest.approx(0.57722, abs=0.015)
        assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.03)
        neighbours = torch.corrcoef(torch.stack((noise[:-1], noise[1:])))[0, 1].item()
        assert abs(neighbours) < 0.01


def test_extreme_hashes_give_finite_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("albireo_kernels.reference.sampling.fmix32", lambda h: h)
    zero = torch.tensor([0])
    lowest = reference.gumbel_noise(zero, zero, zero)
    highest = reference.gumbel_noise(zero, zero, torch.tensor([MASK32]))
    assert lowest.item() == pytest.approx(-math.log(2.0**-33), rel=1e-6)
    assert highest.item() == pytest.approx(-math.log(24 * math.log(2)), rel=1e-6)


def test_top_k_leaves_exactly_k_and_breaks_ties_by_id() -> None:
    scaled = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0, 0.0])
    assert reference.survivors(scaled, 4, 1.0).tolist() == [1, 3, 2, 4]
    assert reference.survivors(scaled, 0, 1.0).tolist() == [1, 3, 2, 4, 5, 0, 6]


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [
        (0, 0.49, [2]),  # 0.5 reaches it alone
        (0, 0.51, [2, 0]),
        (0, 0.76, [2, 0, 1]),
        (0, 0.0, [2]),  # at least one
        (2, 0.6, [2]),  # of the two left, the first has 2/3
        (2, 0.7, [2, 0]),
    ],
)
def test_top_p_keeps_the_shortest_prefix_that_reaches_p(top_k: int, top_p: float, expected: list[int]) -> None:
    scaled = torch.tensor([0.25, 0.15, 0.5, 0.1]).log()
    assert reference.survivors(scaled, top_k, top_p).tolist() == expected


def test_greedy_takes_the_first_of_equal_logits() -> None:
    logits = torch.tensor([0.0, 5.0, 5.0, 1.0])
    assert reference.sample_row(logits, Params(temperature=0.0, seed=1), position=0) == 1
    assert reference.sample_row(logits, Params(top_k=1, seed=1), position=0) == 1


@pytest.mark.parametrize(
    "params", [Params(temperature=0.0), Params(), Params(top_k=2), Params(top_p=0.5), Params(min_p=0.1)]
)
def test_nan_is_no_value(params: Params) -> None:
    """It is never drawn beside others, and a row of nothing else gives token 0."""
    nan = torch.nan
    assert reference.sample_row(torch.tensor([nan, nan, -7.0, nan]), params, 0) == 2
    assert reference.sample_row(torch.tensor([nan, -torch.inf, nan]), params, 0) == 0


@pytest.mark.parametrize(
    ("min_p", "expected"),
    [
        (0.0, [2, 0, 1, 3]),
        (0.19, [2, 0, 1, 3]),
        (0.21, [2, 0, 1]),
        (0.31, [2, 0]),
        (0.51, [2]),
        (1.0, [2]),
    ],
)
def test_min_p_is_a_share_of_the_largest_probability(min_p: float, expected: list[int]) -> None:
    scaled = torch.tensor([0.25, 0.15, 0.5, 0.1]).log()
    assert reference.survivors(scaled, 0, 1.0, min_p).tolist() == expected


def test_min_p_of_one_keeps_all_that_tie_with_the_largest() -> None:
    assert reference.survivors(torch.tensor([0.0, -0.0, -1.0, 0.0]), 0, 1.0, 1.0).tolist() == [0, 1, 3]


def test_filters_work_on_what_the_one_before_left() -> None:
    """Of 0.5, 0.25, 0.15, 0.1 min-p leaves three, of which the first has 5/9; top-k two, of which it has 2/3."""
    scaled = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    assert reference.survivors(scaled, 0, 0.54, 0.25).tolist() == [0]
    assert reference.survivors(scaled, 0, 0.57, 0.25).tolist() == [0, 1]
    assert reference.survivors(scaled, 2, 0.66, 0.25).tolist() == [0]
    assert reference.survivors(scaled, 2, 0.67, 0.25).tolist() == [0, 1]


def test_edits_in_their_order() -> None:
    """Worked out by hand: a bias can make a logit positive before the repetition penalty divides it."""
    logits = torch.tensor([1.0, -1.0, 2.0, -2.0, 0.5, 3.0])
    params = Params(
        biases={1: 3.0, 5: -torch.inf},
        repetition_penalty=2.0,
        frequency_penalty=0.25,
        presence_penalty=0.5,
        prompt=[1, 2],
        output=[3, 0, 3],
    )
    expected = [
        1 / 2 - 0.25 - 0.5,
        (-1.0 + 3) / 2,
        2.0 / 2,
        -2 * 2 - 2 * 0.25 - 0.5,
        0.5,
        -torch.inf,
    ]
    before = logits.clone()
    assert reference.edit(logits, params).tolist() == expected
    assert logits.equal(before)


def test_penalties_of_the_output_leave_the_prompt_alone() -> None:
    params = Params(frequency_penalty=1.0, presence_penalty=1.0, prompt=[0, 0], output=[1])
    assert reference.edit(torch.zeros(3), params).tolist() == [0.0, -2.0, 0.0]


def test_allowed_ids_win_over_biases() -> None:
    edited = reference.edit(torch.zeros(4), Params(biases={0: 9.0, 2: 1.0}, allowed=[1, 2]))
    assert edited.tolist() == [-torch.inf, 0.0, 1.0, -torch.inf]


@pytest.mark.parametrize(
    ("output", "forbidden"),
    [
        ([], [3]),
        ([5], [3, 6]),
        ([5, 6], [3, 7]),  # only the last tokens count
        ([6, 5], [3, 6]),
        ([5, 6, 7], [3]),
    ],
)
def test_bad_words_in_the_output(output: list[int], forbidden: list[int]) -> None:
    """The prompt begins none."""
    params = Params(bad_words=[[3], [5, 6], [5, 6, 7]], prompt=[5], output=output)
    edited = reference.edit(torch.zeros(8), params)
    assert edited.isneginf().nonzero().flatten().tolist() == forbidden


def test_logprobs_ranks_and_the_likeliest_tokens() -> None:
    logits = torch.tensor([0.2, 0.4, 0.2, 0.1, 0.1]).log() + 7
    found = reference.token_logprobs(logits, 2, 3)
    assert found.logprob == pytest.approx(math.log(0.2), abs=1e-6)
    assert found.rank == 3  # of equal ones the lower id comes first
    assert found.top_ids == [1, 0, 2]
    assert found.top_logprobs == pytest.approx([math.log(p) for p in (0.4, 0.2, 0.2)], abs=1e-6)
    assert reference.token_logprobs(logits, 1, 0) == (pytest.approx(math.log(0.4), abs=1e-6), 1, [], [])


def test_logprobs_of_tokens_without_a_value() -> None:
    found = reference.token_logprobs(torch.tensor([0.0, torch.nan, -torch.inf]), 1, 3)
    assert found == (-torch.inf, 2, [0, 1, 2], [0.0, -torch.inf, -torch.inf])


class TestAgainstTransformers:
    """Processors of transformers with the same meaning; logits without ties, since theirs break them otherwise."""

    logits = 3 * torch.randn(200, generator=torch.Generator().manual_seed(2))

    def processed(self, processor: LogitsProcessor, tokens: Sequence[int] = ()) -> torch.Tensor:
        scores = processor(torch.tensor([list(tokens)], dtype=torch.int64), self.logits[None].clone())
        assert isinstance(scores, torch.Tensor)
        return scores[0]

    def survivors(self, processor: LogitsProcessor) -> list[int]:
        kept = (~self.processed(processor).isneginf()).nonzero().flatten()
        return sorted(kept.tolist(), key=lambda token: -float(self.logits[token]))

    @pytest.mark.parametrize("penalty", [0.5, 1.3])
    def test_repetition_penalty(self, penalty: float) -> None:
        prompt, output = [3, 5, 5, 90], [7, 3, 199]
        edited = reference.edit(self.logits, Params(repetition_penalty=penalty, prompt=prompt, output=output))
        expected = self.processed(RepetitionPenaltyLogitsProcessor(penalty), prompt + output)
        torch.testing.assert_close(edited, expected, rtol=1e-6, atol=0)

    def test_bad_words(self) -> None:
        words, output = [[9], [4, 5], [1, 4, 6], [2, 4, 7]], [8, 1, 4]
        edited = reference.edit(self.logits, Params(bad_words=words, output=output))
        assert edited.equal(self.processed(NoBadWordsLogitsProcessor(words), output))

    def test_biases(self) -> None:
        edited = reference.edit(self.logits, Params(biases={4: -2.5, 17: 100.0}))
        assert edited.equal(self.processed(SequenceBiasLogitsProcessor([[[4], -2.5], [[17], 100.0]]), [1]))

    @pytest.mark.parametrize("min_p", [0.001, 0.05, 0.7, 1.0])
    def test_min_p(self, min_p: float) -> None:
        assert reference.survivors(self.logits, 0, 1.0, min_p).tolist() == self.survivors(MinPLogitsWarper(min_p))

    @pytest.mark.parametrize("top_k", [1, 7, 199, 200, 1000])
    def test_top_k(self, top_k: int) -> None:
        assert reference.survivors(self.logits, top_k, 1.0).tolist() == self.survivors(TopKLogitsWarper(top_k))

    @pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999])
    def test_top_p(self, top_p: float) -> None:
        assert reference.survivors(self.logits, 0, top_p).tolist() == self.survivors(TopPLogitsWarper(top_p))
