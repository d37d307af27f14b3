"""Rows to sample: the batches and the oracle that engines' samplers are tested with."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from albireo.arrays import Int64Array, pack_float32, pack_int32
from albireo.logprobs import Logprobs
from albireo.v1 import plan_pb2
from albireo_kernels import reference
from albireo_kernels.reference import Params
from albireo_kernels.reference.sampling import MIN_TEMPERATURE
from worker_svc.batch import History, InputBatch
from worker_svc.row_sampling import SlotSampling

SCHEMES = ("merge", "batch-sharded", "gather")


NUM_SLOTS = 64


@dataclass(frozen=True)
class Row:
    """A sampling row: parameters as the oracle takes them, with the sequence's tokens so far."""

    params: Params
    position: int
    num_logprobs: int = -1

    @property
    def message(self) -> plan_pb2.Sampling:
        params = self.params
        message = plan_pb2.Sampling(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            seed=params.seed,
            bias_token_ids=pack_int32(list(params.biases)),
            biases=pack_float32(list(params.biases.values())),
            allowed_token_ids=pack_int32(list(params.allowed or ())),
            bad_words=[pack_int32(list(word)) for word in params.bad_words],
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
        )
        if self.num_logprobs >= 0:
            message.num_logprobs = self.num_logprobs
        return message


def as_float32(params: Params) -> Params:
    """As parameters reach a rank."""
    names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    return replace(params, **{name: float(np.float32(getattr(params, name))) for name in names})


class Scored(NamedTuple):
    """A row that scores this token."""

    token: int
    num_logprobs: int


def make_batch(
    slots: Sequence[int],
    sampling: SlotSampling,
    positions: Int64Array,
    histories: Sequence[History] = (),
    scored: Sequence[Scored] = (),
) -> InputBatch:
    """A batch whose every row samples, or scores; the sampler looks at nothing but these rows."""
    sample_slots, nothing, none = np.array(slots, np.int32), np.zeros(0, np.int32), np.zeros(0, np.int64)
    scored_num_logprobs = np.array([row.num_logprobs for row in scored], np.int32)
    return InputBatch(
        slots=sample_slots,
        query_starts=none,
        context_lens=nothing,
        block_tables=nothing,
        token_ids=nothing,
        from_last_token=np.zeros(0, np.bool_),
        token_slots=nothing,
        positions=none,
        slot_mapping=none,
        sample_tokens=np.arange(len(slots) + len(scored)),
        sample_slots=sample_slots,
        scored_token_ids=np.array([row.token for row in scored], np.int32),
        output_positions=np.concatenate((positions, np.zeros(len(scored), np.int64))),
        sampling=sampling.rows(sample_slots, positions, scored_num_logprobs),
        histories=tuple(histories),
    )


def batch_of(rows: Sequence[Row], vocab_size: int, scored: Sequence[Scored] = ()) -> InputBatch:
    """A first step of sequences, and what it scores; slots are no row numbers."""
    sampling, histories = SlotSampling(NUM_SLOTS, vocab_size), []
    slots = [NUM_SLOTS - 1 - index for index in range(len(rows))]
    for slot, row in zip(slots, rows, strict=True):
        tokens = np.array([*row.params.prompt, *row.params.output], np.int32)
        if sampling.set(slot, row.message):
            histories.append(History(slot, tokens, len(row.params.prompt)))
    return make_batch(slots, sampling, np.array([row.position for row in rows], dtype=np.int64), histories, scored)


def assert_same_logprobs(actual: Logprobs | None, expected: Logprobs | None) -> None:
    """Bit by bit."""
    assert (actual is None) == (expected is None)
    if actual is not None and expected is not None:
        assert [array.tobytes() for array in actual] == [array.tobytes() for array in expected]
        assert [array.dtype for array in actual] == [array.dtype for array in expected]


def margin_of(logits: Tensor, row: Row) -> float:
    """How much the oracle's decision could shift without another outcome."""
    params = as_float32(row.params)
    if params.temperature < MIN_TEMPERATURE or params.top_k == 1:
        return math.inf
    scaled = reference.edit(logits, params) / params.temperature
    ids = reference.survivors(scaled, params.top_k, params.top_p, params.min_p)
    keys = reference.noise_keys(np.array([params.seed], np.uint64), np.array([row.position]))
    k0, k1 = map(torch.from_numpy, keys)
    scores = (scaled[ids] + reference.gumbel_noise(ids, k0, k1)[0]).double().topk(min(2, len(ids))).values
    margin = float(scores[0] - scores[-1]) if len(ids) > 1 else math.inf
    if params.top_p < 1:
        weights = scaled[reference.survivors(scaled, params.top_k, 1.0, params.min_p)].double().softmax(dim=0)
        margin = min(margin, float((weights.cumsum(dim=0) - weights - params.top_p).abs().min()))
    return margin


