# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def,no-any-return,misc,untyped-decorator"
"""What requests do to logits before temperature: biases, allowed ids and grammar masks, bad words, penalties."""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from albireo_kernels.triton.arithmetic import LAUNCH, load_ids
from albireo_kernels.triton.rows import Shard

# A program writes listed ids of its tile first and reads the tile after a barrier: 1024 columns are enough for both.
TILE = 1024


@triton.jit
def edit_kernel(
    logits, stride, width, first_id, bias_starts, bias_ids, biases, bad_starts, bad_ids, allowed_rows, allowed_bits,
    num_words, count_rows, counts, count_stride, repetition, frequency, presence,
    TILE: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """Edits logits in place, one program per tile of a row; rows without edits exit at once.

    Per token, in the oracle's order and rounding (exact): bias; not allowed: -inf; bad word: -inf; repetition,
    frequency, presence penalty.

    Args:
        logits: [S, width] float32.
        bias_starts: [S + 1] int32, where each row's entries of bias_ids (int32, distinct) and biases (float32) begin.
        bad_starts: [S + 1] int32, likewise of bad_ids (int32): tokens that would complete a bad word now.
        allowed_rows: [S] int32, the row's line of allowed_bits; -1: all allowed.
        allowed_bits: [any, num_words] int32, bit id % 32 of word id // 32, over the whole vocabulary.
        count_rows: [S] int32, the row's line of counts; -1: no penalties.
        counts: [any, width] int32: twice the number in the output, plus 1 where the prompt has the token.
        repetition, frequency, presence: [S] float32.
    """
    row, tile = tl.program_id(0), tl.program_id(1)
    bias_start, bias_end = tl.load(bias_starts + row), tl.load(bias_starts + row + 1)
    bad_start, bad_end = tl.load(bad_starts + row), tl.load(bad_starts + row + 1)
    allowed_row, count_row = tl.load(allowed_rows + row), tl.load(count_rows + row)
    logits += row.to(tl.int64) * stride
    columns, exists, ids = load_ids(tile * TILE, width, first_id, TILE)
    first = first_id + tile * TILE
    end = first_id + tl.minimum(tile * TILE + TILE, width)
    if bias_end > bias_start:
        while bias_start < bias_end:
            entries = bias_start + tl.arange(0, LIST)
            listed = tl.load(bias_ids + entries, mask=entries < bias_end, other=-1)
            is_here = (listed >= first) & (listed < end)
            targets = logits + (listed - first_id)
            bias = tl.load(biases + entries, mask=is_here, other=0.0)
            tl.store(targets, tl.load(targets, mask=is_here, other=0.0) + bias, mask=is_here)
            bias_start += LIST
        # Other threads wrote what this thread is about to read.
        tl.debug_barrier()
    if bad_end > bad_start:
        while bad_start < bad_end:
            entries = bad_start + tl.arange(0, LIST)
            listed = tl.load(bad_ids + entries, mask=entries < bad_end, other=-1)
            is_here = (listed >= first) & (listed < end)
            tl.store(logits + (listed - first_id), tl.full((LIST,), float("-inf"), tl.float32), mask=is_here)
            bad_start += LIST
        tl.debug_barrier()
    if (allowed_row >= 0) | (count_row >= 0):
        values = tl.load(logits + columns, mask=exists, other=0.0)
        if allowed_row >= 0:
            words = allowed_bits + allowed_row.to(tl.int64) * num_words + (ids >> 5)
            is_allowed = (tl.load(words, mask=exists, other=0) >> (ids & 31)) & 1
            values = tl.where(is_allowed != 0, values, float("-inf"))
        if count_row >= 0:
            count = tl.load(counts + count_row.to(tl.int64) * count_stride + columns, mask=exists, other=0)
            factor = tl.load(repetition + row) + tl.zeros_like(values)
            penalised = tl.where(values > 0, tl.div_rn(values, factor), values * factor)
            values = tl.where(count > 0, penalised, values)
            num_output = count >> 1
            values -= tl.load(frequency + row) * num_output.to(tl.float32)
            values -= tl.load(presence + row) * (num_output > 0).to(tl.float32)
        tl.store(logits + columns, values, mask=exists)


@triton.jit
def count_kernel(tokens, count_rows, first_id, width, counts, count_stride):
    """Counts a token per row in its line of counts: adds 2 where the shard [first_id, first_id + width) has it. Exact.

    Args:
        tokens: [S] int64.
        count_rows: [S] int32, -1: none; lines are distinct.
        counts: [any, width] int32.
    """
    row = tl.program_id(0)
    column = tl.load(tokens + row).to(tl.int32) - first_id
    count_row = tl.load(count_rows + row)
    if (count_row >= 0) & (column >= 0) & (column < width):
        target = counts + count_row.to(tl.int64) * count_stride + column
        tl.store(target, tl.load(target) + 2)


@dataclass(frozen=True, slots=True)
class Edits:
    """Of a batch of rows; what each tensor holds is told at `edit_kernel`."""

    bias_starts: Tensor
    bias_ids: Tensor
    biases: Tensor
    bad_starts: Tensor
    bad_ids: Tensor
    allowed_rows: Tensor
    allowed_bits: Tensor
    count_rows: Tensor
    counts: Tensor
    repetition: Tensor
    frequency: Tensor
    presence: Tensor


def edit(shard: Shard, edits: Edits) -> None:
    """Edits a shard's logits in place; ``edits.counts`` is of the shard's columns, the rest of the whole vocabulary."""
    # At least one tile: a grid of no programs is no launch.
    grid = (len(edits.allowed_rows), max(1, triton.cdiv(shard.width, TILE)))
    edit_kernel[grid](
        shard.logits, shard.stride, shard.width, shard.first_id, edits.bias_starts, edits.bias_ids, edits.biases,
        edits.bad_starts, edits.bad_ids, edits.allowed_rows, edits.allowed_bits, edits.allowed_bits.stride(0),
        edits.count_rows, edits.counts, edits.counts.stride(0), edits.repetition, edits.frequency, edits.presence,
        TILE=TILE, LIST=128, num_warps=4, **LAUNCH,
    )  # fmt: skip


def count_tokens(tokens: Tensor, shard: Shard, edits: Edits) -> None:
    """Counts sampled tokens, [num_rows] int64, in the rows' lines of counts."""
    count_kernel[(len(tokens),)](
        tokens, edits.count_rows, shard.first_id, shard.width, edits.counts, edits.counts.stride(0), num_warps=1
    )
