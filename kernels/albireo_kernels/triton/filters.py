# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def,no-any-return,misc,untyped-decorator"
# ruff: noqa: SIM102, SIM108 - the outer condition is decided when the kernel is compiled
"""Min-p, any top-k and top-p over the whole vocabulary, exactly, without gathering it.

A radix select on sort keys: each round adds up the keys that share the prefix found so far by their next digit (their
number for top-k, their probability mass for top-p), the caller sums the bins over ranks, and every rank picks the bin
in which the target is reached. Five rounds settle all bits, three of the value and two that break ties by id; sums of
integers do not depend on their order, so neither do cuts on the number of shards. Rows that are settled exit at once.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from albireo_kernels.triton.arithmetic import (
    LAUNCH,
    MIN_KEY,
    key_values,
    load_ids,
    make_keys,
    mass_target,
    masses,
    min_p_cut,
    scale,
)
from albireo_kernels.triton.draw import best
from albireo_kernels.triton.rows import Rows, Shard, num_programs_per_row

Reduce = Callable[[list[Tensor], Literal["sum", "max"]], None]
"""Reduces tensors in place over all ranks; a process passes those of its own shards, usually one."""

# (lowest bit, number of bits) of each round's digit. 2048 bins spread the logits' few exponents over many counters, and
# five rounds need fewer collectives than seven of 8 bits; bins are 16 KB per row.
DIGITS = ((53, 11), (42, 11), (32, 10), (11, 11), (0, 11))
NUM_BINS = 2048
TILE = 1024


@triton.jit
def min_p_kernel(largest, log_min_p, cuts):
    """[S] cuts of min-p, int64, from the rows' largest values, [S] float32. Exact."""
    row = tl.program_id(0)
    tl.store(cuts + row, min_p_cut(tl.load(largest + row), tl.load(log_min_p + row)))


