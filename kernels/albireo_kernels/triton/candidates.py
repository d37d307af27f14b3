# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def,no-any-return,misc,untyped-decorator"
"""The best k <= 256 tokens of a shard, as sort keys.

A program holds 4096 values in registers and finds the k-th bit by bit: count the values at least as large, narrow, stop
when the count is k. Survivors of all programs are keys, and the same search over 4096 of them at a time leaves one
set. No sort: one of 1024 keys compiles for 8 s and moves every key through shared memory 55 times. No histograms:
logits share a few exponents, so that shared-memory counters would collide. Nothing but comparisons and sums, which
every version of Triton and its interpreter have, and whose cost does not depend on the data.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from albireo_kernels.triton.arithmetic import (
    LAUNCH,
    MIN_KEY,
    find_cut,
    load_ids,
    make_keys,
    ordered_bits,
    scale,
)
from albireo_kernels.triton.rows import Rows, Shard

MAX_CANDIDATES = 256
# 16 values for each thread of 8 warps; 38 programs per row of 152k: a search is short, so its latency counts, not its
# throughput, and all programs of a small batch run side by side.
CHUNK = 4096


@triton.jit
def find_value_cut(ordered, exists, target):
    """The greatest int32 that at least ``target`` existing ones of ``ordered`` [N] reach; -2^31 where fewer exist."""
    cut = tl.full((), -(1 << 31), tl.int32)
    reached = tl.sum(exists.to(tl.int32), 0)
    bit = 31
    while (bit >= 0) & (reached > target):
        trial = cut ^ (tl.full((), 1, tl.int32) << bit)
        count = tl.sum(((ordered >= trial) & exists).to(tl.int32), 0)
        cut = tl.where(count >= target, trial, cut)
        reached = tl.where(count >= target, count, reached)
        bit = bit - 1
    return cut


@triton.jit
def store_compacted(target, keys, taken, K: tl.constexpr):
    """Writes the taken ones of ``keys`` (at most K) to target[:K], fills up with MIN_KEY."""
    positions = tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(target + positions, keys, mask=taken)
    rest = tl.arange(0, K)
    tl.store(target + rest, tl.full((K,), MIN_KEY, tl.int64), mask=rest >= tl.sum(taken.to(tl.int32), 0))


@triton.jit
def select_values_kernel(
    logits, stride, width, first_id, temperature, top_k, num_wanted, keys, K: tl.constexpr, CHUNK: tl.constexpr
):
    """The keys of the first ``num_wanted`` tokens of each chunk of each row, in no order. Exact.

    Args:
        logits: [S, width] float32.
        temperature, top_k: [S], as in `Rows`: keys are of logits / temperature.
        num_wanted: [S] int32; rows outside of 1 .. K are left out, their keys unwritten.
        keys: [S, chunks, K] int64, written; MIN_KEY fills up.
    """
    row, chunk = tl.program_id(0), tl.program_id(1)
    wanted = tl.load(num_wanted + row)
    if (wanted > 0) & (wanted <= K):
        columns, exists, ids = load_ids(chunk * CHUNK, width, first_id, CHUNK)
        values = tl.load(logits + row.to(tl.int64) * stride + columns, mask=exists, other=float("-inf"))
        values = scale(values, tl.load(temperature + row), tl.load(top_k + row))
        ordered = ordered_bits(values)
        cut = find_value_cut(ordered, exists, wanted)
        above = exists & (ordered > cut)
        equal = exists & (ordered == cut)
        # Columns ascend, so the first of equals are those of the lowest ids.
        num_equal = wanted - tl.sum(above.to(tl.int32), 0)
        taken = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= num_equal))
        target = keys + (row.to(tl.int64) * tl.num_programs(1) + chunk) * K
        store_compacted(target, make_keys(values, ids), taken, K)


@triton.jit
def select_keys_kernel(all_keys, num_keys, num_wanted, keys, K: tl.constexpr, CHUNK: tl.constexpr):
    """The first ``num_wanted`` keys of each chunk of each row, in no order: [S, num_keys] -> [S, chunks, K]. Exact."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    wanted = tl.load(num_wanted + row)
    if (wanted > 0) & (wanted <= K):
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        row_keys = tl.load(all_keys + row.to(tl.int64) * num_keys + columns, mask=columns < num_keys, other=MIN_KEY)
        exists = row_keys != MIN_KEY
        cut = find_cut(row_keys, exists.to(tl.int64), wanted.to(tl.int64))
        target = keys + (row.to(tl.int64) * tl.num_programs(1) + chunk) * K
        store_compacted(target, row_keys, exists & (row_keys >= cut), K)