def expected_token(logits: Tensor, row: Row) -> int:
    return reference.sample_row(logits, as_float32(row.params), row.position)


def assert_logprobs(
    logprobs: Logprobs | None, logits: Tensor, rows: Sequence[Row | Scored], tokens: Sequence[int]
) -> None:
    """Those of the oracle, within 1e-5; ids and ranks exactly."""
    wanted = [index for index, row in enumerate(rows) if row.num_logprobs >= 0]
    if not wanted:
        assert logprobs is None
        return
    assert logprobs is not None
    assert logprobs.indices.tolist() == wanted
    starts = [0, *itertools.accumulate(logprobs.num_top.tolist())]
    for place, index in enumerate(wanted):
        expected = reference.token_logprobs(logits[index], tokens[index], rows[index].num_logprobs)
        top = slice(starts[place], starts[place + 1])
        assert logprobs.ranks[place] == expected.rank
        assert logprobs.top_token_ids[top].tolist() == expected.top_ids
        actual = [logprobs.logprobs[place], *logprobs.top_logprobs[top]]
        np.testing.assert_allclose(actual, [expected.logprob, *expected.top_logprobs], rtol=1e-6, atol=1e-5)


def random_scored(generator: np.random.Generator, num: int, vocab_size: int) -> list[Scored]:
    most = min(20, vocab_size)
    return [Scored(int(generator.integers(vocab_size)), int(generator.choice([0, 1, most]))) for _ in range(num)]


def random_logits(generator: np.random.Generator, num_rows: int, vocab_size: int, kind: str) -> Tensor:
    logits = generator.standard_normal((num_rows, vocab_size)) * 3
    if kind == "ties":
        logits = np.round(logits)
    elif kind == "equal":
        logits = np.zeros_like(logits)
    elif kind == "signed zeros":
        logits = np.where(logits > 8, 1, np.copysign(0, logits))
    elif kind == "few":
        logits[generator.random(logits.shape) < 0.97] = -np.inf
    elif kind == "ascending":
        logits.sort(axis=1)
    elif kind == "one chunk":
        logits[:, :64] += 50
    elif kind == "peaked":
        logits *= 10
    elif kind == "broken":
        logits[generator.random(logits.shape) < 0.3] = np.nan
    elif kind == "masked shards":
        begin = int(generator.integers(0, vocab_size))
        masked = np.ones(vocab_size, dtype=bool)
        masked[begin : begin + vocab_size // 8 + 1] = False
        logits[:, masked] = -np.inf
    return torch.from_numpy(logits.astype(np.float32))


KINDS = ("normal", "ties", "equal", "signed zeros", "few", "peaked", "broken", "masked shards")


def random_row(generator: np.random.Generator, vocab_size: int) -> Row:
    """Every parameter has a chance of one in three or so to mean something."""

    def choose(*values: float) -> float:
        return float(generator.choice(values))

    def tokens(most: int) -> list[int]:
        return generator.integers(0, min(vocab_size, 40), int(generator.integers(0, most + 1))).tolist()

    def if_chosen(value: object, otherwise: object) -> object:
        return value if generator.random() < 0.3 else otherwise

    output = tokens(100)
    biases: Mapping[int, float] = {
        int(token): choose(-np.inf, -100, -1, 0.5, 2, 100) for token in generator.integers(0, vocab_size, 12)
    }
    words = [[token] for token in tokens(3)]
    for length in (2, 3, 64):
        if len(output) >= length - 1:
            words.append([*output[len(output) - length + 1 :], *generator.integers(0, vocab_size, 1).tolist()])
        words.append(generator.integers(0, vocab_size, length).tolist())
    params = Params(
        temperature=choose(0.0, 1e-6, 1e-4, 0.3, 0.7, 1.0, 1.0, 1.0, 2.0, 100.0),
        top_k=int(choose(0, 0, 0, 1, 2, 7, 50, 255, 256, 257, 400, vocab_size - 1, vocab_size, 10**9)),
        top_p=choose(0.0, 0.1, 0.5, 0.9, 0.999, 1.0, 1.0, 1.0, 1.0, 1.0),
        min_p=choose(0.0, 0.0, 0.0, 0.01, 0.1, 0.5, 1.0),
        seed=int(generator.integers(0, 2**64, dtype=np.uint64)),
        biases=if_chosen(biases, {}),
        allowed=if_chosen(generator.integers(0, vocab_size, int(generator.integers(1, 30))).tolist(), None),
        bad_words=if_chosen(words, ()),
        repetition_penalty=if_chosen(choose(0.5, 1.1, 1.3, 2.0), 1.0),
        presence_penalty=if_chosen(choose(-2, -0.3, 0.7, 2), 0.0),
        frequency_penalty=if_chosen(choose(-2, -0.3, 0.7, 2), 0.0),
        prompt=tokens(30),
        output=output,
    )
    return Row(params, len(output), int(choose(-1, -1, -1, -1, 0, 1, 5, 20)))
