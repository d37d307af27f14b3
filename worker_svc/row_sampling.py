"""Sampling parameters, by slot and by the rows of a step."""

from dataclasses import dataclass

import numpy as np

from albireo.arrays import Float32Array, Int32Array, Int64Array, UInt64Array, unpack_int32
from albireo.errors import GroupError
from albireo.v1 import plan_pb2

_INT32_MAX = 2**31 - 1

# All of a slot lies together: a step gathers it for its rows with one call.
_SAMPLING = np.dtype(
    [("temperature", "f4"), ("top_p", "f4"), ("top_k", "i4"), ("min_tokens", "i4"), ("seed", "u8")], align=True
)


@dataclass(frozen=True, slots=True)
class RowSampling:
    """Sampling parameters of a step's sampling rows; arrays [S], S rows.

    Attributes:
        temperature: 0 means greedy.
        top_p: 1 means all.
        top_k: 0 means all.
        suppressed: (row, ids that must not be sampled there now), for rows below their min_tokens.
    """

    temperature: Float32Array
    top_p: Float32Array
    top_k: Int32Array
    seed: UInt64Array
    suppressed: tuple[tuple[int, Int32Array], ...]


class SlotSampling:
    """Sampling parameters by slot."""

    def __init__(self, max_num_seqs: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._of_slot = np.zeros(max_num_seqs, dtype=_SAMPLING)
        self._suppressed = [np.zeros(0, dtype=np.int32)] * max_num_seqs

    def set(self, slot: int, sampling: plan_pb2.Sampling) -> None:
        top_k, min_tokens = min(sampling.top_k, _INT32_MAX), min(sampling.min_tokens, _INT32_MAX)
        self._of_slot[slot] = (sampling.temperature, sampling.top_p, top_k, min_tokens, sampling.seed)
        self._suppressed[slot] = unpack_int32(sampling.suppressed_token_ids)
        check_range("suppressed token", self._suppressed[slot], 0, self._vocab_size)

    def rows(self, slots: Int32Array, output_positions: Int64Array) -> RowSampling:
        """The parameters of a step's sampling rows; a copy, since slots change hands while the step waits."""
        of_row = self._of_slot[slots]
        return RowSampling(
            temperature=of_row["temperature"],
            top_p=of_row["top_p"],
            top_k=of_row["top_k"],
            seed=of_row["seed"],
            suppressed=tuple(
                (int(row), self._suppressed[slots[row]])
                for row in np.flatnonzero(output_positions < of_row["min_tokens"])
            ),
        )


def check_range(what: str, values: Int32Array, start: int, stop: int) -> None:
    """Raises GroupError where a value is not in ``start`` .. ``stop`` - 1."""
    if len(values) and (values - start if start else values).view(np.uint32).max() >= stop - start:  # negative: huge
        raise GroupError(f"{what} {values.min()} .. {values.max()}: not in {start} .. {stop - 1}")
