"""What of a batch has to be worked out for the device."""

import numpy as np

from albireo_kernels.noise import row_keys
from albireo_kernels.reference.sampling import noise_keys


def test_noise_keys_are_those_of_the_reference() -> None:
    generator = np.random.default_rng(3)
    seeds = generator.integers(0, 2**64, 50, dtype=np.uint64)
    positions = generator.integers(0, 2**40, 50)
    low, high = noise_keys(seeds, positions)
    keys = row_keys(seeds, positions)
    np.testing.assert_array_equal(keys & np.uint64(2**32 - 1), low.astype(np.uint64))
    np.testing.assert_array_equal(keys >> np.uint64(32), high.astype(np.uint64))
