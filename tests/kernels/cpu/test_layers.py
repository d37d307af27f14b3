"""Embedding, sums and norms, and rotation agree with the oracles; keys and values land in their blocks."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo_kernels import reference
from albireo_kernels.cpu import BLOCK, Dtype, Extent, KvBlocks, Library, Matrix, Rows, add_norm, embed, rope
from cpu_kernels import TOLERANCES, Array, assert_rows_close, rounded, run, step_of, tensor, to_bfloat16

sizes = st.one_of(st.integers(1, 70), st.sampled_from([96, 200]))
out_dtypes = st.sampled_from([Dtype.FLOAT32, Dtype.BFLOAT16])
thread_counts = st.sampled_from([1, 2, 3])
seeds = st.integers(0, 2**31)
EPS = 1e-5


def random(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def filled(array: Array, dtype: Dtype = Dtype.FLOAT32) -> Rows:
    num_rows, size = array.shape
    rows = Rows(num_rows, size, dtype)
    rows.array[...] = array
    return rows


def normed(x: Array, weight: Array, rounds: bool) -> Array:
    """The oracle in float64, which rounds where the kernel is told to."""
    if not rounds:
        return reference.rms_norm(tensor(x).double(), tensor(weight).double(), EPS).numpy()
    ones = torch.ones(x.shape[-1], dtype=torch.float32)
    return to_bfloat16(reference.rms_norm(tensor(x), ones, EPS).numpy()) * weight


@settings(max_examples=30)
@given(
    num_tokens=st.integers(1, 70),
    size=sizes,
    num_ids=st.integers(1, 50),
    dtype=out_dtypes,
    num_threads=thread_counts,
    seed=seeds,
)
def test_embedding(
    library: Library, num_tokens: int, size: int, num_ids: int, dtype: Dtype, num_threads: int, seed: int
) -> None:
    """Ids of other ranks give zeros; tokens that were just sampled are read from their slots."""
    rng = np.random.default_rng(seed)
    table, first_id = random(rng, num_ids, size), int(rng.integers(0, 100))
    ids = rng.integers(first_id - 5, first_id + num_ids + 5, num_tokens).astype(np.int32)
    from_last = rng.random(num_tokens) < 0.5
    slots = rng.permutation(num_tokens).astype(np.int32)
    last_tokens = np.zeros(num_tokens, dtype=np.int32)
    last_tokens[slots] = ids
    step = step_of(
        [1] * num_tokens,
        token_ids=np.where(from_last, -(2**31), ids).astype(np.int32),
        from_last_token=from_last,
        token_slots=slots,
        last_tokens=last_tokens,
    )
    out = filled(np.full((num_tokens, size), np.nan))
    run(library, num_threads, step, embed(Matrix.pack(library, table, dtype), out, first_id))
    is_mine = (ids >= first_id) & (ids < first_id + num_ids)
    expected = np.where(is_mine[:, None], rounded(table, dtype)[np.where(is_mine, ids - first_id, 0)], 0)
    np.testing.assert_array_equal(out.array, expected)


@settings(max_examples=40)
@given(
    num_tokens=st.integers(1, 40),
    size=sizes,
    num_partials=st.integers(0, 4),
    sets_residual=st.booleans(),
    rounds=st.booleans(),
    dtype=out_dtypes,
    num_threads=thread_counts,
    seed=seeds,
)
def test_sums_and_norms(
    library: Library,
    num_tokens: int,
    size: int,
    num_partials: int,
    sets_residual: bool,
    rounds: bool,
    dtype: Dtype,
    num_threads: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    before, partials = random(rng, num_tokens, size), random(rng, num_partials, num_tokens, size + 7)[..., :size]
    weight = random(rng, size)
    residual, out = filled(before), filled(np.full((num_tokens, size), np.nan), dtype)
    sets_residual = sets_residual and num_partials > 0
    op = add_norm(residual, list(partials), weight, out, eps=EPS, sets_residual=sets_residual, rounds=rounds)
    run(library, num_threads, step_of([1] * num_tokens), op)
    total = np.zeros_like(before) if sets_residual else before
    np.testing.assert_allclose(residual.array, total + partials.sum(axis=0), rtol=1e-5, atol=1e-5)
    # Where the kernel rounds, a value near a tie may go the other way.
    tolerance = 2.0**-7 if rounds else TOLERANCES[dtype]
    expected = normed(residual.array, weight, rounds)
    assert_rows_close(out.array, expected, tolerance)
    if rounds and dtype is Dtype.FLOAT32:
        assert np.mean(np.isclose(out.array, expected, rtol=1e-6, atol=0)) > 0.9


@pytest.mark.parametrize("num_partials", [0, 2])
def test_a_norm_of_samples_reads_the_last_tokens_of_their_rows(library: Library, num_partials: int) -> None:
    rng = np.random.default_rng(1)
    before, partials, weight = random(rng, 10, 40), random(rng, num_partials, 10, 40), random(rng, 40)
    residual, out = filled(before), filled(np.full((10, 40), np.nan))
    op = add_norm(residual, list(partials), weight, out, eps=EPS, extent=Extent.EACH_SAMPLE)
    run(library, 2, step_of([4, 1, 5], sampled=[0, 2]), op)
    expected = normed((before + partials.sum(axis=0))[[3, 9]], weight, False)
    assert_rows_close(out.array[:2], expected, 2e-5)
    assert np.isnan(out.array[2:]).all()


def test_tiny_and_large_rows_are_normed(library: Library) -> None:
    rng = np.random.default_rng(2)
    x, weight = random(rng, 3, 64) * np.array([[1e-12], [1.0], [1e15]], dtype=np.float32), random(rng, 64)
    out = filled(np.zeros((3, 64)))
    run(library, 1, step_of([3]), add_norm(filled(x), [], weight, out, eps=EPS))
    assert_rows_close(out.array, normed(x, weight, False), 2e-5)


@settings(max_examples=40)
@given(
    head_dim=st.sampled_from([16, 32, 64, 80, 96, 128]),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1), (14, 2)]),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    has_norms=st.booleans(),
    rounds=st.booleans(),
    dtype=out_dtypes,
    num_threads=thread_counts,
    seed=seeds,
)
def test_rotation_and_what_it_writes(
    library: Library,
    head_dim: int,
    heads: tuple[int, int],
    lengths: list[int],
    has_norms: bool,
    rounds: bool,
    dtype: Dtype,
    num_threads: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    num_heads, num_kv_heads = heads
    num_tokens, half = sum(lengths), head_dim // 2
    before = rng.integers(0, 60, len(lengths))
    angles = 7 * rng.random((128, half))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    tables = rng.permutation(4 * len(lengths)).astype(np.int32).reshape(len(lengths), 4)
    qkv = random(rng, num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    q_norm, k_norm = random(rng, 2, head_dim) if has_norms else (None, None)
    kv = KvBlocks(library, dtype, 4 * len(lengths), num_kv_heads, head_dim)
    q_dtype = library.input_dtype(dtype)
    q = filled(np.full((num_tokens, num_heads * head_dim), np.nan), q_dtype)
    step = step_of(lengths, before=before.tolist(), tables=tables)
    op = rope(
        filled(qkv.reshape(num_tokens, -1)), q, kv, cos, sin,
        num_heads=num_heads, q_norm=q_norm, k_norm=k_norm, eps=EPS, rounds=rounds,
    )  # fmt: skip
    run(library, num_threads, step, op)

    positions = np.concatenate([np.arange(b, b + n) for b, n in zip(before, lengths, strict=True)])
    queries, keys, values = np.split(qkv, [num_heads, num_heads + num_kv_heads], axis=1)
    if q_norm is not None and k_norm is not None:
        queries, keys = normed(queries, q_norm, rounds), normed(keys, k_norm, rounds)
    turned_queries, turned_keys = (
        reference.apply_rope(tensor(x).double(), tensor(cos[positions]), tensor(sin[positions])).numpy()
        for x in (queries, keys)
    )
    near = 2.0**-6 if has_norms and rounds else 4 * TOLERANCES[Dtype.FLOAT32]
    assert_rows_close(q.array, turned_queries.reshape(num_tokens, -1), near + 2 * TOLERANCES[q_dtype])
    row_of = np.repeat(np.arange(len(lengths)), lengths)
    blocks, offsets = tables[row_of, positions // BLOCK], positions % BLOCK
    for head in range(num_kv_heads):
        written_keys = {block: kv.key_matrix(block, head).unpack() for block in set(blocks)}
        written_values = {block: kv.value_matrix(block, head).unpack() for block in set(blocks)}
        found = np.stack([written_keys[block][offset] for block, offset in zip(blocks, offsets, strict=True)])
        assert_rows_close(found, turned_keys[:, head], near + 2 * TOLERANCES[dtype])
        found = np.stack([written_values[block][:, offset] for block, offset in zip(blocks, offsets, strict=True)])
        np.testing.assert_array_equal(found, rounded(values[:, head], dtype))


def test_other_places_of_the_cache_are_left_alone(library: Library) -> None:
    kv = KvBlocks(library, Dtype.BFLOAT16, 3, 2, 32)
    kv.keys[...] = kv.values[...] = 0x55
    ones = np.ones((8, 16), dtype=np.float32)
    q = Rows(2, 64, library.input_dtype(Dtype.BFLOAT16))
    step = step_of([1, 1], before=[3, 5], tables=np.array([[2], [0]], dtype=np.int32))
    qkv = filled(np.ones((2, 6 * 32), np.float32))
    run(library, 2, step, rope(qkv, q, kv, ones, ones, num_heads=2))
    garbage = np.array([0x5555], dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    for head in range(2):
        for block, offset in ((2, 3), (0, 5), (1, None)):
            keys, values = kv.key_matrix(block, head).unpack(), kv.value_matrix(block, head).unpack()
            untouched = [place for place in range(BLOCK) if place != offset]
            assert (keys[untouched] == garbage).all()
            assert (values[:, untouched] == garbage).all()
            if offset is not None:
                assert set(keys[offset]) == {0.0, 2.0}
                assert set(values[:, offset]) == {1.0}
