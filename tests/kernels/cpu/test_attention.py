"""Attention over packed blocks agrees with dense attention in float64, for rows of any mix."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo_kernels.cpu import BLOCK, Dtype, KvBlocks, Library, Rows, attention
from cpu_kernels import Array, assert_rows_close, rounded, run, step_of, tensor

# A row: tokens computed before, tokens of this step. Most are decode rows.
Row = tuple[int, int]
row_strategy = st.tuples(st.integers(0, 300), st.one_of(st.just(1), st.just(1), st.integers(1, 70)))
dtypes = st.sampled_from([Dtype.FLOAT32, Dtype.BFLOAT16])

# bfloat16 levels round the weights of keys, whose largest is 1, and the result.
TOLERANCES = {Dtype.FLOAT32: 2e-5, Dtype.BFLOAT16: 2.0**-6}


def dense_attention(q: Array, k: Array, v: Array, sliding_window: int | None) -> Array:
    """[Q, H, D] queries, the last of [K, KVH, D] keys and values."""
    queries, keys, values = (tensor(x).double().transpose(0, 1) for x in (q, k, v))
    num_queries, num_keys = len(q), len(k)
    positions, places = torch.arange(num_keys - num_queries, num_keys)[:, None], torch.arange(num_keys)
    seen = places <= positions
    if sliding_window is not None:
        seen &= places > positions - sliding_window
    attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen, enable_gqa=True)
    result: Array = attended.transpose(0, 1).numpy()
    return result


def put(kv: KvBlocks, blocks: Array, k: Array, v: Array) -> None:
    """Writes a sequence's keys and values [K, KVH, D] to its blocks, and NaN behind them."""
    for index, block in enumerate(blocks):
        for head in range(kv.num_kv_heads):
            keys, values = np.full((2, BLOCK, kv.head_dim), np.nan, dtype=np.float32)
            part = slice(index * BLOCK, (index + 1) * BLOCK)
            keys[: len(k[part])], values[: len(v[part])] = k[part, head], v[part, head]
            kv.key_matrix(block, head).pack_into(keys)
            kv.value_matrix(block, head).pack_into(values.T)


def check(
    library: Library,
    rows: list[Row],
    heads: tuple[int, int],
    head_dim: int,
    sliding_window: int | None,
    dtype: Dtype,
    out_dtype: Dtype,
    num_threads: int,
    seed: int,
    spread: float = 1.0,
) -> None:
    rng = np.random.default_rng(seed)
    num_heads, num_kv_heads = heads
    q_dtype = library.input_dtype(dtype)
    contexts = [before + new for before, new in rows]
    num_blocks = [-(-context // BLOCK) for context in contexts]
    order = rng.permutation(sum(num_blocks) + 2).astype(np.int32)
    kv = KvBlocks(library, dtype, len(order), num_kv_heads, head_dim)
    for garbage in (kv.keys, kv.values):
        garbage[...] = 0xFF  # NaN, of either type
    tables = np.full((len(rows), max(num_blocks) + 1), 10**9, dtype=np.int32)  # past a row's context: undefined
    queries, expected, taken = [], [], 0
    for index, ((_, new), context) in enumerate(zip(rows, contexts, strict=True)):
        blocks = order[taken : taken + num_blocks[index]]
        taken += len(blocks)
        tables[index, : len(blocks)] = blocks
        k, v = rounded(rng.standard_normal((2, context, num_kv_heads, head_dim)).astype(np.float32), dtype)
        put(kv, blocks, k, v)
        q = rounded(spread * rng.standard_normal((new, num_heads, head_dim)).astype(np.float32), q_dtype)
        queries.append(q)
        expected.append(dense_attention(q, k, v, sliding_window))
    flat = np.concatenate(queries).reshape(-1, num_heads * head_dim)
    q_rows, out = Rows(*flat.shape, q_dtype), Rows(*flat.shape, out_dtype)
    q_rows.array[...], out.array[...] = flat, np.nan
    step = step_of([new for _, new in rows], before=[before for before, _ in rows], tables=tables)
    op = attention(q_rows, kv, out, num_heads=num_heads, sliding_window=sliding_window)
    run(library, num_threads, step, op)
    by_head = out.array.astype(np.float32).reshape(-1, head_dim)
    tolerance = max(TOLERANCES[q_dtype], TOLERANCES[out_dtype])
    assert_rows_close(by_head, np.concatenate(expected).reshape(-1, head_dim), tolerance)


@settings(max_examples=80)
@given(
    rows=st.lists(row_strategy, min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1), (14, 2)]),
    head_dim=st.sampled_from([16, 32, 64, 80, 96, 128]),
    sliding_window=st.sampled_from([None, None, 1, 7, 32, 65, 150]),
    dtype=dtypes,
    out_dtype=dtypes,
    num_threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 2**31),
)
def test_mixed_rows_agree_with_dense_attention(
    library: Library,
    rows: list[Row],
    heads: tuple[int, int],
    head_dim: int,
    sliding_window: int | None,
    dtype: Dtype,
    out_dtype: Dtype,
    num_threads: int,
    seed: int,
) -> None:
    check(library, rows, heads, head_dim, sliding_window, dtype, out_dtype, num_threads, seed)


@pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.BFLOAT16])
@pytest.mark.parametrize("sliding_window", [None, 100])
def test_every_length_around_a_block(library: Library, dtype: Dtype, sliding_window: int | None) -> None:
    rows = [(length - 1, 1) for length in [*range(1, 36), 63, 64, 65, 255, 256, 257]]
    check(library, rows, (4, 2), 64, sliding_window, dtype, Dtype.FLOAT32, 2, seed=1)


@pytest.mark.parametrize("group", [1, 5, 8, 9, 16, 17, 32])
def test_any_number_of_heads_reads_one_kv_head(library: Library, group: int) -> None:
    for dtype in (Dtype.FLOAT32, Dtype.BFLOAT16):
        check(library, [(40, 1), (10, 9), (300, 3)], (2 * group, 2), 32, None, dtype, Dtype.FLOAT32, 2, seed=2)


def test_scores_far_apart_stay_finite(library: Library) -> None:
    """The largest score grows from block to block by much more than exp can tell apart."""
    for dtype in (Dtype.FLOAT32, Dtype.BFLOAT16):
        check(library, [(700, 1), (30, 40)], (4, 2), 64, None, dtype, Dtype.FLOAT32, 2, seed=3, spread=30.0)


def test_wide_heads(library: Library) -> None:
    for dtype in (Dtype.FLOAT32, Dtype.BFLOAT16):
        check(library, [(70, 1), (3, 40)], (4, 1), 256, None, dtype, dtype, 2, seed=4)


def test_heads_that_it_has_no_room_for_are_refused(native: Library) -> None:
    for num_heads, head_dim in ((33, 16), (1, 272)):
        kv = KvBlocks(native, Dtype.FLOAT32, 1, 1, head_dim)
        rows = Rows(1, num_heads * head_dim, Dtype.FLOAT32)
        with pytest.raises(ValueError, match="attention"):
            attention(rows, kv, rows, num_heads=num_heads)
