"""What one replay of a program works on: the inputs of a step, as arrays that are read in place."""

from typing import Any

import numpy as np
import numpy.typing as npt

from albireo.arrays import EMPTY_INT32, Int32Array, Int64Array
from albireo_kernels.cpu.buffers import AnyArray, address
from albireo_kernels.cpu.sampling import Logprobs, Sampling
from albireo_kernels.cpu.structs import Status, StepStruct


class StepData:
    """What one replay works on, and what became of it; made by `make_step`.

    Attributes:
        tokens: [S], valid once the step is complete.
        logprobs: of rows that want them, then too.
    """

    def __init__(
        self, c: StepStruct, tokens: Int32Array, logprobs: Logprobs | None, inputs: tuple[object, ...]
    ) -> None:
        self.c, self.tokens, self.logprobs = c, tokens, logprobs
        self._inputs = inputs

    @property
    def status(self) -> Status:
        return Status(self.c.status)

    @property
    def forward_ns(self) -> int:
        """Time from the step's begin to the end of its forward program."""
        return int(self.c.forward_end_at_ns - self.c.start_at_ns)

    @property
    def collective_ns(self) -> int:
        """Time spent in waits for other ranks."""
        return int(self.c.collective_ns)


def make_step(
    *,
    token_ids: Int32Array,
    from_last_token: npt.NDArray[np.bool_],
    token_slots: Int32Array,
    positions: Int64Array,
    slot_mapping: Int64Array,
    query_starts: Int64Array,
    context_lens: Int32Array,
    block_tables: Int32Array,
    sample_tokens: Int64Array,
    sample_slots: Int32Array,
    sampling: Sampling,
    last_tokens: Int32Array,
    scored_token_ids: Int32Array = EMPTY_INT32,
    tokens: Int32Array | None = None,
) -> StepData:
    """The data of a step; the arrays are read while it runs, not copied.

    Args:
        token_ids: [N], undefined where from_last_token: there it is the last token of the slot.
        from_last_token, token_slots, positions: [N].
        slot_mapping: [N], block * 32 + offset, where a token's key and value go.
        query_starts: [R + 1], where each row's tokens begin.
        context_lens: [R].
        block_tables: [R, widest], rows of any stride.
        sample_tokens: [S], indices of the tokens after which one is sampled; none twice.
        sample_slots: [S - scored].
        sampling: of the S rows.
        last_tokens: [slots]; written.
        scored_token_ids: the last rows take these tokens and no slot learns of them: what counts are their logprobs.
        tokens: [S], where the sampled tokens go; by default an array of the step's own.
    Raises:
        ValueError: an array has another type or shape, or does not lie in one piece.
    """
    num_tokens, num_rows, num_samples = len(token_ids), len(context_lens), len(sample_tokens)
    if tokens is None:
        tokens = np.zeros(num_samples, dtype=np.int32)
    _check_vectors(num_tokens, _PER_TOKEN, token_ids, from_last_token, token_slots, positions, slot_mapping)
    _check_vectors(num_rows, _PER_ROW, context_lens)
    _check_vectors(num_rows + 1, _STARTS, query_starts)
    _check_vectors(num_samples, _PER_SAMPLE, sample_tokens, tokens)
    _check_vectors(num_samples - len(scored_token_ids), _PER_ROW, sample_slots)
    _check_vectors(len(scored_token_ids), _PER_ROW, scored_token_ids)
    _check_vectors(len(last_tokens), _PER_ROW, last_tokens)
    has_dense_rows = block_tables.size == 0 or block_tables.strides[1] == 4  # empty arrays may have no strides
    if block_tables.dtype != np.int32 or len(block_tables) != num_rows or not has_dense_rows:
        raise ValueError(f"block_tables: {block_tables.dtype} {block_tables.shape}, strides {block_tables.strides}")
    inputs = (
        token_ids,
        from_last_token,
        token_slots,
        positions,
        slot_mapping,
        query_starts,
        context_lens,
        block_tables,
        sample_tokens,
        sample_slots,
        scored_token_ids,
    )
    c = StepStruct(
        num_tokens,
        num_rows,
        num_samples,
        len(scored_token_ids),
        block_tables.strides[0] // 4,
        *map(address, inputs),
        sampling.struct(num_samples),
        address(tokens),
        address(last_tokens),
    )
    return StepData(c, tokens, sampling.logprobs, (*inputs, sampling, last_tokens))


_Types = tuple[type[Any], ...]
_PER_TOKEN: _Types = (np.int32, np.bool_, np.int32, np.int64, np.int64)
_PER_ROW: _Types = (np.int32,)
_STARTS: _Types = (np.int64,)
_PER_SAMPLE: _Types = (np.int64, np.int32)


def _check_vectors(size: int, dtypes: _Types, *arrays: AnyArray) -> None:
    for index, (array, dtype) in enumerate(zip(arrays, dtypes, strict=True)):
        if array.dtype != dtype or array.shape != (size,) or not array.flags.c_contiguous:
            wanted = f"{np.dtype(dtype)} [{size}] in one piece"
            raise ValueError(f"array {index} is {array.dtype} {array.shape}, where {wanted} is needed")