@triton.jit
def sort_keys_kernel(all_keys, num_ranks, num_rows, keys, RANKS: tl.constexpr, K: tl.constexpr):
    """The first K <= 32 keys of each row in order: [num_ranks, S, K] -> [S, K]. Exact.

    Each is compared with all. MIN_KEY comes last, as often as it is there.
    """
    row = tl.program_id(0)
    lanes = tl.arange(0, RANKS * K)
    offsets = (lanes // K * num_rows + row).to(tl.int64) * K + lanes % K
    mine = tl.load(all_keys + offsets, mask=lanes < num_ranks * K, other=MIN_KEY)
    places = tl.zeros((RANKS * K,), tl.int32)
    rank = 0
    while rank < num_ranks:
        others = tl.load(all_keys + (row + rank * num_rows).to(tl.int64) * K + tl.arange(0, K))
        is_before = others[None, :] > mine[:, None]
        # Keys are distinct but for MIN_KEY, whose copies need places of their own.
        is_before |= (others[None, :] == mine[:, None]) & ((rank * K + tl.arange(0, K))[None, :] < lanes[:, None])
        places += tl.sum(is_before.to(tl.int32), 1)
        rank += 1
    tl.store(keys + row * K + places, mine, mask=(places < K) & (lanes < num_ranks * K))


def candidates(shard: Shard, rows: Rows, num_wanted: Tensor, width: int) -> Tensor:
    """The first tokens of each row of a shard in the total order of logits / temperature.

    Args:
        num_wanted: [num_rows] int32, how many of each row; rows with none, or more than ``width``, are left out. For
            `draw.merge_and_draw`, the rows' top_k.
        width: a power of two up to 256.
    Returns:
        [num_rows, width] int64 keys in no order, filled up with MIN_KEY; undefined for rows left out.
    """
    num_rows, num_chunks = len(rows), max(1, triton.cdiv(shard.width, CHUNK))
    keys = torch.empty(num_rows, num_chunks, width, dtype=torch.int64, device=rows.device)
    select_values_kernel[(num_rows, num_chunks)](
        shard.logits, shard.stride, shard.width, shard.first_id, rows.temperature, rows.top_k, num_wanted, keys,
        K=width, CHUNK=CHUNK, num_warps=8, **LAUNCH,
    )  # fmt: skip
    while num_chunks > 1:
        # 4096 keys and no more: 16 per thread stay in registers. 256 of 152k take two rounds, 64 take one.
        num_keys, num_chunks = num_chunks * width, triton.cdiv(num_chunks * width, CHUNK)
        fewer = keys.new_empty(num_rows, num_chunks, width)
        select_keys_kernel[(num_rows, num_chunks)](keys, num_keys, num_wanted, fewer, K=width, CHUNK=CHUNK, num_warps=8)
        keys = fewer
    return keys[:, 0]


def sort_keys(keys: Tensor) -> Tensor:
    """The first K keys of each row, in order, from those of all ranks.

    Args:
        keys: [num_ranks, num_rows, K] int64, K a power of two up to 32.
    Returns:
        [num_rows, K] int64.
    """
    num_ranks, num_rows, width = keys.shape
    ordered = keys.new_empty(num_rows, width)
    sort_keys_kernel[(num_rows,)](
        keys, num_ranks, num_rows, ordered, RANKS=triton.next_power_of_2(num_ranks), K=width, num_warps=8
    )
    return ordered
