"""The memory that kernels work on: aligned arrays, packed matrices, rows of activations, blocks of the KV cache."""

import math
import mmap
from ctypes import byref
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from albireo.arrays import Float32Array
from albireo_kernels.cpu.library import Library
from albireo_kernels.cpu.structs import BLOCK, PANEL, Dtype, MatrixStruct, RowsStruct

AnyArray = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

ALIGNMENT = 64
SPARE_ROWS = 15  # tiles of 16 rows are read whole

_PAGE_BYTES = 4096
_HUGE_PAGE_BYTES = 2 << 20
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def allocate(shape: int | tuple[int, ...], dtype: npt.DTypeLike, huge: bool = True) -> AnyArray:
    """Zeros in memory of their own, aligned to 64 bytes; the system gives its pages when they are first used.

    Args:
        huge: asks for huge pages, where the array fills one.
    """
    of = np.dtype(dtype)
    num_bytes = math.prod(shape) * of.itemsize if isinstance(shape, tuple) else shape * of.itemsize
    return _zero_bytes(num_bytes, huge)[:num_bytes].view(of).reshape(shape)


def address(array: AnyArray) -> int:
    """Where an array begins."""
    return int(array.__array_interface__["data"][0])


class Matrix:
    """A packed weight [num_out, num_in].

    Attributes:
        data: its panels, as bytes.
        scales, sums: [panels * 16] of int8 weights; else None.
        c: what kernels are given.
    """

    def __init__(self, library: Library, dtype: Dtype, num_out: int, num_in: int, data: Bytes | None = None) -> None:
        """Zeros, or what ``data`` holds: bytes that stay the caller's, aligned to 64. Not for float16.

        Raises:
            ValueError: ``data`` has another size.
        """
        num_bytes, padded_in = library.matrix_bytes(dtype, num_out, num_in)
        if data is not None and data.nbytes != num_bytes:
            raise ValueError(f"a {dtype.name} matrix [{num_out}, {num_in}] has {num_bytes} bytes, not {data.nbytes}")
        self.data: Bytes = allocate(num_bytes, np.uint8) if data is None else data
        self.dtype, self.num_out, self.num_in = dtype, num_out, num_in
        num_padded_out = -(-num_out // PANEL) * PANEL
        is_int8 = dtype is Dtype.INT8
        self.scales = allocate(num_padded_out, np.float32) if is_int8 else None
        self.sums = allocate(num_padded_out, np.int32) if is_int8 else None
        self.c = MatrixStruct(
            data=address(self.data),
            scales=None if self.scales is None else address(self.scales),
            sums=None if self.sums is None else address(self.sums),
            dtype=dtype,
            num_out=num_out,
            num_in=num_in,
            padded_in=padded_in,
        )
        self._library = library

    @classmethod
    def pack(cls, library: Library, rows: AnyArray, dtype: Dtype) -> Self:
        """Packs [num_out, num_in] of float32, float16 or bfloat16 (also as uint16)."""
        matrix = cls(library, dtype, *rows.shape)
        matrix.pack_into(rows)
        return matrix

    def pack_into(self, rows: AnyArray, first_panel: int = 0, panel_step: int = 1) -> None:
        """Packs rows as the outputs of panels first_panel, first_panel + panel_step, ...

        Zero rows fill up the last panel.

        Args:
            rows: [at most what the panels take, num_in]; the elements of a row lie side by side.
        Raises:
            ValueError: the rows do not fit.
        """
        last_panel = first_panel + (-(-len(rows) // PANEL) - 1) * panel_step
        if rows.ndim != 2 or rows.shape[1] != self.num_in or last_panel >= -(-self.num_out // PANEL):
            raise ValueError(
                f"{rows.shape} does not fit a matrix [{self.num_out}, {self.num_in}] from panel {first_panel} on"
            )
        source = _with_dense_rows(rows)
        self._library.c.albireo_pack(
            byref(self.c),
            address(source),
            Dtype.of(source),
            source.strides[0] // source.itemsize,
            len(source),
            first_panel,
            panel_step,
        )

    def unpack(self) -> Float32Array:
        """[num_out, num_in]."""
        rows = np.zeros((self.num_out, self.num_in), dtype=np.float32)
        self._library.c.albireo_unpack(byref(self.c), address(rows), self.num_in)
        return rows


class Rows:
    """Activations [num_rows, size], each row padded to 64 bytes, with spare rows behind them.

    Attributes:
        array: the elements that are used, a view.
        scales: [num_rows] of int8 rows; else None.
        c: what kernels are given.
    """

    def __init__(self, num_rows: int, size: int, dtype: Dtype, data: Bytes | None = None) -> None:
        """Zeros, or what ``data`` holds: at least `num_bytes` bytes that stay the caller's, aligned to 64.

        Raises:
            ValueError: ``data`` is too small.
        """
        num_bytes = self.num_bytes(num_rows, size, dtype)
        if data is None:
            data = allocate(num_bytes, np.uint8)
        elif data.nbytes < num_bytes:
            raise ValueError(f"{num_rows} {dtype.name} rows of {size} need {num_bytes} bytes, not {data.nbytes}")
        padded = data[:num_bytes].view(dtype.numpy).reshape(num_rows + SPARE_ROWS, -1)
        self._set(padded[:num_rows, :size], dtype)

    @classmethod
    def of(cls, array: AnyArray) -> Self:
        """Rows that lie in an array [num_rows, size] of any row stride: without padding, thus only to be written.

        Raises:
            ValueError: the elements of a row do not lie side by side.
        """
        if array.ndim != 2 or (array.shape[1] > 1 and array.strides[1] != array.itemsize):
            raise ValueError(f"rows of shape {array.shape} and strides {array.strides}")
        rows = cls.__new__(cls)
        rows._set(array, Dtype.of(array))
        return rows

    @staticmethod
    def num_bytes(num_rows: int, size: int, dtype: Dtype) -> int:
        """Bytes of rows with their padding and spare rows."""
        return (num_rows + SPARE_ROWS) * _padded(size * dtype.numpy.itemsize)

    def _set(self, array: AnyArray, dtype: Dtype) -> None:
        self.array, self.dtype = array, dtype
        self.num_rows, self.size = array.shape
        self.stride = array.strides[0] // array.itemsize
        scales = allocate(self.num_rows + SPARE_ROWS, np.float32) if dtype is Dtype.INT8 else None
        self.scales = None if scales is None else scales[: self.num_rows]
        self.c = RowsStruct(
            data=address(array),
            scales=None if scales is None else address(scales),
            stride=self.stride,
            dtype=dtype,
            size=self.size,
        )


class KvBlocks:
    """Keys and values of one layer: packed blocks of 32 tokens.

    Attributes:
        keys, values: [num_blocks, num_kv_heads, bytes of a block].
    """

    def __init__(self, library: Library, dtype: Dtype, num_blocks: int, num_kv_heads: int, head_dim: int) -> None:
        keys, values = self.allocate(library, dtype, 1, num_blocks, num_kv_heads, head_dim)
        self._set(library, dtype, head_dim, keys[0], values[0])

    @staticmethod
    def allocate(
        library: Library, dtype: Dtype, num_layers: int, num_blocks: int, num_kv_heads: int, head_dim: int
    ) -> tuple[Bytes, Bytes]:
        """Keys and values of all layers, each [num_layers, num_blocks, num_kv_heads, bytes of a block]."""
        shape = num_layers, num_blocks, num_kv_heads
        key_bytes, _ = library.matrix_bytes(dtype, BLOCK, head_dim)
        value_bytes, _ = library.matrix_bytes(dtype, head_dim, BLOCK)
        return allocate((*shape, key_bytes), np.uint8), allocate((*shape, value_bytes), np.uint8)

    @classmethod
    def of(cls, library: Library, dtype: Dtype, head_dim: int, keys: Bytes, values: Bytes) -> Self:
        """One layer of what `allocate` gave."""
        blocks = cls.__new__(cls)
        blocks._set(library, dtype, head_dim, keys, values)
        return blocks

    def _set(self, library: Library, dtype: Dtype, head_dim: int, keys: Bytes, values: Bytes) -> None:
        self.keys, self.values = keys, values
        self.dtype, self.num_kv_heads, self.head_dim = dtype, keys.shape[1], head_dim
        self._library = library

    @staticmethod
    def block_bytes(library: Library, dtype: Dtype, num_kv_heads: int, head_dim: int) -> int:
        """Bytes of one block, keys and values, all KV heads."""
        key_bytes, _ = library.matrix_bytes(dtype, BLOCK, head_dim)
        value_bytes, _ = library.matrix_bytes(dtype, head_dim, BLOCK)
        return num_kv_heads * (key_bytes + value_bytes)

    def key_matrix(self, block: int, head: int) -> Matrix:
        """The keys [32, head_dim] of a block and a KV head, in place."""
        return Matrix(self._library, self.dtype, BLOCK, self.head_dim, self.keys[block, head])

    def value_matrix(self, block: int, head: int) -> Matrix:
        """The values [head_dim, 32] of a block and a KV head, in place."""
        return Matrix(self._library, self.dtype, self.head_dim, BLOCK, self.values[block, head])


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _zero_bytes(num_bytes: int, huge: bool) -> Bytes:
    if num_bytes < _PAGE_BYTES:
        memory = np.zeros(num_bytes + ALIGNMENT, dtype=np.uint8)
        return memory[-address(memory) % ALIGNMENT :]
    if not huge or num_bytes < _HUGE_PAGE_BYTES:
        return np.frombuffer(mmap.mmap(-1, num_bytes, flags=_PRIVATE), dtype=np.uint8)
    pages = mmap.mmap(-1, num_bytes + _HUGE_PAGE_BYTES, flags=_PRIVATE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(pages, dtype=np.uint8)
    return memory[-address(memory) % _HUGE_PAGE_BYTES :]


def _with_dense_rows(rows: AnyArray) -> AnyArray:
    is_dense = rows.strides[1] == rows.itemsize and rows.strides[0] % rows.itemsize == 0 and rows.strides[0] >= 0
    return rows if is_dense else np.ascontiguousarray(rows)
