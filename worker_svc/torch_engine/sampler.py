"""Draws one token per sampling row. What a draw means is defined in `albireo_kernels.reference.sampling`.

This is the classic scheme: logits are gathered, and every rank samples all rows alike. Rows take one of four routes, by
their parameters, so that only those that need the order of the whole vocabulary pay for sorting it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from albireo.arrays import BoolArray, Float32Array, Int32Array, Int64Array
from albireo_kernels.reference import gumbel_noise, noise_keys, to_device
from albireo_kernels.reference.sampling import MIN_TEMPERATURE
from worker_svc.row_sampling import RowSampling
from worker_svc.sharding import ModelShard
from worker_svc.torch_engine.collectives import Collectives

# Up to this top_k, rows are sampled from their best candidates.
_MAX_CANDIDATES = 256
# Rows are sampled in parts of about so many logits: on a CPU keys, noise and copies then stay in its cache, on a GPU
# their memory is bounded.
_MAX_LOGITS_AT_ONCE = {"cpu": 2**18, "cuda": 2**23}


def sample(
    logits_shard: Tensor, sampling: RowSampling, output_positions: Int64Array, shard: ModelShard, group: Collectives
) -> Tensor:
    """Draws one token per row.

    Args:
        logits_shard: [S, ids of the shard] float32, this rank's part of the vocabulary; consumed.
        output_positions: [S], index of the sampled token in its sequence's output.
    Returns:
        [S] int64 token ids, identical on every rank.
    Collective: one all-gather of the logits; every rank must call.
    """
    _suppress(logits_shard, sampling, shard.vocab)
    logits = group.all_gather(logits_shard, shard.vocab_widths)
    params = _Params(sampling.temperature, sampling.top_p, sampling.top_k, *noise_keys(sampling.seed, output_positions))
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for route, mask in _routes(params, logits.shape[1]):
        for rows in _parts(np.flatnonzero(mask), logits):
            if len(rows) == len(logits):
                return route(logits, params)
            index = to_device(rows, logits.device)
            tokens[index] = route(logits[index], params.take(rows))
    return tokens


@dataclass(frozen=True, slots=True)
class _Params:
    """Parameters of some rows, arrays [num_rows] on the host; k0 and k1 key the rows' noise."""

    temperature: Float32Array
    top_p: Float32Array
    top_k: Int32Array
    k0: Int64Array
    k1: Int64Array

    def take(self, rows: Int64Array) -> "_Params":
        return _Params(self.temperature[rows], self.top_p[rows], self.top_k[rows], self.k0[rows], self.k1[rows])

    def keys(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return to_device(self.k0, device), to_device(self.k1, device)


_Route = Callable[[Tensor, _Params], Tensor]  # [num_rows, vocab_size] logits, parameters -> [num_rows] ids


def _routes(params: _Params, vocab_size: int) -> Iterator[tuple[_Route, BoolArray]]:
    """The routes, and which rows take each."""
    greedy = (params.temperature < MIN_TEMPERATURE) | (params.top_k == 1)
    has_top_k = (params.top_k > 0) & (params.top_k < vocab_size)
    unfiltered = ~greedy & ~has_top_k & (params.top_p >= 1)
    from_candidates = ~greedy & has_top_k & (params.top_k <= _MAX_CANDIDATES)
    yield _sample_greedy, greedy
    yield _sample_unfiltered, unfiltered
    yield _sample_from_candidates, from_candidates
    yield _sample_sorted, ~(greedy | unfiltered | from_candidates)


def _parts(rows: Int64Array, logits: Tensor) -> Iterator[Int64Array]:
    size = max(1, _MAX_LOGITS_AT_ONCE[logits.device.type] // logits.shape[1])
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _suppress(logits_shard: Tensor, sampling: RowSampling, shard_ids: range) -> None:
    for row, ids in sampling.suppressed:
        here = ids[(ids >= shard_ids.start) & (ids < shard_ids.stop)]
        logits_shard[row, to_device(here - shard_ids.start, logits_shard.device)] = -torch.inf


def _sample_greedy(logits: Tensor, params: _Params) -> Tensor:
    return logits.argmax(dim=-1)  # the first of equal ones


def _sample_unfiltered(logits: Tensor, params: _Params) -> Tensor:
    noise = gumbel_noise(torch.arange(logits.shape[1], device=logits.device), *params.keys(logits.device))
    return noise.add_(_scale(logits, params)).argmax(dim=-1)


def _sample_from_candidates(logits: Tensor, params: _Params) -> Tensor:
    scaled = _scale(logits, params)
    # torch.topk promises nothing about equal values. Integer keys in the order of (value descending, id ascending) are
    # all different. Adding 0 makes -0 equal to 0.
    bits = (scaled + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    order_keys = (ordered.to(torch.int64) << 32).sub_(torch.arange(logits.shape[1], device=logits.device))
    ids = order_keys.topk(int(params.top_k.max()), dim=-1).indices
    return _draw(scaled.gather(1, ids), ids, params)


def _sample_sorted(logits: Tensor, params: _Params) -> Tensor:
    values, ids = _scale(logits, params).sort(dim=-1, descending=True, stable=True)
    return _draw(values, ids, params)


def _draw(values: Tensor, ids: Tensor, params: _Params) -> Tensor:
    """Filters candidates by top-k and top-p and draws one per row.

    Args:
        values, ids: [num_rows, C], scaled logits in order and their token ids.
    """
    device, num_candidates = values.device, values.shape[1]
    top_k = np.where(params.top_k == 0, num_candidates, params.top_k)
    top_p = np.where(params.top_p >= 1, np.inf, params.top_p)
    kept = torch.arange(num_candidates, device=device) < to_device(top_k, device)[:, None]
    weights = (values.double() - values[:, :1].double()).exp() * kept
    before = weights.cumsum(dim=-1) - weights
    kept &= before < to_device(top_p, device, torch.float64)[:, None] * weights.sum(dim=-1, keepdim=True)
    kept[:, 0] = True
    scores = values + gumbel_noise(ids, *params.keys(device))
    # NaN, of a broken model, must still give a legal id.
    scores = torch.where(kept, scores, -torch.inf).nan_to_num_(-torch.inf, torch.inf, -torch.inf)
    best = scores.amax(dim=-1, keepdim=True)
    return torch.where(scores == best, ids, torch.iinfo(torch.int64).max).amin(dim=-1)


def _scale(logits: Tensor, params: _Params) -> Tensor:
    return logits / to_device(params.temperature, logits.device, torch.float32)[:, None]
