"""The keys of sampling noise, for every engine. What they key is defined in `albireo_kernels.reference.sampling`."""

import numpy as np

from albireo.arrays import Int64Array, UInt64Array

_INCREMENT, _FIRST_FACTOR, _SECOND_FACTOR, *_SHIFTS = map(
    np.uint64, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 30, 27, 31)
)


def row_keys(seeds: UInt64Array, positions: Int64Array) -> UInt64Array:
    """The key of each row's noise: k0 in the low half, k1 in the high one.

    Args:
        seeds: [num_rows], of the requests.
        positions: [num_rows], index of the sampled token in its sequence's output.
    """
    return _splitmix64(_splitmix64(seeds) + positions.view(np.uint64))


def _splitmix64(x: UInt64Array) -> UInt64Array:
    x = x + _INCREMENT
    x = (x ^ (x >> _SHIFTS[0])) * _FIRST_FACTOR
    x = (x ^ (x >> _SHIFTS[1])) * _SECOND_FACTOR
    return x ^ (x >> _SHIFTS[2])
