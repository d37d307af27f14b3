# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def,no-any-return,misc,untyped-decorator"
# ruff: noqa: SIM102 - the outer condition is decided when the kernel is compiled
"""The draw: the best of a shard under keyed noise, and the token from all ranks' records."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from albireo_kernels.triton.arithmetic import (
    LAUNCH,
    MAX_VOCAB_SIZE,
    MIN_KEY,
    SENTINEL_ID,
    find_cut,
    first_best,
    gumbel_noise,
    is_greedy,
    key_ids,
    key_values,
    load_ids,
    make_keys,
    mass_target,
    masses,
    min_p_cut,
    scale,
)
from albireo_kernels.triton.rows import Rows, Shard, num_programs_per_row

# 16 values per thread of 4 warps: four 16-byte loads in flight hide the latency of memory.
TILE = 2048


@triton.jit
def best_kernel(
    logits, stride, width, first_id, temperature, top_k, k0, k1, cuts, scores, ids, num_tiles,
    NOISE: tl.constexpr, CUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(score, id) of the best token of each part of each row: program (row, part) reads ``num_tiles`` tiles.

    Score: logits / temperature + noise; of greedy rows, the logit. Exact but for the noise's logarithms.

    Args:
        logits: [S, width] float32.
        temperature, top_k, k0, k1: [S], as in `Rows`; k0 and k1 only where NOISE.
        cuts: [S] int64, keys of logits / temperature that survivors reach; only where CUT.
        scores, ids: [S, parts] float32 and int32, written.
    Source: Gumbel-max (Gumbel 1954).
    """
    row, part = tl.program_id(0), tl.program_id(1)
    row_temperature, row_top_k = tl.load(temperature + row), tl.load(top_k + row)
    greedy = is_greedy(row_temperature, row_top_k)
    logits += row.to(tl.int64) * stride
    # Each lane keeps the best it has seen and the first of equals; lanes are compared once, at the end.
    best_scores = tl.full((TILE,), float("-inf"), tl.float32)
    best_ids = tl.full((TILE,), SENTINEL_ID, tl.int32)
    tile = part * num_tiles
    while tile < part * num_tiles + num_tiles:
        columns, exists, tile_ids = load_ids(tile * TILE, width, first_id, TILE)
        values = tl.load(logits + columns, mask=exists, other=float("-inf"))
        tile_scores = scale(values, row_temperature, row_top_k)
        if CUT:
            cut = tl.where(greedy, MIN_KEY, tl.load(cuts + row))
            tile_scores = tl.where(make_keys(tile_scores, tile_ids) >= cut, tile_scores, float("-inf"))
        if NOISE:
            if not greedy:
                tile_scores += gumbel_noise(tile_ids, tl.load(k0 + row), tl.load(k1 + row))
        is_better = tile_scores > best_scores
        best_scores = tl.where(is_better, tile_scores, best_scores)
        best_ids = tl.where(is_better, tile_ids, best_ids)
        tile += 1
    score, token = first_best(best_scores, best_ids)
    tl.store(scores + row * tl.num_programs(1) + part, score)
    tl.store(ids + row * tl.num_programs(1) + part, token)


@triton.jit
def best_of_parts_kernel(part_scores, part_ids, num_parts, scores, ids, PARTS: tl.constexpr):
    """The best of the parts of each row: [S, num_parts] -> [S], num_parts <= PARTS. Exact."""
    row = tl.program_id(0)
    parts = tl.arange(0, PARTS)
    exists = parts < num_parts
    row_scores = tl.load(part_scores + row * num_parts + parts, mask=exists, other=float("-inf"))
    row_ids = tl.load(part_ids + row * num_parts + parts, mask=exists, other=SENTINEL_ID)
    score, token = first_best(row_scores, row_ids)
    tl.store(scores + row, score)
    tl.store(ids + row, token)


