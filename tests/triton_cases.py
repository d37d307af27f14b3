"""Rows to sample, for tests of the Triton kernels interpreted or on a GPU: logits, parameters, shards, the oracle."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from albireo.model_spec import shard_vocab
from albireo_kernels.reference import sampling as reference
from albireo_kernels.reference.sampling import Params
from albireo_kernels.triton.candidates import candidates
from albireo_kernels.triton.draw import best, merge_and_draw
from albireo_kernels.triton.edits import Edits
from albireo_kernels.triton.filters import draw_filtered
from albireo_kernels.triton.rows import Rows, Shard


def tile_of(vocab_size: int) -> int:
    tile = 1
    while tile < 1024 and math.ceil(vocab_size / (2 * tile)) >= 64:
        tile *= 2
    return tile


def make_shards(logits: Tensor, tp_size: int) -> list[Shard]:
    """Column slices as the ranks hold them, each a copy with rows further apart than it is wide."""
    shards = []
    for rank in range(tp_size):
        ids = shard_vocab(logits.shape[1], rank, tp_size)
        wide = torch.full((len(logits), len(ids) + 5), torch.nan, device=logits.device)
        wide[:, : len(ids)] = logits[:, ids.start : ids.stop]
        shards.append(Shard(wide[:, : len(ids)], ids.start))
    return shards


def random_logits(rng: np.random.Generator, num_rows: int, vocab_size: int) -> Tensor:
    """Rows of several kinds: peaked, flat, all equal, few values, masked but for some or for none, NaN, infinite."""
    logits = rng.normal(size=(num_rows, vocab_size)) * rng.choice([0.1, 1, 3, 8], size=(num_rows, 1))
    for row in logits:
        kind = rng.integers(10)
        if kind == 0:
            row[:] = rng.choice([0.0, -0.0, 2.5])
        elif kind == 1:
            row[:] = np.round(row * 2) / 2
        elif kind == 2:
            row[rng.random(vocab_size) < 0.99] = -np.inf
        elif kind == 3:
            row[rng.integers(vocab_size, size=5)] = np.nan
        elif kind == 4:
            row[: vocab_size // 2] = -np.inf
        elif kind == 5:
            row[:] = rng.choice([-np.inf, np.nan, row[0]], p=[0.4, 0.4, 0.2])
        elif kind == 6:
            row[rng.integers(vocab_size, size=2)] = np.inf
    return torch.from_numpy(logits.astype(np.float32))


def random_params(rng: np.random.Generator, *, max_top_k: int, no_filters: bool = False) -> Params:
    return Params(
        temperature=float(rng.choice([0, 1e-6, 1e-5, 0.3, 1, 1, 1.7, 100])),
        top_k=0 if no_filters else int(rng.choice([0, 0, 1, 2, 40, rng.integers(1, max_top_k + 1)])),
        top_p=1.0 if no_filters else float(rng.choice([0, 0.1, 0.5, 0.9, 0.999, 1, 1])),
        min_p=0.0 if no_filters else float(rng.choice([0, 0, 0.01, 0.3, 1])),
        seed=int(rng.integers(2**64, dtype=np.uint64)),
    )


def random_edits(rng: np.random.Generator, vocab_size: int, index: int) -> Params:
    """The first two rows have none; others have each kind or not."""

    def some(count: int) -> list[int]:
        return [int(token) for token in rng.integers(vocab_size, size=count)] if rng.random() < 0.6 else []

    if index < 2:
        return Params()
    return Params(
        biases={token: float(rng.choice([-5.5, 3.25, -np.inf])) for token in some(300)},
        allowed=sorted(set(some(vocab_size // 2))) or None,
        bad_words=[[token] for token in some(200)],
        repetition_penalty=float(rng.choice([1, 1.3, 0.7])),
        presence_penalty=float(rng.choice([0, 0.9])),
        frequency_penalty=float(rng.choice([0, 0.37])),
        prompt=some(50),
        output=some(200) + some(3),
    )


def make_edits(params: Sequence[Params], shard: Shard, vocab_size: int) -> Edits:
    """Of rows and one shard; row i counts in line len - 1 - i, so that lines and rows differ."""
    device = shard.logits.device
    num_rows, num_words = len(params), -(-vocab_size // 32)
    allowed = np.zeros((num_rows + 1, num_words * 32), dtype=np.uint8)
    counts = np.zeros((num_rows, vocab_size), dtype=np.int32)
    bad: list[list[int]] = []
    penalised = []
    for index, each in enumerate(params):
        allowed[index + 1, list(each.allowed or ())] = 1
        line = counts[num_rows - 1 - index]
        np.add.at(line, list(each.output), 2)
        line[list(each.prompt)] += 1
        bad.append([last for *before, last in each.bad_words if not before])
        penalties = each.repetition_penalty, each.frequency_penalty, each.presence_penalty
        penalised.append(penalties != (1.0, 0.0, 0.0))
    columns = slice(shard.first_id, shard.first_id + shard.width)

    def starts(lists: Sequence[Sequence[object]]) -> Tensor:
        return torch.tensor([0, *np.cumsum([len(each) for each in lists])], dtype=torch.int32, device=device)

    def flat(values: list[int] | list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    biases = [list(each.biases.items()) for each in params]
    allowed_rows = [-1 if each.allowed is None else index + 1 for index, each in enumerate(params)]
    count_rows = [num_rows - 1 - index if some else -1 for index, some in enumerate(penalised)]
    return Edits(
        bias_starts=starts(biases),
        bias_ids=flat([token for row in biases for token, _ in row], torch.int32),
        biases=flat([bias for row in biases for _, bias in row], torch.float32),
        bad_starts=starts(bad),
        bad_ids=flat([token for row in bad for token in row], torch.int32),
        allowed_rows=flat(allowed_rows, torch.int32),
        allowed_bits=torch.from_numpy(np.packbits(allowed, axis=1, bitorder="little").view(np.int32)).to(device),
        count_rows=flat(count_rows, torch.int32),
        counts=torch.from_numpy(counts[:, columns].copy()).to(device),
        repetition=flat([each.repetition_penalty for each in params], torch.float32),
        frequency=flat([each.frequency_penalty for each in params], torch.float32),
        presence=flat([each.presence_penalty for each in params], torch.float32),
    )


def reduce_in_process(tensors: list[Tensor], kind: str) -> None:
    """What a collective over ranks does, where one process has all shards."""
    stacked = torch.stack(tensors)
    result = stacked.amax(0) if kind == "max" else stacked.sum(0)
    for tensor in tensors:
        tensor.copy_(result)


def draw_from_candidates(shards: Sequence[Shard], rows: Rows, width: int) -> Tensor:
    """Rows of top_k up to ``width``, or without filters."""
    records = [best(shard, rows) for shard in shards]
    keys = torch.stack([candidates(shard, rows, rows.top_k, width) for shard in shards])
    return merge_and_draw(*(torch.stack(part) for part in zip(*records, strict=True)), keys, rows)


def draw_in_rounds(shards: Sequence[Shard], rows: Rows) -> Tensor:
    """Rows of any filters."""
    records = draw_filtered(shards, rows, reduce_in_process, has_top_k=True, has_top_p=True)
    return merge_and_draw(*(torch.stack(part) for part in zip(*records, strict=True)), None, rows)


class Expected(NamedTuple):
    """The oracle's token, and whether rounding of logarithms or masses may decide otherwise."""

    token: int
    is_close: bool


