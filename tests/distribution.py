"""The distributions that sampling must draw from: cases, what transformers makes of them, and a chi-square test.

Expected probabilities come from transformers' own processors, in float64 and in the order that
`albireo_kernels.reference.sampling` defines; presence and frequency penalties, which transformers does not have, from
that module. Where definitions differ, cases stay away from the difference, and `test_distribution` checks that they do:

- Ties: transformers' top-k keeps all tokens that are equal to the last one, ours the one with the lowest id. No two
  logits are equal here.
- Edges: min-p keeps what is at least the bound in both; top-p keeps a token if the mass before it is less than top_p in
  both, which transformers sums from the other end. Cuts are not where rounding could turn them.
- Bad words: transformers looks for their beginnings in the prompt, too; ours only in the output, so that is what it is
  given.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from albireo.arrays import pack_int32
from albireo.v1 import plan_pb2
from albireo_kernels import reference
from albireo_kernels.reference import Params
from cpu_kernels import Array
from sampling_rows import Row, as_float32

NARROW, WIDE = 211, 1003


@dataclass(frozen=True, kw_only=True, eq=False)  # parameters have no hash; a case is one of a kind
class Case:
    """A distribution: of logits and parameters.

    Attributes:
        spread, shift: standard deviation and mean of the logits.
        suppressed: tokens that are not sampled at positions below ``min_tokens``.
        first_position: the first one to sample at.
    """

    name: str
    params: Params
    vocab_size: int = NARROW
    spread: float = 2.0
    shift: float = 0.0
    suppressed: Sequence[int] = ()
    min_tokens: int = 0
    first_position: int = 0

    @property
    def logits(self) -> Tensor:
        """[vocab_size] float32, the same for all cases but for spread and shift."""
        noise = np.random.default_rng(self.vocab_size).standard_normal(self.vocab_size)
        return torch.from_numpy((noise * self.spread + self.shift).astype(np.float32))

    @property
    def needs_history(self) -> bool:
        penalties = self.params.repetition_penalty, self.params.presence_penalty, self.params.frequency_penalty
        return penalties != (1.0, 0.0, 0.0) or any(len(word) > 1 for word in self.params.bad_words)

    @property
    def message(self) -> plan_pb2.Sampling:
        message = Row(self.params, self.first_position).message
        message.min_tokens = self.min_tokens
        message.suppressed_token_ids = pack_int32(list(self.suppressed))
        return message


@cache
def likeliest(vocab_size: int) -> list[int]:
    """Token ids, the likeliest first."""
    return Case(name="", params=Params(), vocab_size=vocab_size).logits.argsort(descending=True).tolist()


@cache
def probabilities(case: Case) -> Array:
    """[vocab_size] float64, by transformers; 0 where a token cannot be sampled."""
    params = as_float32(case.params)
    prompt, output = torch.tensor([list(params.prompt)]).long(), torch.tensor([list(params.output)]).long()
    scores = case.logits.double()[None]
    for processor in _before_penalties(case):
        scores = processor(output, scores)
    if params.repetition_penalty != 1:
        penalise = hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
        scores = penalise(torch.cat((prompt, output), dim=1), scores)
    penalties = Params(
        presence_penalty=params.presence_penalty, frequency_penalty=params.frequency_penalty, output=params.output
    )
    scores = reference.edit(scores[0], penalties)[None]
    for warper in _warpers(params):
        scores = warper(output, scores)
    return scores[0].softmax(dim=0).numpy()


def _before_penalties(case: Case) -> list[hf.LogitsProcessor]:
    params, processors = case.params, []
    if params.biases:
        processors.append(hf.SequenceBiasLogitsProcessor([[[token], float(b)] for token, b in params.biases.items()]))
    if params.allowed is not None:
        processors.append(hf.SuppressTokensLogitsProcessor(sorted(set(range(case.vocab_size)) - set(params.allowed))))
    if params.bad_words:
        processors.append(hf.NoBadWordsLogitsProcessor([list(word) for word in params.bad_words]))
    if case.first_position < case.min_tokens:
        processors.append(hf.SuppressTokensLogitsProcessor(case.suppressed))
    return processors


def _warpers(params: Params) -> list[hf.LogitsProcessor]:
    warpers = [hf.TemperatureLogitsWarper(params.temperature)]
    if params.min_p > 0:
        warpers.append(hf.MinPLogitsWarper(params.min_p))
    if params.top_k > 0:
        warpers.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(hf.TopPLogitsWarper(params.top_p))
    return warpers


class Fit(NamedTuple):
    """How draws fit a distribution.

    Attributes:
        num_outside: draws of tokens that have no probability.
        p_value: of chi-square, upper tail; near 0: too far from it, near 1: closer to it than chance is.
    """

    num_outside: int
    p_value: float

    @property
    def is_rejected(self) -> bool:
        return self.num_outside > 0 or not 1e-6 <= self.p_value <= 1 - 1e-6


def fit_of(counts: Array, probability: Array, least_expected: float = 5.0) -> Fit:
    """Of draws counted by token; the rarest tokens share cells, so that at least so many are expected in each."""
    num_outside = int(counts[probability == 0].sum())
    expected = probability * counts.sum()
    cells: list[tuple[float, float]] = []
    observed_sum = expected_sum = 0.0
    for token in expected.argsort(kind="stable"):
        observed_sum, expected_sum = observed_sum + counts[token], expected_sum + expected[token]
        if expected_sum >= least_expected:
            cells.append((observed_sum, expected_sum))
            observed_sum = expected_sum = 0.0
    if len(cells) < 2:
        raise ValueError(f"{len(cells)} cells tell nothing")
    # The likeliest token has a cell of its own, so nothing is left over.
    observed, wanted = np.array(cells).T
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return Fit(num_outside, float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2))))


def _history(vocab_size: int) -> tuple[list[int], list[int]]:
    """Prompt and output: some of the likeliest tokens and some others, in both and in one of them, some repeatedly."""
    likely, generator = likeliest(vocab_size), np.random.default_rng(7)
    prompt = [*likely[1:12:2], *generator.integers(0, vocab_size, 30).tolist()]
    output = [*likely[0:16:3], *likely[0:16:3], likely[0], likely[4], *generator.integers(0, vocab_size, 40).tolist()]
    return prompt, output


def _cases() -> list[Case]:
    narrow, wide = likeliest(NARROW), likeliest(WIDE)
    prompt, output = _history(NARROW)
    seen = Params(prompt=prompt, output=output)
    wide_prompt, wide_output = _history(WIDE)
    biases = {narrow[0]: -1.5, narrow[1]: -np.inf, narrow[30]: 4.0, narrow[60]: 2.5, narrow[200]: 5.0}
    allowed = narrow[2:90:3]
    words = [[narrow[0]], [narrow[5]], [*output[-2:], narrow[1]], [output[-1] + 1, narrow[2]], [output[-1], narrow[3]]]
    no_words = replace(seen, bad_words=words)
    penalised = replace(seen, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3)
    filters = {"min_p": 0.05, "top_k": 60, "top_p": 0.93}  # of min-p and top-k one alone can be what cuts
    minimum = {"suppressed": narrow[0:12:4]}

    def case(name: str, params: Params, **fields: object) -> Case:
        return Case(name=name, params=params, **fields)

    def wider(name: str, params: Params, **fields: object) -> Case:
        return Case(name=name, params=params, vocab_size=WIDE, **fields)

    return [
        case("temperature 1", Params()),
        case("temperature 0.3", Params(temperature=0.3)),
        wider("temperature 2", Params(temperature=2.0)),
        wider("flat", Params(), spread=0.2),
        case("top-k", Params(top_k=20)),
        wider("top-k 2", Params(top_k=2)),
        wider("top-k 300", Params(top_k=300), spread=1.0),
        case("top-p", Params(top_p=0.9)),
        wider("top-p wide", Params(top_p=0.97), spread=1.0),
        wider("top-p low", Params(top_p=0.3)),
        case("min-p", Params(min_p=0.05)),
        wider("min-p wide", Params(min_p=0.1), spread=0.8),
        case("repetition", replace(seen, repetition_penalty=1.4)),
        case("repetition below 1", replace(seen, repetition_penalty=0.8)),
        case("repetition, negative logits", replace(seen, repetition_penalty=1.2), shift=-6.0),
        case("presence", replace(seen, presence_penalty=1.1)),
        case("presence negative", replace(seen, presence_penalty=-0.6)),
        case("frequency", replace(seen, frequency_penalty=0.5)),
        case("bias", Params(biases=biases)),
        case("allowed", Params(allowed=allowed)),
        case("bad words", no_words),
        case("below min_tokens", Params(), min_tokens=10**6, **minimum),
        case("from min_tokens on", Params(), min_tokens=7, first_position=7, **minimum),
        wider("temperature, top-k", Params(temperature=0.7, top_k=60)),
        wider("temperature, top-p", Params(temperature=1.5, top_p=0.8)),
        wider("temperature, min-p", Params(temperature=0.5, min_p=0.03)),
        case("top-k, top-p", Params(top_k=40, top_p=0.85)),
        wider("top-k, little min-p", Params(top_k=50, min_p=0.001)),
        wider("min-p, much top-k", Params(top_k=300, min_p=0.03)),
        wider("top-p, min-p", Params(top_p=0.9, min_p=0.01)),
        wider("top-k 400, top-p", Params(top_k=400, top_p=0.9), spread=1.0),
        case("all filters", Params(temperature=1.2, **filters)),
        case("all filters, less min-p", Params(temperature=1.2, **{**filters, "min_p": 0.001, "top_k": 30})),
        case("repetition, top-k", replace(seen, repetition_penalty=1.3, top_k=25)),
        case("presence, top-p", replace(seen, presence_penalty=0.9, top_p=0.9)),
        case("frequency, min-p", replace(seen, frequency_penalty=0.4, min_p=0.04)),
        case("all penalties", penalised),
        case("all penalties, all filters", replace(penalised, temperature=1.2, **filters)),
        wider(
            "all penalties, top-p, wide",
            Params(
                prompt=wide_prompt,
                output=wide_output,
                repetition_penalty=1.2,
                presence_penalty=0.5,
                frequency_penalty=-0.2,
                top_p=0.9,
            ),
        ),
        case("bias, repetition", replace(seen, biases=biases, repetition_penalty=1.5)),
        case("bias, top-p", Params(biases=biases, top_p=0.9)),
        wider("bias, top-k", Params(biases={wide[0]: -3.0, wide[500]: 6.0}, top_k=50)),
        case("allowed, top-k", Params(allowed=allowed, top_k=15)),
        case("allowed, min-p", Params(allowed=allowed, min_p=0.06)),
        case("bad words, top-k", replace(no_words, top_k=20)),
        case("below min_tokens, top-p", Params(top_p=0.8), min_tokens=10**6, **minimum),
        case(
            "everything",
            replace(
                penalised,
                temperature=1.2,
                biases={narrow[0]: 2.0, narrow[3]: -0.7, narrow[7]: -np.inf, narrow[30]: 1.8, narrow[40]: 1.5},
                allowed=[*allowed, *narrow[:14], narrow[30]],
                bad_words=words,
                min_p=0.05,
                top_k=16,
                top_p=0.93,
            ),
            spread=1.2,
            min_tokens=10**6,
            **minimum,
        ),
    ]


CASES = _cases()