@triton.jit
def histogram_kernel(
    logits, stride, width, first_id, temperature, top_k, largest, floors, prefixes, settled, bins, num_tiles, shift,
    num_digits, MASS: tl.constexpr, NUM_BINS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Adds each row's tokens to bins by the digit of their keys, best digit first. Integers: exact, in any order.

    Args:
        logits: [S, width] float32.
        temperature, top_k: [S], as in `Rows`.
        largest: [S] float32, of logits / temperature over all ranks; masses are relative to it.
        floors: [S] int64 cuts; tokens below do not count.
        prefixes: [S] int64; only keys that share the bits above the digit count.
        settled: [S] int32; rows to leave out.
        bins: [S, NUM_BINS] int64, zeroed before; sums of masses while digits are of values, if MASS, else of ones.
        num_tiles: of a program.
        shift, num_digits: the digit's lowest bit, and how many values it has.
    """
    row, part = tl.program_id(0), tl.program_id(1)
    if tl.load(settled + row) == 0:
        row_temperature, row_top_k = tl.load(temperature + row), tl.load(top_k + row)
        prefix, floor = tl.load(prefixes + row), tl.load(floors + row)
        logits += row.to(tl.int64) * stride
        bins += row.to(tl.int64) * NUM_BINS
        tile = part * num_tiles
        while tile < part * num_tiles + num_tiles:
            columns, exists, ids = load_ids(tile * TILE, width, first_id, TILE)
            values = tl.load(logits + columns, mask=exists, other=float("-inf"))
            values = scale(values, row_temperature, row_top_k)
            keys = make_keys(values, ids)
            # Unsigned: what differs above the digit makes it too large. MIN_KEY, the first prefix, flips the sign.
            digits = (keys ^ prefix).to(tl.uint64, bitcast=True) >> shift.to(tl.uint64)
            weights = tl.full((TILE,), 1, tl.int64)
            if MASS:
                weights = tl.where(shift >= 32, masses(values, tl.load(largest + row)), weights)
            counts = exists & (keys >= floor) & (digits < num_digits) & (weights > 0)
            tl.atomic_add(bins + (num_digits - 1 - digits.to(tl.int32)), weights, mask=counts, sem="relaxed")
            tile += 1


@triton.jit
def narrow_kernel(
    bins, top_k, top_p, largest, floors, prefixes, targets, settled, cuts, shift, num_digits,
    MASS: tl.constexpr, NUM_BINS: tl.constexpr,
):  # fmt: skip
    """Picks the bin in which a row reaches its target, and settles the row where no part of the bin is left out. Exact.

    Args:
        bins: [S, NUM_BINS] int64, summed over ranks.
        top_k, top_p: [S], as in `Rows`: the target is top_p of all mass if MASS, else the number top_k.
        largest, floors: [S], as in `histogram_kernel`.
        prefixes, targets: [S] int64, read and written: bits found, and what is to be reached within them.
        settled: [S] int32, read and written.
        cuts: [S] int64, written when a row is settled.
        shift, num_digits: as in `histogram_kernel`.
    """
    row = tl.program_id(0)
    if tl.load(settled + row) == 0:
        lanes = tl.arange(0, NUM_BINS)
        sums = tl.cumsum(tl.load(bins + row.to(tl.int64) * NUM_BINS + lanes), 0)
        prefix, floor = tl.load(prefixes + row), tl.load(floors + row)
        target = tl.load(targets + row)
        total = tl.max(sums, 0)
        if shift == 53:
            if MASS:
                target = mass_target(total, tl.load(top_p + row))
            else:
                target = tl.load(top_k + row).to(tl.int64)
        if total <= target:
            # All in question survive: in the first round all above the floor, later all of the prefix.
            tl.store(cuts + row, tl.maximum(prefix, floor))
            tl.store(settled + row, 1)
        else:
            before = tl.max(tl.where(sums < target, sums, 0), 0)
            reached = tl.min(tl.where(sums >= target, sums, total), 0)
            bin = tl.sum((sums < target).to(tl.int32), 0)
            prefix ^= (num_digits - 1 - bin).to(tl.int64) << shift.to(tl.int64)
            target -= before
            in_bin = reached - before
            if MASS:
                if shift == 32:
                    # The value is known; its equals weigh the same, and from here on they are counted.
                    weight = tl.maximum(masses(key_values(prefix), tl.load(largest + row)), 1)
                    target = (target + weight - 1) // weight
                    in_bin = in_bin // weight
            tl.store(prefixes + row, prefix)
            tl.store(targets + row, target)
            if target >= in_bin:
                tl.store(cuts + row, tl.maximum(prefix, floor))
                tl.store(settled + row, 1)


def histogram(shard: Shard, rows: Rows, largest: Tensor, floors: Tensor, state: "Search", round_: int) -> Tensor:
    """Bins of one round, [num_rows, NUM_BINS] int64, of this shard."""
    num_rows = len(rows)
    shift, bits = DIGITS[round_]
    bins = torch.zeros(num_rows, NUM_BINS, dtype=torch.int64, device=rows.device)
    num_parts = num_programs_per_row(num_rows, shard.width, TILE)
    num_tiles = triton.cdiv(triton.cdiv(shard.width, TILE), num_parts)
    histogram_kernel[(num_rows, num_parts)](
        shard.logits, shard.stride, shard.width, shard.first_id, rows.temperature, rows.top_k, largest, floors,
        state.prefixes, state.settled, bins, num_tiles, shift, 1 << bits,
        MASS=state.by_mass, NUM_BINS=NUM_BINS, TILE=TILE, num_warps=4, **LAUNCH,
    )  # fmt: skip
    return bins


class Search:
    """A radix select in progress, by row: for the cut of top-p (by mass) or of top-k (by number).

    Attributes:
        by_mass: which.
        prefixes, targets: [num_rows] int64, the bits found and what is to be reached within them.
        settled: [num_rows] int32, 1 where the cut is known: from the start where the row has no such filter.
        cuts: [num_rows] int64, the floor until known.
    """

    def __init__(self, rows: Rows, floors: Tensor, *, by_mass: bool):
        self.by_mass = by_mass
        self.prefixes = torch.full_like(floors, MIN_KEY.value)
        self.targets = torch.zeros_like(floors)
        self.settled = ((rows.top_p >= 1) if by_mass else (rows.top_k <= 0)).to(torch.int32)
        self.cuts = floors.clone()

    def narrow(self, bins: Tensor, rows: Rows, largest: Tensor, floors: Tensor, round_: int) -> None:
        """Takes in a round's bins, summed over ranks."""
        shift, bits = DIGITS[round_]
        narrow_kernel[(len(rows),)](
            bins, rows.top_k, rows.top_p, largest, floors, self.prefixes, self.targets, self.settled, self.cuts, shift,
            1 << bits, MASS=self.by_mass, NUM_BINS=NUM_BINS, num_warps=4, **LAUNCH,
        )  # fmt: skip


def draw_filtered(
    shards: Sequence[Shard], rows: Rows, all_reduce: Reduce, *, has_top_k: bool, has_top_p: bool
) -> list[tuple[Tensor, Tensor]]:
    """The best survivor of each row and shard: records for `draw.merge_and_draw`.

    Args:
        shards: this process's, of the same rows.
        has_top_k, has_top_p: whether any row has such a filter; known on the host, where the batch is made.
    Returns:
        (scores, ids) of each shard, as `draw.best` returns them.
    Collectives: one of 4 bytes per row, and 5 of 16 KB per row for each kind of filter; every rank must call alike.
    """
    maxima = [best(shard, rows, noise=False)[0] for shard in shards]
    all_reduce(maxima, "max")
    largest = maxima[0]
    cuts = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    min_p_kernel[(len(rows),)](largest, rows.log_min_p, cuts, num_warps=1, **LAUNCH)
    for by_mass in [False] * has_top_k + [True] * has_top_p:
        search = Search(rows, cuts, by_mass=by_mass)
        for round_ in range(len(DIGITS)):
            bins = [histogram(shard, rows, largest, cuts, search, round_) for shard in shards]
            all_reduce(bins, "sum")
            search.narrow(bins[0], rows, largest, cuts, round_)
        cuts = search.cuts
    return [best(shard, rows, cuts=cuts) for shard in shards]