def expect(logits: Tensor, params: Params, position: int) -> Expected:
    """Close: two best scores within 1e-5 (or two ulps), or a nucleus that ends within 1e-6 of a token's edge."""
    token = reference.sample_row(logits, params, position)
    edited = reference.edit(logits, params)
    if params.temperature < reference.MIN_TEMPERATURE or params.top_k == 1:
        return Expected(token, False)
    scaled = torch.where(edited.isnan(), -torch.inf, edited / params.temperature)
    if not scaled.max().isfinite():
        return Expected(token, False)
    ids = reference.survivors(scaled, params.top_k, params.top_p, params.min_p)
    k0, k1 = reference.noise_keys(np.array([params.seed], dtype=np.uint64), np.array([position]))
    noise = reference.gumbel_noise(ids, torch.from_numpy(k0), torch.from_numpy(k1))[0]
    top = (scaled[ids] + noise).topk(min(2, len(ids))).values
    is_close = len(top) == 2 and bool(top[0] - top[1] < max(1e-5, 3e-7 * abs(float(top[0]))))
    if params.top_p < 1:
        ids = reference.survivors(scaled, params.top_k, 1.0, params.min_p)
        weights = (scaled[ids].double() - scaled[ids[0]].double()).exp()
        shares = (weights.cumsum(0) - weights) / weights.sum()
        is_close |= bool((shares[1:] - params.top_p).abs().min() < 1e-6) if len(shares) > 1 else False
    return Expected(token, is_close)


def compare(logits: Tensor, params: Sequence[Params], positions: Sequence[int], draws: dict[int, Tensor]) -> int:
    """Asserts that tokens of every number of shards are the oracle's and the same; returns how many rows were close."""
    first, *others = draws.values()
    for tp_size, other in zip(list(draws)[1:], others, strict=True):
        assert torch.equal(other, first), f"{tp_size} shards draw otherwise than {next(iter(draws))}"
    num_close = 0
    for index, (each, position) in enumerate(zip(params, positions, strict=True)):
        expected = expect(logits[index].cpu(), each, position)
        num_close += expected.is_close
        message = f"row {index}: {first[index]} for {expected}: {each}"
        assert expected.is_close or int(first[index]) == expected.token, message
    return num_close
