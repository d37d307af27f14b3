"""Packed little-endian arrays, the form in which numbers travel between services."""

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
UInt32Array = npt.NDArray[np.uint32]
UInt64Array = npt.NDArray[np.uint64]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

_INT32 = np.dtype("<i4")
EMPTY_INT32: Int32Array = np.zeros(0, dtype=_INT32)
EMPTY_INT32.flags.writeable = False
_UINT64 = np.dtype("<u8")
_FLOAT32 = np.dtype("<f4")


def pack_int32(values: npt.ArrayLike) -> bytes:
    if values is EMPTY_INT32:
        return b""
    return np.asarray(values, dtype=_INT32).tobytes()


def unpack_int32(data: bytes) -> Int32Array:
    """A read-only view; ValueError when ``data`` is no whole number of elements."""
    return np.frombuffer(data, dtype=_INT32) if data else EMPTY_INT32


def pack_uint64(values: npt.ArrayLike) -> bytes:
    return np.asarray(values, dtype=_UINT64).tobytes()


def unpack_uint64(data: bytes) -> UInt64Array:
    """A read-only view; ValueError when ``data`` is no whole number of elements."""
    return np.frombuffer(data, dtype=_UINT64)


def pack_float32(values: npt.ArrayLike) -> bytes:
    return np.asarray(values, dtype=_FLOAT32).tobytes()


def unpack_float32(data: bytes) -> Float32Array:
    """A read-only view; ValueError when ``data`` is no whole number of elements."""
    return np.frombuffer(data, dtype=_FLOAT32)
