"""Packing keeps every element where albireo_cpu.h says that it lies."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo_kernels.cpu import BLOCK, Dtype, KvBlocks, Library, Matrix, Rows, address, allocate
from cpu_kernels import Array, to_bfloat16

GROUP = {Dtype.FLOAT32: 1, Dtype.BFLOAT16: 2, Dtype.INT8: 4}
shapes = st.tuples(st.integers(1, 70), st.integers(1, 140))
dtypes = st.sampled_from([Dtype.FLOAT32, Dtype.BFLOAT16, Dtype.INT8])
seeds = st.integers(0, 2**31)


def random_rows(shape: tuple[int, int], seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def laid_out(matrix: Matrix) -> Array:
    """[num_out, num_in], by the layout drawn in albireo_cpu.h; also checks that the rest is zero."""
    group = GROUP[matrix.dtype]
    panels = -(-matrix.num_out // 16)
    elements = matrix.data.view(matrix.dtype.numpy).reshape(panels, -1, 16, group)
    rows = elements.transpose(0, 2, 1, 3).reshape(panels * 16, -1).astype(np.float32)
    assert rows.shape[1] == matrix.c.padded_in
    assert not rows[matrix.num_out :].any()
    assert not rows[:, matrix.num_in :].any()
    return rows[: matrix.num_out, : matrix.num_in]


@settings(max_examples=30)
@given(shape=shapes, dtype=dtypes, seed=seeds)
def test_packed_elements_lie_where_the_layout_says(
    library: Library, shape: tuple[int, int], dtype: Dtype, seed: int
) -> None:
    rows = random_rows(shape, seed)
    matrix = Matrix.pack(library, rows, dtype)
    unpacked, found = matrix.unpack(), laid_out(matrix)
    if dtype is not Dtype.INT8:
        expected = rows if dtype is Dtype.FLOAT32 else to_bfloat16(rows)
        np.testing.assert_array_equal(unpacked, expected)
        np.testing.assert_array_equal(found, expected)
        return
    assert matrix.scales is not None
    assert matrix.sums is not None
    num_out = len(rows)
    scales = np.abs(rows).max(axis=1) / np.float32(127)
    np.testing.assert_allclose(matrix.scales[:num_out], scales, rtol=1e-6)
    np.testing.assert_array_equal(matrix.sums[:num_out], found.sum(axis=1))
    np.testing.assert_allclose(unpacked, rows, atol=float(scales.max()) * 0.5001)
    np.testing.assert_array_equal(found * matrix.scales[:num_out, None], unpacked)


@settings(max_examples=30)
@given(shape=shapes, dtype=dtypes, seed=seeds)
def test_every_source_type_packs_alike(library: Library, shape: tuple[int, int], dtype: Dtype, seed: int) -> None:
    halves = random_rows(shape, seed).astype(np.float16)
    brains = random_rows(shape, seed).astype(ml_dtypes.bfloat16)
    sources = [(halves, halves), (brains, brains), (brains.view(np.uint16), brains)]
    for source, same in sources:
        packed = Matrix.pack(library, source, dtype)
        np.testing.assert_array_equal(packed.data, Matrix.pack(library, same.astype(np.float32), dtype).data)


def test_float16_is_widened_exactly(library: Library) -> None:
    """All of its values: subnormal ones, infinities and NaN as well."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(256, 256)
    np.testing.assert_array_equal(Matrix.pack(library, every, Dtype.FLOAT32).unpack(), every.astype(np.float32))


def test_bfloat16_is_rounded_to_nearest_even(library: Library) -> None:
    words = np.random.default_rng(1).integers(0, 2**32, (64, 64), dtype=np.uint64).astype(np.uint32)
    values = words.view(np.float32)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(Matrix.pack(library, values, Dtype.BFLOAT16).unpack(), to_bfloat16(values))


@pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.BFLOAT16, Dtype.INT8])
def test_two_matrices_interleave_their_panels(library: Library, dtype: Dtype) -> None:
    gate, up = random_rows((40, 50), 1), random_rows((40, 50), 2)
    both = Matrix(library, dtype, 96, 50)
    both.pack_into(gate, 0, 2)
    both.pack_into(up, 1, 2)
    panels = both.unpack().reshape(3, 2, 16, 50)
    for index, rows in enumerate((gate, up)):
        found = panels[:, index].reshape(48, 50)
        np.testing.assert_array_equal(found[:40], Matrix.pack(library, rows, dtype).unpack())
        assert not found[40:].any()


def test_rows_of_any_stride_are_packed(native: Library) -> None:
    rows = random_rows((20, 60), 3)
    for view in (rows[:, 5:33], rows[::2], rows.T, rows[::-1]):
        np.testing.assert_array_equal(Matrix.pack(native, view, Dtype.FLOAT32).unpack(), view)


def test_rows_that_do_not_fit_are_refused(native: Library) -> None:
    matrix = Matrix(native, Dtype.FLOAT32, 40, 8)
    for rows, first_panel, step in (
        (np.zeros((49, 8), np.float32), 0, 1),
        (np.zeros((8, 9), np.float32), 0, 1),
        (np.zeros((17, 8), np.float32), 2, 1),
        (np.zeros((17, 8), np.float32), 1, 2),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            matrix.pack_into(rows, first_panel, step)
    with pytest.raises(TypeError, match="float64"):
        matrix.pack_into(np.zeros((8, 8)))
    with pytest.raises(ValueError, match="bytes"):
        Matrix(native, Dtype.FLOAT32, 40, 8, np.zeros(100, np.uint8))


@pytest.mark.parametrize("huge", [False, True])
@pytest.mark.parametrize("shape", [0, 5, (3, 1000), (1100, 1000)])
def test_allocated_arrays_are_aligned_zeros(shape: int | tuple[int, ...], huge: bool) -> None:
    array = allocate(shape, np.float32, huge)
    assert array.shape == (shape if isinstance(shape, tuple) else (shape,))
    assert address(array) % 64 == 0
    assert not array.any()
    array[...] = 1  # may be written, to its last element


@pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.BFLOAT16, Dtype.INT8])
def test_rows_are_padded_to_64_bytes(dtype: Dtype) -> None:
    rows = Rows(7, 33, dtype)
    assert rows.array.shape == (7, 33)
    assert rows.stride * dtype.numpy.itemsize % 64 == 0
    assert address(rows.array) == rows.c.data
    assert (rows.scales is None) == (dtype is not Dtype.INT8)
    shared = allocate(Rows.num_bytes(7, 33, dtype), np.uint8)
    Rows(7, 33, dtype, shared).array[...] = 1
    assert shared.any()
    with pytest.raises(ValueError, match="bytes"):
        Rows(8, 33, dtype, shared)


def test_rows_of_an_array_keep_its_stride() -> None:
    logits = np.zeros((4, 100), dtype=np.float32)
    rows = Rows.of(logits[:, 10:30])
    assert (rows.stride, rows.size, rows.c.data) == (100, 20, address(logits) + 40)
    with pytest.raises(ValueError, match="strides"):
        Rows.of(logits.T)


def test_blocks_of_a_cache_are_matrices(library: Library) -> None:
    kv = KvBlocks(library, Dtype.BFLOAT16, num_blocks=3, num_kv_heads=2, head_dim=80)
    keys = random_rows((BLOCK, 80), 4)
    kv.key_matrix(2, 1).pack_into(keys)
    kv.value_matrix(2, 1).pack_into(keys.T)
    np.testing.assert_array_equal(kv.key_matrix(2, 1).unpack(), to_bfloat16(keys))
    np.testing.assert_array_equal(kv.value_matrix(2, 1).unpack(), to_bfloat16(keys.T))
    assert not kv.key_matrix(2, 0).unpack().any()
    assert kv.keys.nbytes + kv.values.nbytes == 3 * KvBlocks.block_bytes(library, Dtype.BFLOAT16, 2, 80)
