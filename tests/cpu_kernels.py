"""What tests of the compiled kernels share: steps of any rows, and one operation run by itself."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from albireo_kernels.cpu import BLOCK, UNPINNED, Device, Dtype, Library, Op, Program, Sampling, StepData, make_step

Array = npt.NDArray[Any]

# Relative to the largest element of a row.
TOLERANCES = {Dtype.FLOAT32: 2e-5, Dtype.BFLOAT16: 2.0**-8}


def step_of(
    lengths: Sequence[int],
    before: Sequence[int] | None = None,
    sampled: Sequence[int] = (),
    tables: npt.NDArray[np.int32] | None = None,
    **given: Any,
) -> StepData:
    """A step of rows with ``lengths`` tokens each; every row is its own slot.

    Args:
        before: tokens of each row that were computed before; by default none.
        sampled: rows that are sampled from, greedily.
        tables: blocks of each row; by default 0, 1, ... in order.
        given: arrays in place of those made here.
    """
    rows, samples = len(lengths), np.array(sampled, dtype=np.int64)
    starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    begins = np.zeros(rows, dtype=np.int64) if before is None else np.array(before, dtype=np.int64)
    contexts = begins + np.diff(starts)
    row_of = np.repeat(np.arange(rows), np.diff(starts))
    positions = np.arange(starts[-1]) - starts[row_of] + begins[row_of]
    if tables is None:
        width = int(-(-contexts.max(initial=1) // BLOCK))
        tables = np.arange(rows * width, dtype=np.int32).reshape(rows, width)
    arrays = {
        "token_ids": np.zeros(starts[-1], dtype=np.int32),
        "from_last_token": np.zeros(starts[-1], dtype=np.bool_),
        "token_slots": row_of.astype(np.int32),
        "positions": positions,
        "slot_mapping": tables[row_of, positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK,
        "query_starts": starts,
        "context_lens": contexts.astype(np.int32),
        "block_tables": tables,
        "sample_tokens": starts[samples + 1] - 1,
        "sample_slots": samples.astype(np.int32),
        "sampling": Sampling.greedy(len(samples)),
        "last_tokens": np.zeros(rows, dtype=np.int32),
    }
    return make_step(**{**arrays, **given})


class Devices:
    """Lone devices of every library and number of threads that a test asks for."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._devices: dict[tuple[Library, int], Device] = {}

    def get(self, library: Library, num_threads: int) -> Device:
        key = (library, num_threads)
        if key not in self._devices:
            device = self._stack.enter_context(Device(library, [UNPINNED] * num_threads))
            device.join(None, 0, 1, timeout_s=1.0)
            self._devices[key] = device
        return self._devices[key]

    def close(self) -> None:
        self._stack.close()


DEVICES = Devices()


def run(library: Library, num_threads: int, step: StepData, *ops: Op) -> None:
    DEVICES.get(library, num_threads).run(Program(ops), step)


def to_bfloat16(array: Array) -> Array:
    """Rounded to bfloat16, as float32."""
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)


def rounded(array: Array, dtype: Dtype) -> Array:
    """As float32, rounded to what ``dtype`` can hold."""
    return to_bfloat16(array) if dtype is Dtype.BFLOAT16 else array.astype(np.float32)


def tensor(array: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def assert_rows_close(actual: Array, expected: Array, tolerance: float) -> None:
    """Each element of [rows, size] within ``tolerance`` of its row's largest."""
    wide = np.asarray(expected, dtype=np.float64)
    scales = np.abs(wide).max(axis=-1, keepdims=True, initial=1e-6)
    np.testing.assert_array_less(np.abs(actual.astype(np.float64) - wide) / scales, tolerance)
