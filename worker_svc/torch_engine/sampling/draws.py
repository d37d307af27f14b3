"""Draws one token per row: from records of all shards, or from whole rows."""

from collections.abc import Callable

import torch
from torch import Tensor

from albireo.arrays import Int64Array
from albireo_kernels.reference import gumbel_noise, to_device
from worker_svc.torch_engine.sampling.records import (
    NO_RECORD,
    ids_of,
    local_best,
    local_noisy_best,
    local_top,
    make_records,
    values_of,
    without_nan,
)
from worker_svc.torch_engine.sampling.routes import DrawParams, Routes

# Rows are worked on in parts of about so many logits: on a CPU records, noise and copies then stay in its cache, on a
# GPU their memory is bounded.
_MAX_LOGITS_AT_ONCE = {"cpu": 2**18, "cuda": 2**23}


def local_records(logits: Tensor, first_id: int, params: DrawParams, routes: Routes) -> Tensor:
    """What the other ranks have to know of a shard to draw all rows but the sorted ones.

    Args:
        logits: [n, width] float32, edited, of the ids from ``first_id`` on.
    Returns:
        [routes.num_records] int64: a record per greedy row, one per unfiltered row, some per row with candidates.
    """
    greedy = by_parts(routes.greedy, logits, params, lambda part, _: local_best(part, first_id))
    unfiltered = by_parts(
        routes.unfiltered,
        logits,
        params,
        lambda part, of: local_noisy_best(part, first_id, of.temperature, of.k0, of.k1),
    )
    candidates = by_parts(
        routes.candidates,
        logits,
        params,
        lambda part, of: local_top(part, first_id, of.temperature, routes.num_candidates).flatten(),
    )
    return torch.cat((greedy, unfiltered, candidates))


def draw_from_records(records: Tensor, params: DrawParams, routes: Routes) -> Tensor:
    """Draws all rows but the sorted ones.

    Args:
        records: [num_shards, routes.num_records], from `local_records` of every shard.
    Returns:
        [n] int64 token ids; those of sorted rows are undefined.
    """
    device, num_shards = records.device, len(records)
    num_best = len(routes.greedy) + len(routes.unfiltered)
    tokens = torch.zeros(len(params.top_k), dtype=torch.int64, device=device)
    if num_best:
        best = torch.cat((to_device(routes.greedy, device), to_device(routes.unfiltered, device)))
        tokens[best] = ids_of(records[:, :num_best].amax(dim=0))
    if len(routes.candidates):
        rows, count = to_device(routes.candidates, device), routes.num_candidates
        of_rows = records[:, num_best:].reshape(num_shards, len(rows), count).transpose(0, 1).flatten(1)
        top = of_rows.topk(count, dim=-1).values
        tokens[rows] = draw_ordered(values_of(top), ids_of(top), params.take(rows))
    return tokens


def draw_sorted(logits: Tensor, params: DrawParams) -> Tensor:
    """Draws rows whose filters need the order of the whole vocabulary.

    Args:
        logits: [n, vocab_size] float32, edited.
    Returns:
        [n] int64 token ids.
    """
    return by_rows(logits, params, _draw_sorted)


def draw_whole(logits: Tensor, params: DrawParams, routes: Routes) -> Tensor:
    """Draws rows of any route from edited logits [n, vocab_size]; returns [n] int64 token ids."""
    tokens = draw_from_records(local_records(logits, 0, params, routes)[None], params, routes)
    if len(routes.sorted):
        rows = to_device(routes.sorted, logits.device)
        tokens[rows] = by_parts(routes.sorted, logits, params, _draw_sorted)
    return tokens


def draw_ordered(values: Tensor, ids: Tensor, params: DrawParams) -> Tensor:
    """Filters tokens by min-p, top-k and top-p and draws one per row.

    Args:
        values, ids: [n, C], scaled logits in order and their token ids; a NaN stands for no token.
    Returns:
        [n] int64 token ids.
    """
    largest = values[:, :1].double()
    bound = (largest + params.log_min_p[:, None]).float()
    kept = torch.arange(values.shape[1], device=values.device) < params.top_k[:, None]
    kept &= ~(values < bound) & ~values.isnan()
    weights = torch.where(kept, (values.double() - largest).exp(), 0.0)
    # The last sum stands for the total, so that this does not depend on how many tokens follow those that are kept.
    sums = weights.cumsum(dim=-1)
    kept &= sums - weights < params.top_p[:, None] * sums[:, -1:]
    kept[:, 0] = True
    scores = values + gumbel_noise(ids, params.k0, params.k1)
    return ids_of(torch.where(kept, make_records(scores, ids), NO_RECORD).amax(dim=-1))


def by_parts(
    rows: Int64Array, logits: Tensor, params: DrawParams, function: Callable[[Tensor, DrawParams], Tensor]
) -> Tensor:
    """Calls ``function`` with the logits and parameters of ``rows``, some rows at a time, and joins what it returns,
    int64 tensors of one dimension."""
    if len(rows) == len(logits):  # in order: none has to be copied
        return by_rows(logits, params, function)
    size = _rows_at_once(logits)
    indices = [to_device(rows[start : start + size], logits.device) for start in range(0, len(rows), size)]
    return _join([function(logits[index], params.take(index)) for index in indices], logits)


def by_rows(logits: Tensor, params: DrawParams, function: Callable[[Tensor, DrawParams], Tensor]) -> Tensor:
    """The same with all rows."""
    size = _rows_at_once(logits)
    slices = [slice(start, start + size) for start in range(0, len(logits), size)]
    return _join([function(logits[rows], params.take(rows)) for rows in slices], logits)


def _draw_sorted(logits: Tensor, params: DrawParams) -> Tensor:
    scaled = without_nan(logits / params.temperature[:, None]).add_(0.0)  # makes -0 equal to 0
    values, ids = scaled.sort(dim=-1, descending=True, stable=True)
    return draw_ordered(values, ids, params)


def _rows_at_once(logits: Tensor) -> int:
    return max(1, _MAX_LOGITS_AT_ONCE[logits.device.type] // max(1, logits.shape[1]))


def _join(parts: list[Tensor], logits: Tensor) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=logits.device)
