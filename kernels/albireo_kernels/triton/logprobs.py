# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def,no-any-return,misc,untyped-decorator"
# ruff: noqa: PLR0124 - kernels find NaN by comparison
"""Logprobs of the model: of raw logits, so before `edits.edit` or on a copy.

A rank's part is a log-sum-exp for each tile of the vocabulary; the tiles are those that shards end on
(`albireo.model_spec.shard_vocab`), so all ranks' tiles in a row are the same tensor for every number of shards. Within
a tile masses are integers: whatever layout the compiler chooses, the bits are the same.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from albireo_kernels.triton.arithmetic import (
    ID_BITS,
    LAUNCH,
    MASS_BITS,
    MAX_ID,
    load_ids,
    make_keys,
    masses,
)
from albireo_kernels.triton.rows import Shard, num_programs_per_row

# Values per program: 8 for each thread of 4 warps, in two or more tiles, so that tiles of 8 are no waste either.
BLOCK = 2048


@triton.jit
def tile_sums_kernel(logits, stride, width, num_tiles, maxima, sums, TILE: tl.constexpr, TILES: tl.constexpr):
    """The largest value of each tile, and the mass relative to it: TILES tiles per program.

    Args:
        logits: [S, width] float32.
        maxima, sums: [S, num_tiles] float32 and int64 in units of 2^-44, written; -inf and 0 for tiles without values.
    Exact: sums of integers; each mass is within 1e-7 of its value, or 2^-44.
    """
    row, block = tl.program_id(0), tl.program_id(1)
    tiles = block * TILES + tl.arange(0, TILES)
    columns = tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]
    values = tl.load(logits + row.to(tl.int64) * stride + columns, mask=columns < width, other=float("-inf"))
    values = tl.where(values != values, float("-inf"), values)
    largest = tl.max(values, 1)
    weights = tl.where(values == float("-inf"), 0, masses(values, largest[:, None]))
    targets = row.to(tl.int64) * num_tiles + tiles
    tl.store(maxima + targets, largest, mask=tiles < num_tiles)
    tl.store(sums + targets, tl.sum(weights, 1), mask=tiles < num_tiles)


@triton.jit
def token_logits_kernel(logits, stride, width, first_id, tokens, values):
    """The logits of tokens [S] int64 -> values [S] float32; -inf where another shard has the token, or NaN. Exact."""
    row = tl.program_id(0)
    column = tl.load(tokens + row).to(tl.int32) - first_id
    is_here = (column >= 0) & (column < width)
    value = tl.load(logits + row.to(tl.int64) * stride + column, mask=is_here, other=float("-inf"))
    tl.store(values + row, tl.where(value != value, float("-inf"), value))


@triton.jit
def count_before_kernel(logits, stride, width, first_id, tokens, values, numbers, num_tiles, TILE: tl.constexpr):
    """How many tokens of the shard come before a token of the row in the total order. Exact.

    Args:
        logits: [S, width] float32.
        tokens, values: [S] int64 and float32: the token and its logit.
        numbers: [S] int64, zeroed before, added to.
    """
    row, part = tl.program_id(0), tl.program_id(1)
    key = make_keys(tl.load(values + row), tl.load(tokens + row).to(tl.int32))
    logits += row.to(tl.int64) * stride
    counts = tl.zeros((TILE,), tl.int32)
    tile = part * num_tiles
    while tile < part * num_tiles + num_tiles:
        columns, exists, ids = load_ids(tile * TILE, width, first_id, TILE)
        tile_values = tl.load(logits + columns, mask=exists, other=float("-inf"))
        counts += (exists & (make_keys(tile_values, ids) > key)).to(tl.int32)
        tile += 1
    tl.atomic_add(numbers + row, tl.sum(counts, 0).to(tl.int64), sem="relaxed")


class TileSums(NamedTuple):
    """[num_rows, num_tiles] each, of a shard: largest value float32, and mass int64 in units of 2^-44 of it."""

    maxima: Tensor
    sums: Tensor


def tile_sums(shard: Shard, tile: int) -> TileSums:
    """A shard's part of the log-sum-exp of its rows; ``tile`` is that of `albireo.model_spec.shard_vocab`."""
    num_rows, num_tiles = len(shard.logits), triton.cdiv(shard.width, tile)
    maxima = torch.empty(num_rows, num_tiles, dtype=torch.float32, device=shard.logits.device)
    sums = torch.empty(num_rows, num_tiles, dtype=torch.int64, device=shard.logits.device)
    tiles = BLOCK // tile
    if num_tiles:
        tile_sums_kernel[(num_rows, triton.cdiv(num_tiles, tiles))](
            shard.logits, shard.stride, shard.width, num_tiles, maxima, sums, TILE=tile, TILES=tiles, num_warps=4,
            **LAUNCH,
        )  # fmt: skip
    return TileSums(maxima, sums)


def token_logits(shard: Shard, tokens: Tensor) -> Tensor:
    """The logits of tokens, [num_rows] int64, -inf where another shard has it: a maximum over ranks completes them."""
    values = torch.empty(len(tokens), dtype=torch.float32, device=tokens.device)
    token_logits_kernel[(len(tokens),)](
        shard.logits, shard.stride, shard.width, shard.first_id, tokens, values, num_warps=1
    )
    return values


def count_before(shard: Shard, tokens: Tensor, values: Tensor) -> Tensor:
    """How many tokens of the shard come before each row's token; the sum over ranks, plus 1, is its rank.

    Args:
        tokens, values: [num_rows] int64 and float32, from `token_logits` of all ranks.
    Returns:
        [num_rows] int64.
    """
    numbers = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
    num_parts = num_programs_per_row(len(tokens), shard.width, 1024)
    num_tiles = triton.cdiv(triton.cdiv(shard.width, 1024), num_parts)
    count_before_kernel[(len(tokens), num_parts)](
        shard.logits, shard.stride, shard.width, shard.first_id, tokens, values, numbers, num_tiles,
        TILE=1024, num_warps=4,
    )  # fmt: skip
    return numbers


def log_sum_exp(parts: Sequence[TileSums]) -> Tensor:
    """[num_rows] float64 from all ranks' parts, in rank order and without padding between them."""
    maxima = torch.cat([part.maxima for part in parts], 1).double()
    sums = torch.cat([part.sums for part in parts], 1).double() * 2.0**-MASS_BITS.value
    largest = maxima.amax(1, keepdim=True)
    return largest[:, 0] + (sums * (maxima - largest).exp()).sum(1).log()


class TokenLogprobs(NamedTuple):
    """[num_rows] and [num_rows, N]: of the sampled tokens, and of the first in order; logprobs float64, ids int64."""

    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


def combine(parts: Sequence[TileSums], values: Tensor, top_keys: Tensor) -> TokenLogprobs:
    """Logprobs from what all ranks found.

    Args:
        parts: of each rank, in order.
        values: [num_rows] float32, the sampled tokens' logits.
        top_keys: [num_rows, N] int64, from `candidates.sort_keys`, of raw logits.
    """
    normaliser = log_sum_exp(parts)
    top = top_keys >> 32
    bits = (top ^ ((top >> 63) & 0x7FFFFFFF)).to(torch.int32)
    top_values = bits.view(torch.float32).double()
    top_ids = MAX_ID.value - (top_keys & ((1 << ID_BITS.value) - 1))
    return TokenLogprobs(values.double() - normaliser, top_ids, top_values - normaliser[:, None])
