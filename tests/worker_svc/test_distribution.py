"""Sampling draws from the distribution that parameters describe: chi-square tests against transformers' processors.

Seeds are fixed, so a result is the same every time. Each case is drawn with consecutive seeds at one position and with
one seed at consecutive positions, in batches of its own and in batches with rows of other kinds.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from distribution_engines import NUM_ROWS, Compiled, Eager, Engine, template

from albireo_kernels import cpu, reference
from albireo_kernels.reference import Params
from cpu_kernels import Array
from distribution import CASES, Case, Fit, fit_of, probabilities
from sampling_rows import as_float32

QUICK, FULL = 20_000, 100_000
QUICK_MERGE = 4_000  # bits are those of one rank, as test_sampling shows
# Torch takes 60 us and more for a draw: without patience it shows one case of each of its routes.
QUICK_EAGER, FULL_EAGER = 2_000, 20_000
EAGER_CASES = ("temperature 1", "top-k", "top-p", "all filters", "everything")

Way = tuple[str, str, int]
Engines = Callable[[str, str, int], Engine]
Record = Callable[[str, object], None]
QUICK_WAYS = [("compiled", "merge", 1), ("compiled", "merge", 2)]
# One rank alone does the same in every scheme.
FULL_WAYS = [
    ("compiled", "merge", 1),
    *(("compiled", scheme, size) for size in (2, 4) for scheme in cpu.SCHEMES),
    ("eager", "merge", 2),
]


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    with ExitStack() as stack:
        yield cache(
            lambda kind, scheme, size: Compiled(scheme, size, stack) if kind == "compiled" else Eager(scheme, size)
        )


def draw(engine: Engine, case: Case, num_draws: int, vary: str, is_mixed: bool) -> Array:
    """[num_draws] tokens in order of what varies, ``seed`` or ``position``; other cases get other seeds."""
    of, name = template(case, is_mixed), zlib.crc32(case.name.encode())
    seeds, positions = np.full(NUM_ROWS, name, np.uint64), np.full(NUM_ROWS, case.first_position, np.int64)
    tokens = []
    for start in range(0, num_draws, len(of.rows)):
        index = np.arange(start, start + len(of.rows))
        if vary == "seed":
            seeds[of.rows] = name + (is_mixed << 33) + index.astype(np.uint64)
        else:
            seeds[of.rows] = (name << 32) + is_mixed
            positions[of.rows] = case.first_position + index
        tokens.append(engine(of, seeds, positions)[of.rows])
    return np.concatenate(tokens)[:num_draws]


def fits_of(engine: Engine, case: Case, num_draws: int) -> dict[str, Fit]:
    """Of each way to draw, a quarter of the draws, and of all together."""
    probability, counts = probabilities(case), {}
    for vary in ("seed", "position"):
        for is_mixed in (False, True):
            tokens = draw(engine, case, num_draws // 4, vary, is_mixed)
            counts[f"{vary}, {'mixed' if is_mixed else 'alone'}"] = np.bincount(tokens, minlength=case.vocab_size)
    counts["all"] = np.sum(list(counts.values()), axis=0)
    return {name: fit_of(each, probability) for name, each in counts.items()}


def assert_draws(engine: Engine, case: Case, num_draws: int, record: Record) -> None:
    fits = fits_of(engine, case, num_draws)
    record("p_values", [fit.p_value for fit in fits.values()])
    assert not any(fit.is_rejected for fit in fits.values()), fits


def ids(cases: Sequence[Case]) -> list[str]:
    return [case.name.replace(",", "").replace(" ", "-") for case in cases]


by_case = pytest.mark.parametrize("case", CASES, ids=ids(CASES))
FEW = [case for case in CASES if case.name in EAGER_CASES]


@by_case
@pytest.mark.parametrize("way", QUICK_WAYS, ids=str)
def test_compiled_draws_have_their_distribution(
    engines: Engines, way: Way, case: Case, record_property: Record
) -> None:
    assert_draws(engines(*way), case, QUICK if way[-1] == 1 else QUICK_MERGE, record_property)


@pytest.mark.parametrize("case", FEW, ids=ids(FEW))
def test_eager_draws_have_their_distribution(engines: Engines, case: Case, record_property: Record) -> None:
    assert_draws(engines("eager", "merge", 1), case, QUICK_EAGER, record_property)


@pytest.mark.soak
@by_case
@pytest.mark.parametrize("way", FULL_WAYS, ids=str)
def test_many_draws_have_their_distribution(engines: Engines, way: Way, case: Case, record_property: Record) -> None:
    assert_draws(engines(*way), case, FULL_EAGER if way[0] == "eager" else FULL, record_property)


# A case, and what is a little off where it is drawn.
OFF = [
    ("temperature 1", {"temperature": 1.08}),
    ("temperature, top-k", {"temperature": 0.74}),
    ("top-k", {"top_k": 21}),
    ("top-k", {"top_k": 19}),
    ("top-p", {"top_p": 0.92}),
    ("top-p", {"top_p": 0.88}),
    ("min-p", {"min_p": 0.06}),
    ("min-p", {"min_p": 0.04}),
    ("repetition", {"repetition_penalty": 1.3}),
    ("presence", {"presence_penalty": 0.9}),
    ("frequency", {"frequency_penalty": 0.4}),
    ("all penalties, all filters", {"temperature": 1.12}),
]


@pytest.mark.parametrize(("name", "off"), OFF, ids=str)
def test_a_little_off_is_rejected(engines: Engines, name: str, off: dict[str, float]) -> None:
    """With as many draws as the quick form has, in the sum of them all."""
    case = next(case for case in CASES if case.name == name)
    wrong = replace(case, params=replace(case.params, **off))
    tokens = draw(engines("compiled", "merge", 1), wrong, QUICK, "seed", False)
    counts = np.bincount(tokens, minlength=case.vocab_size)
    assert fit_of(counts, probabilities(case)).is_rejected
    assert not fit_of(counts, probabilities(wrong)).is_rejected


@pytest.mark.parametrize("vary", ["seed", "position"])
def test_neighbours_are_independent(engines: Engines, vary: str) -> None:
    """Draws with seeds or positions that follow each other: all pairs of classes of tokens are as frequent as they are
    when the draws know nothing of each other."""
    case, num_classes = CASES[0], 12
    probability = probabilities(case)
    order = probability.argsort()[::-1]
    of_token = np.zeros(case.vocab_size, np.int64)
    of_token[order] = np.arange(case.vocab_size) % num_classes
    classes = of_token[draw(engines("compiled", "merge", 1), case, QUICK, vary, False)]
    share = np.bincount(of_token, weights=probability)
    for lag in (1, 2, 3):
        starts = np.arange(len(classes) - lag)
        first = starts[starts // lag % 2 == 0]  # no draw is in two pairs
        pairs = np.bincount(classes[first] * num_classes + classes[first + lag], minlength=num_classes**2)
        assert not fit_of(pairs, np.outer(share, share).ravel()).is_rejected


@by_case
def test_definitions_agree_and_cuts_are_clear(case: Case) -> None:
    """What transformers makes of a case is what the oracle does, also when filters are moved by what rounding could."""
    params = as_float32(case.params)
    if case.first_position < case.min_tokens:
        params = replace(params, bad_words=[*params.bad_words, *([token] for token in case.suppressed)])
    scaled = reference.edit(case.logits, params) / params.temperature
    expected = probabilities(case)
    for nudge in (1 - 1e-5, 1, 1 + 1e-5):
        top_p = min(params.top_p * nudge, 1.0) if params.top_p < 1 else 1.0
        kept = reference.survivors(scaled, params.top_k, top_p, params.min_p * nudge)
        possible = kept[scaled[kept] > -torch.inf]
        probability = np.zeros(case.vocab_size)
        probability[possible] = scaled[possible].double().softmax(dim=0)
        assert ((probability > 0) == (expected > 0)).all()
        np.testing.assert_allclose(probability, expected, rtol=1e-5)
    if params.top_k:
        at_cut = scaled.sort(descending=True).values[params.top_k - 1 : params.top_k + 1]
        assert at_cut[0] - at_cut[1] > 1e-4 or at_cut[1] == -torch.inf


@by_case
def test_every_parameter_of_a_case_matters(case: Case) -> None:
    """Without it another distribution comes out, by at least a hundredth of all draws. Min-p and top-k are tried
    together: of two cuts of the same order only one can be felt."""
    none = Params()
    assert_matters(case, replace(case.params, top_k=none.top_k, min_p=none.min_p))
    others = ("temperature", "top_p", "biases", "allowed", "bad_words")
    for name in (*others, "repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert_matters(case, replace(case.params, **{name: getattr(none, name)}))


def assert_matters(case: Case, other: Params) -> None:
    if other != case.params:
        difference = np.abs(probabilities(case) - probabilities(replace(case, params=other))).sum() / 2
        assert difference > 0.01, other
