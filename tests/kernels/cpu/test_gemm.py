"""Products with packed weights agree with float64, of all types, epilogues and odd sizes."""

import numpy as np
import pytest
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo_kernels import reference
from albireo_kernels.cpu import Dtype, Epilogue, Extent, Library, Matrix, Rows, gemm, quantize, silu_mul_outputs
from cpu_kernels import TOLERANCES, Array, assert_rows_close, rounded, run, step_of, tensor

rows_strategy = st.one_of(st.integers(1, 8), st.integers(9, 70))
inputs_strategy = st.one_of(st.integers(1, 70), st.sampled_from([96, 128, 200, 520]))
outputs_strategy = st.one_of(st.integers(1, 70), st.sampled_from([96, 128, 200]))
weight_dtypes = st.sampled_from([Dtype.FLOAT32, Dtype.BFLOAT16])
out_dtypes = st.sampled_from([Dtype.FLOAT32, Dtype.BFLOAT16])
thread_counts = st.sampled_from([1, 2, 3])
seeds = st.integers(0, 2**31)


def random(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def filled(array: Array, dtype: Dtype) -> Rows:
    num_rows, size = array.shape
    rows = Rows(num_rows, size, dtype)
    rows.array[...] = array
    return rows


def poisoned(num_rows: int, size: int, dtype: Dtype) -> Rows:
    rows = Rows(num_rows, size, dtype)
    rows.array[...] = np.nan
    return rows


@settings(max_examples=60)
@given(
    num_rows=rows_strategy,
    num_in=inputs_strategy,
    num_out=outputs_strategy,
    dtype=weight_dtypes,
    out_dtype=out_dtypes,
    has_bias=st.booleans(),
    num_threads=thread_counts,
    seed=seeds,
)
def test_products_are_stored(
    library: Library,
    num_rows: int,
    num_in: int,
    num_out: int,
    dtype: Dtype,
    out_dtype: Dtype,
    has_bias: bool,
    num_threads: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    weight, x, bias = random(rng, num_out, num_in), random(rng, num_rows, num_in), random(rng, num_out)
    x_dtype = library.input_dtype(dtype)
    out = poisoned(num_rows, num_out, out_dtype)
    op = gemm(filled(x, x_dtype), Matrix.pack(library, weight, dtype), out, bias=bias if has_bias else None)
    run(library, num_threads, step_of([1] * num_rows), op)
    expected = rounded(x, x_dtype).astype(np.float64) @ rounded(weight, dtype).astype(np.float64).T
    assert_rows_close(out.array, expected + (bias if has_bias else 0), TOLERANCES[out_dtype])


@settings(max_examples=20)
@given(
    num_rows=rows_strategy,
    num_in=inputs_strategy,
    num_out=outputs_strategy,
    dtype=weight_dtypes,
    num_threads=thread_counts,
    seed=seeds,
)
def test_products_are_added(
    library: Library, num_rows: int, num_in: int, num_out: int, dtype: Dtype, num_threads: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weight, x, before = random(rng, num_out, num_in), random(rng, num_rows, num_in), random(rng, num_rows, num_out)
    x_dtype = library.input_dtype(dtype)
    out = filled(before, Dtype.FLOAT32)
    op = gemm(filled(x, x_dtype), Matrix.pack(library, weight, dtype), out, epilogue=Epilogue.ADD)
    run(library, num_threads, step_of([1] * num_rows), op)
    expected = before + rounded(x, x_dtype).astype(np.float64) @ rounded(weight, dtype).astype(np.float64).T
    assert_rows_close(out.array, expected, TOLERANCES[Dtype.FLOAT32])


@settings(max_examples=30)
@given(
    num_rows=rows_strategy,
    num_in=inputs_strategy,
    size=outputs_strategy,
    dtype=weight_dtypes,
    out_dtype=out_dtypes,
    has_bias=st.booleans(),
    num_threads=thread_counts,
    seed=seeds,
)
def test_gated_products(
    library: Library,
    num_rows: int,
    num_in: int,
    size: int,
    dtype: Dtype,
    out_dtype: Dtype,
    has_bias: bool,
    num_threads: int,
    seed: int,
) -> None:
    """The oracle multiplies by [gate, up]; the kernel by panels of the two in turns."""
    rng = np.random.default_rng(seed)
    gate, up = random(rng, 2, size, num_in)
    x = 2 * random(rng, num_rows, num_in)
    num_out = silu_mul_outputs(size)
    weight = Matrix(library, dtype, num_out, num_in)
    weight.pack_into(gate, 0, 2)
    weight.pack_into(up, 1, 2)
    bias = random(rng, num_out)
    gate_bias, up_bias = bias.reshape(-1, 2, 16).transpose(1, 0, 2).reshape(2, -1)[:, :size]
    x_dtype = library.input_dtype(dtype)
    out = poisoned(num_rows, size, out_dtype)
    op = gemm(filled(x, x_dtype), weight, out, bias=bias if has_bias else None, epilogue=Epilogue.SILU_MUL)
    run(library, num_threads, step_of([1] * num_rows), op)
    both = tensor(np.concatenate((rounded(gate, dtype), rounded(up, dtype)))).double()
    both_bias = tensor(np.concatenate((gate_bias, up_bias))).double() if has_bias else None
    expected = reference.silu_mul(F.linear(tensor(rounded(x, x_dtype)).double(), both, both_bias))
    assert_rows_close(out.array, expected.numpy(), TOLERANCES[out_dtype])


def test_gates_far_from_zero_stay_finite(library: Library) -> None:
    gates = np.array([-1e4, -100, -88, -50, 0, 50, 100, 1e4], dtype=np.float32)
    weight = Matrix(library, Dtype.FLOAT32, 32, 1)
    weight.pack_into(np.ones((16, 1), np.float32), 0, 2)
    weight.pack_into(np.ones((16, 1), np.float32), 1, 2)
    bias = np.repeat(np.array([0, 1], np.float32), 16)  # up = gate + 1
    out = Rows(8, 16, Dtype.FLOAT32)
    op = gemm(filled(gates[:, None], Dtype.FLOAT32), weight, out, bias=bias, epilogue=Epilogue.SILU_MUL)
    run(library, 1, step_of([8]), op)
    wide = gates.astype(np.float64)
    expected = wide * np.exp(-np.logaddexp(0, -wide)) * (wide + 1)
    np.testing.assert_allclose(out.array[:, 0], expected, rtol=1e-5, atol=1e-29)


@settings(max_examples=60)
@given(num_rows=rows_strategy, num_in=inputs_strategy, num_out=outputs_strategy, num_threads=thread_counts, seed=seeds)
def test_integer_products_are_exact(
    library: Library, num_rows: int, num_in: int, num_out: int, num_threads: int, seed: int
) -> None:
    """With scales of one, out is the product of the integers; extreme ones as well, which would saturate 16 bits."""
    rng = np.random.default_rng(seed)
    extremes, values = rng.random() < 0.5, rng.integers(-127, 128, (num_rows + num_out, num_in))
    if extremes:
        values = np.where(values < 0, -127, 127)
    values[num_rows:, 0] = 127  # the row's scale is 1
    x, weight = values[:num_rows], values[num_rows:]
    rows = filled(x.astype(np.int8), Dtype.INT8)
    assert rows.scales is not None
    rows.scales[...] = 1
    out = poisoned(num_rows, num_out, Dtype.FLOAT32)
    op = gemm(rows, Matrix.pack(library, weight.astype(np.float32), Dtype.INT8), out)
    run(library, num_threads, step_of([1] * num_rows), op)
    np.testing.assert_array_equal(out.array.astype(np.int64), x @ weight.T)


@settings(max_examples=30)
@given(num_rows=rows_strategy, size=inputs_strategy, num_threads=thread_counts, seed=seeds)
def test_rows_are_quantized_to_the_nearest_integer(
    library: Library, num_rows: int, size: int, num_threads: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = random(rng, num_rows, size) * 10.0 ** rng.integers(-6, 6, (num_rows, 1)).astype(np.float32)
    x[rng.integers(num_rows)] = 0
    out = Rows(num_rows, size, Dtype.INT8)
    run(library, num_threads, step_of([1] * num_rows), quantize(filled(x, Dtype.FLOAT32), out))
    assert out.scales is not None
    largest = np.abs(x).max(axis=1)
    np.testing.assert_allclose(out.scales, np.where(largest > 0, largest / 127, 1), rtol=1e-6)
    assert np.abs(out.array.astype(np.int32)).max() <= 127
    np.testing.assert_array_less(np.abs(out.array - x / out.scales[:, None]), 0.5001)


def test_quantized_products_are_near_the_exact_ones(library: Library) -> None:
    rng = np.random.default_rng(1)
    x, weight, bias = random(rng, 20, 200), random(rng, 50, 200), random(rng, 50)
    integers, out = Rows(20, 200, Dtype.INT8), Rows(20, 50, Dtype.FLOAT32)
    ops = (
        quantize(filled(x, Dtype.FLOAT32), integers),
        gemm(integers, Matrix.pack(library, weight, Dtype.INT8), out, bias=bias),
    )
    run(library, 2, step_of([20]), *ops)
    assert_rows_close(out.array, x.astype(np.float64) @ weight.T + bias, 0.02)


@pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.BFLOAT16])
def test_an_extent_of_samples_leaves_further_rows_alone(library: Library, dtype: Dtype) -> None:
    rng = np.random.default_rng(2)
    x, weight = random(rng, 9, 40), random(rng, 30, 40)
    x_dtype = library.input_dtype(dtype)
    out = poisoned(9, 30, Dtype.FLOAT32)
    op = gemm(filled(x, x_dtype), Matrix.pack(library, weight, dtype), out, extent=Extent.EACH_SAMPLE)
    run(library, 2, step_of([3, 3, 3], sampled=[0, 2]), op)
    assert_rows_close(out.array[:2], rounded(x, x_dtype)[:2] @ rounded(weight, dtype).T, 2e-5)
    assert np.isnan(out.array[2:]).all()


def test_products_of_ranks_land_in_their_columns(library: Library) -> None:
    """As logits do: rows of one array, of which each rank writes some columns."""
    rng = np.random.default_rng(3)
    x, weight = random(rng, 6, 40), random(rng, 50, 40)
    logits = np.full((6, 64), np.nan, dtype=np.float32)
    rows = filled(x, Dtype.FLOAT32)
    for begin, end in ((0, 23), (23, 50)):
        part = Matrix.pack(library, weight[begin:end], Dtype.FLOAT32)
        run(library, 2, step_of([6]), gemm(rows, part, Rows.of(logits[:, begin:end])))
    assert_rows_close(logits[:, :50], x @ weight.T, 2e-5)
    assert np.isnan(logits[:, 50:]).all()


def test_one_row_s_garbage_stays_its_own(library: Library) -> None:
    """Padding of the weight meets the row's own padding, not the next row."""
    for dtype in (Dtype.FLOAT32, Dtype.BFLOAT16):
        x = np.ones((9, 40), dtype=np.float32)
        x[1::2] = np.nan
        out = Rows(9, 20, Dtype.FLOAT32)
        weight = Matrix.pack(library, np.ones((20, 40), np.float32), dtype)
        run(library, 1, step_of([9]), gemm(filled(x, library.input_dtype(dtype)), weight, out))
        np.testing.assert_array_equal(out.array[::2], 40)
        assert np.isnan(out.array[1::2]).all()


def test_a_product_with_other_sizes_is_refused(native: Library) -> None:
    weight = Matrix(native, Dtype.FLOAT32, 32, 8)
    x, out = Rows(2, 8, Dtype.FLOAT32), Rows(2, 32, Dtype.FLOAT32)
    for given_x, given_out, epilogue in (
        (Rows(2, 9, Dtype.FLOAT32), out, Epilogue.STORE),
        (x, Rows(2, 31, Dtype.FLOAT32), Epilogue.STORE),
        (x, out, Epilogue.SILU_MUL),
        (x, Rows(2, 32, Dtype.BFLOAT16), Epilogue.ADD),
    ):
        with pytest.raises(ValueError, match="gemm"):
            gemm(given_x, weight, given_out, epilogue=epilogue)