@triton.jit
def merge_and_draw_kernel(
    scores, ids, keys, num_ranks, num_rows, temperature, top_k, top_p, log_min_p, k0, k1, tokens,
    RANKS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A token per row from all ranks' records, one program per row.

    Rows of 1 < top_k <= K: min-p, top-k, top-p and noise over the candidates. Other rows: the best of the ranks' bests.
    Exact but for the noise's logarithms and masses, which are rounded to 2^-44 of the largest.

    Args:
        scores, ids: [num_ranks, S] float32 and int32, from `best`; num_ranks <= RANKS.
        keys: [num_ranks, S, K] int64, from `candidates`; K = 0: none.
        temperature, top_k, top_p, log_min_p, k0, k1: [S], as in `Rows`.
        tokens: [S] int64, written; 0 where a row has no values.
    """
    row = tl.program_id(0)
    ranks = tl.arange(0, RANKS)
    rank_scores = tl.load(scores + ranks * num_rows + row, mask=ranks < num_ranks, other=float("-inf"))
    rank_ids = tl.load(ids + ranks * num_rows + row, mask=ranks < num_ranks, other=SENTINEL_ID)
    _, token = first_best(rank_scores, rank_ids)
    row_top_k = tl.load(top_k + row)
    if K > 0:
        if (row_top_k <= K) & (row_top_k > 0) & (is_greedy(tl.load(temperature + row), row_top_k) == 0):
            # RANKS * K keys fit a program's registers, and a search by bits needs no sorted input.
            lanes = tl.arange(0, RANKS * K)
            offsets = (lanes // K * num_rows + row).to(tl.int64) * K + lanes % K
            row_keys = tl.load(keys + offsets, mask=lanes < num_ranks * K, other=MIN_KEY)
            largest = key_values(tl.max(row_keys, 0))
            row_keys = tl.where(row_keys >= min_p_cut(largest, tl.load(log_min_p + row)), row_keys, MIN_KEY)
            exists = (row_keys != MIN_KEY).to(tl.int64)
            row_keys = tl.where(row_keys >= find_cut(row_keys, exists, row_top_k.to(tl.int64)), row_keys, MIN_KEY)
            row_top_p = tl.load(top_p + row)
            if row_top_p < 1:
                weights = tl.where(row_keys != MIN_KEY, masses(key_values(row_keys), largest), 0)
                cut = find_cut(row_keys, weights, mass_target(tl.sum(weights, 0), row_top_p))
                row_keys = tl.where(row_keys >= cut, row_keys, MIN_KEY)
            candidates = key_ids(row_keys)
            noisy = key_values(row_keys) + gumbel_noise(candidates, tl.load(k0 + row), tl.load(k1 + row))
            _, token = first_best(tl.where(row_keys != MIN_KEY, noisy, float("-inf")), candidates)
    tl.store(tokens + row, tl.where(token == SENTINEL_ID, 0, token).to(tl.int64))


def best(shard: Shard, rows: Rows, *, noise: bool = True, cuts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The best token of each row of a shard.

    Args:
        noise: False: the largest of logits / temperature.
        cuts: [num_rows] int64 keys; tokens below are left out, but not of greedy rows.
    Returns:
        scores [num_rows] float32 and ids [num_rows] int32; (-inf, NO_ID) where nothing has a value.
    """
    num_rows = len(rows)
    if shard.first_id + shard.width > MAX_VOCAB_SIZE:
        raise ValueError(f"token ids from {MAX_VOCAB_SIZE} on have no sort keys")
    num_parts = num_programs_per_row(num_rows, shard.width, TILE)
    scores = torch.empty(num_rows, num_parts, dtype=torch.float32, device=rows.device)
    ids = torch.empty(num_rows, num_parts, dtype=torch.int32, device=rows.device)
    num_tiles = triton.cdiv(triton.cdiv(shard.width, TILE), num_parts)
    best_kernel[(num_rows, num_parts)](
        shard.logits, shard.stride, shard.width, shard.first_id, rows.temperature, rows.top_k, rows.k0, rows.k1,
        rows.k0 if cuts is None else cuts, scores, ids, num_tiles,
        NOISE=noise, CUT=cuts is not None, TILE=TILE, num_warps=4, **LAUNCH,
    )  # fmt: skip
    if num_parts == 1:
        return scores[:, 0], ids[:, 0]
    row_scores, row_ids = scores.new_empty(num_rows), ids.new_empty(num_rows)
    best_of_parts_kernel[(num_rows,)](
        scores, ids, num_parts, row_scores, row_ids, PARTS=triton.next_power_of_2(num_parts), num_warps=1
    )
    return row_scores, row_ids


def merge_and_draw(scores: Tensor, ids: Tensor, keys: Tensor | None, rows: Rows) -> Tensor:
    """Tokens from the records of all ranks.

    Args:
        scores, ids: [num_ranks, num_rows], gathered from `best`, with cuts where a row has filters but no candidates.
        keys: [num_ranks, num_rows, K], gathered from `candidates`; they decide the rows of 1 < top_k <= K.
    Returns:
        [num_rows] int64.
    """
    num_ranks, num_rows = scores.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=scores.device)
    width = 0 if keys is None else keys.shape[2]
    lanes = triton.next_power_of_2(num_ranks) * max(width, 1)
    merge_and_draw_kernel[(num_rows,)](
        scores, ids, scores if keys is None else keys, num_ranks, num_rows, rows.temperature, rows.top_k, rows.top_p,
        rows.log_min_p, rows.k0, rows.k1, tokens,
        RANKS=triton.next_power_of_2(num_ranks), K=width, num_warps=max(1, min(8, lanes // 256)), **LAUNCH,
    )  # fmt: skip
    return tokens
