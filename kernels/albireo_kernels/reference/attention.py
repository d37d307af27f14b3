"""Attention over a paged KV cache, for rows of any mix of prefill and decode.

A step's rows are grouped once (`group_rows`, on the host), and every layer then runs the same groups.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from albireo.arrays import BoolArray, Int32Array, Int64Array
from albireo_kernels.reference.transfer import to_device

# Bounds the copy of keys and values that one group of decode rows gathers: at most about this many positions.
_MAX_GATHERED_POSITIONS = 16384


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """B rows of Q tokens each that attend together: one prefill row, or decode rows of similar length.

    Attributes:
        tokens: [B * Q], where the rows' tokens lie in the step's flat arrays.
        blocks: [B * W], the blocks that the rows read, row after row.
        mask: [B, 1, Q, num_keys], True where a token sees a key; None where the rows are causal squares.
        num_rows: B.
        num_keys: keys that a row reads at most, counted from the start of its first block.
    """

    tokens: Tensor
    blocks: Tensor
    mask: Tensor | None
    num_rows: int
    num_keys: int


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Writes the step's keys and values to their places in the cache.

    Args:
        k, v: [num_tokens, num_kv_heads, head_dim].
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim], contiguous; written.
        slot_mapping: [num_tokens] int64, block * block_size + offset, without repeats.
    """
    k_cache.view(-1, *k.shape[1:]).index_copy_(0, slot_mapping, k)
    v_cache.view(-1, *v.shape[1:]).index_copy_(0, slot_mapping, v)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_starts: Int64Array,
    context_lens: Int32Array,
    block_tables: Int32Array,
    sliding_window: int | None = None,
) -> Tensor:
    """Causal attention of every row's tokens over its sequence's blocks; softmax(q k / sqrt(head_dim)) v.

    Args:
        q: [num_tokens, num_heads, head_dim].
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim], this step's keys and values included.
            Query head h reads KV head h // (num_heads / num_kv_heads).
        query_starts: [num_rows + 1], where each row's tokens begin. They are the last ones of its context.
        context_lens: [num_rows].
        block_tables: [num_rows, widest]; undefined past a row's context.
        sliding_window: a token sees itself and the ``sliding_window - 1`` before it; None: all before it.
    Returns:
        [num_tokens, num_heads, head_dim].
    """
    groups = group_rows(query_starts, context_lens, block_tables, k_cache.shape[1], sliding_window, q.device)
    return attend_groups(q, k_cache, v_cache, groups)


def group_rows(
    query_starts: Int64Array,
    context_lens: Int32Array | Int64Array,
    block_tables: Int32Array,
    block_size: int,
    sliding_window: int | None,
    device: torch.device,
) -> tuple[AttentionGroup, ...]:
    """Splits a step's rows into groups that attend together; arguments as of `paged_attention`.

    Prefill rows stand alone. Decode rows share a group when their numbers of blocks have the same bit length, so that
    padding less than doubles what is read and there are few groups.
    """
    num_tokens, context_lens = np.diff(query_starts), context_lens.astype(np.int64)
    first_seen = np.maximum(context_lens - num_tokens - (sliding_window or context_lens.max(initial=0)) + 1, 0)
    first_blocks = first_seen // block_size
    num_blocks = -(-context_lens // block_size) - first_blocks
    groups = []
    for rows in _rows_together(num_tokens, num_blocks, block_size):
        # Columns past a row's own blocks are masked; they must only be legal to read.
        columns = np.arange(num_blocks[rows].max())
        inside = columns < num_blocks[rows, None]
        blocks = np.where(
            inside, block_tables[rows[:, None], np.where(inside, first_blocks[rows, None] + columns, 0)], 0
        )
        starts = first_blocks[rows] * block_size
        contexts, lengths = context_lens[rows], num_tokens[rows]
        num_keys = int((contexts - starts).max())
        is_square = len(rows) == 1 and sliding_window is None and lengths[0] == contexts[0]
        mask = None if is_square else _mask(contexts, lengths, starts, num_keys, sliding_window)
        tokens = query_starts[rows, None] + np.arange(lengths[0])
        groups.append(
            AttentionGroup(
                tokens=to_device(tokens.reshape(-1), device),
                blocks=to_device(blocks.reshape(-1), device),
                mask=None if mask is None else to_device(mask, device, torch.bool),
                num_rows=len(rows),
                num_keys=num_keys,
            )
        )
    return tuple(groups)


def attend_groups(q: Tensor, k_cache: Tensor, v_cache: Tensor, groups: tuple[AttentionGroup, ...]) -> Tensor:
    """`paged_attention` with the rows grouped already; the groups cover every token of ``q``."""
    output = torch.empty_like(q)
    for group in groups:
        keys = _gather(k_cache, group)
        values = _gather(v_cache, group)
        queries = q[group.tokens].view(group.num_rows, -1, *q.shape[1:])
        attended = _attend(queries, keys, values, group.mask)
        output[group.tokens] = attended.reshape(-1, *q.shape[1:])
    return output


def _rows_together(num_tokens: Int64Array, num_blocks: Int64Array, block_size: int) -> Iterator[Int64Array]:
    for row in np.flatnonzero(num_tokens > 1):
        yield np.array([row])
    decode_rows = np.flatnonzero(num_tokens == 1)
    _, bit_lengths = np.frexp(num_blocks[decode_rows])
    for bit_length in np.unique(bit_lengths):
        rows = decode_rows[bit_lengths == bit_length]
        size = max(1, _MAX_GATHERED_POSITIONS // (block_size << int(bit_length)))
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


def _mask(
    contexts: Int64Array, lengths: Int64Array, starts: Int64Array, num_keys: int, sliding_window: int | None
) -> BoolArray:
    """Which keys each token sees, [B, 1, Q, num_keys]; keys of a row are counted from position ``starts``."""
    positions = ((contexts - lengths)[:, None] + np.arange(lengths[0]))[:, None, :, None]
    keys = (starts[:, None] + np.arange(num_keys))[:, None, None, :]
    seen: BoolArray = keys <= positions
    if sliding_window is not None:
        seen &= keys > positions - sliding_window
    return seen


def _gather(cache: Tensor, group: AttentionGroup) -> Tensor:
    """[num_blocks, block_size, heads, head_dim] -> [B, num_keys, heads, head_dim]."""
    blocks = cache.index_select(0, group.blocks)
    return blocks.view(group.num_rows, -1, *cache.shape[2:])[:, : group.num_keys]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """[B, Q, H, D] queries over [B, K, KVH, D] keys and values -> [B, Q, H, D]."""
    batch, length, num_heads, head_dim = q.shape
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if length == 1:
        # The heads of a KV head become its queries: torch 2.13 runs single queries with enable_gqa in bfloat16 about
        # eight times slower on a CPU.
        q = q.view(batch, k.shape[1], -1, head_dim)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(batch, 1, num_heads, head_dim)
    attended = F.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return attended.transpose(1, 2)
