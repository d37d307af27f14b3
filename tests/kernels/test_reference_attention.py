"""Paged attention over random block tables agrees with dense attention, row by row, in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from albireo_kernels import reference
from albireo_kernels.reference import attention

BLOCK_SIZE = 4
HEAD_DIM = 8

# A row: tokens computed before, tokens of this step. Most are decode rows.
Row = tuple[int, int]
rows_strategy = st.lists(
    st.tuples(st.integers(0, 40), st.one_of(st.just(1), st.just(1), st.integers(1, 12))), min_size=1, max_size=9
)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, sliding_window: int | None) -> Tensor:
    """[Q, H, D] queries, the last of [K, KVH, D] keys and values, one head and one query at a time."""
    num_queries, num_heads, head_dim = q.shape
    output = torch.zeros(q.shape, dtype=torch.float64)
    for query in range(num_queries):
        position = len(k) - num_queries + query
        first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
        for head in range(num_heads):
            kv_head = head // (num_heads // k.shape[1])
            keys, values = k[first : position + 1, kv_head].double(), v[first : position + 1, kv_head].double()
            scores = keys @ q[query, head].double() / head_dim**0.5
            output[query, head] = scores.softmax(0) @ values
    return output


def run_both(
    rows: list[Row],
    num_heads: int,
    num_kv_heads: int,
    sliding_window: int | None,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Paged and dense attention of ``rows``; the cache holds garbage wherever no row's context lies."""
    generator = torch.Generator().manual_seed(seed)
    contexts = [before + new for before, new in rows]
    num_blocks = [-(-context // BLOCK_SIZE) for context in contexts]
    order = torch.randperm(sum(num_blocks) + 3, generator=generator).numpy().astype(np.int32)
    tables = np.full((len(rows), max(num_blocks)), 10**9, dtype=np.int32)  # past a row's context: undefined
    cache = 100 * torch.randn(2, len(order), BLOCK_SIZE, num_kv_heads, HEAD_DIM, generator=generator).to(dtype)
    queries, expected, taken = [], [], 0
    for index, ((_, new), context) in enumerate(zip(rows, contexts, strict=True)):
        blocks = order[taken : taken + num_blocks[index]]
        taken += len(blocks)
        tables[index, : len(blocks)] = blocks
        k, v = torch.randn(2, context, num_kv_heads, HEAD_DIM, generator=generator).to(dtype)
        positions = torch.arange(context)
        places = (
            torch.from_numpy(blocks.astype(np.int64))[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        )
        reference.write_kv(k, v, cache[0], cache[1], places)
        q = torch.randn(new, num_heads, HEAD_DIM, generator=generator).to(dtype)
        queries.append(q)
        expected.append(dense_attention(q, k, v, sliding_window))
    starts = np.concatenate(([0], np.cumsum([new for _, new in rows]))).astype(np.int64)
    lens = np.array(contexts, dtype=np.int32)
    paged = reference.paged_attention(torch.cat(queries), cache[0], cache[1], starts, lens, tables, sliding_window)
    return paged, torch.cat(expected)


@settings(max_examples=60, deadline=None)
@given(
    rows=rows_strategy,
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    sliding_window=st.sampled_from([None, 1, 3, 8, 17]),
    seed=st.integers(0, 2**31),
)
def test_mixed_rows_agree_with_dense_attention(
    rows: list[Row], heads: tuple[int, int], sliding_window: int | None, seed: int
) -> None:
    paged, dense = run_both(rows, *heads, sliding_window, seed)
    torch.testing.assert_close(paged.double(), dense, rtol=1e-5, atol=1e-5)


def test_bfloat16_rows_stay_within_its_precision() -> None:
    paged, dense = run_both([(30, 1), (7, 1), (0, 9), (12, 5)], 4, 2, None, seed=3, dtype=torch.bfloat16)
    torch.testing.assert_close(paged.double(), dense, rtol=0.05, atol=0.05)


def test_decode_rows_are_split_when_they_would_gather_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_MAX_GATHERED_POSITIONS", 64)
    rows = [(context, 1) for context in (3, 30, 31, 29, 28, 12, 13, 14, 200)]
    paged, dense = run_both(rows, 4, 2, None, seed=4)
    torch.testing.assert_close(paged.double(), dense, rtol=1e-5, atol=1e-5)


def test_decode_rows_of_very_different_lengths_do_not_share_a_group() -> None:
    """The padding of a group stays below what its rows hold."""
    lens = np.array([1, 2, 3, 5, 100, 130, 1000, 1], dtype=np.int32)
    tables = np.zeros((len(lens), 250), dtype=np.int32)
    groups = reference.group_rows(np.arange(9), lens, tables, BLOCK_SIZE, None, torch.device("cpu"))
    assert sorted(token for group in groups for token in group.tokens.tolist()) == list(range(8))
    for group in groups:
        blocks_held = [-(-int(lens[token]) // BLOCK_SIZE) for token in group.tokens]
        assert len(group.blocks) < 2 * sum(blocks_held)


def test_a_sliding_window_reads_only_the_blocks_it_sees() -> None:
    lens, tables = np.array([1000], dtype=np.int32), np.arange(250, dtype=np.int32)[None]
    (group,) = reference.group_rows(np.array([0, 1]), lens, tables, BLOCK_SIZE, 9, torch.device("cpu"))
    assert group.blocks.tolist() == [247, 248, 249]


def test_write_kv_leaves_other_places_alone() -> None:
    cache = torch.zeros(2, 3, BLOCK_SIZE, 1, 2)
    k, v = torch.ones(2, 1, 2), 2 * torch.ones(2, 1, 2)
    reference.write_kv(k, v, cache[0], cache[1], torch.tensor([9, 2]))
    flat = cache.view(2, -1, 2)
    assert flat[0].sum(-1).nonzero()[:, 0].tolist() == [2, 9]
    assert flat[:, 9].tolist() == [[1, 1], [2, 2]]
