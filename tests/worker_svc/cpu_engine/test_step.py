"""What of a batch has to be worked out for the device."""

import numpy as np

from albireo_kernels.noise import row_keys
from albireo_kernels.reference.sampling import noise_keys
from worker_svc.cpu_engine.step import _suppressed
from worker_svc.row_sampling import RowSampling


def test_noise_keys_are_those_of_the_reference() -> None:
    generator = np.random.default_rng(3)
    seeds = generator.integers(0, 2**64, 50, dtype=np.uint64)
    positions = generator.integers(0, 2**40, 50)
    low, high = noise_keys(seeds, positions)
    keys = row_keys(seeds, positions)
    np.testing.assert_array_equal(keys & np.uint64(2**32 - 1), low.astype(np.uint64))
    np.testing.assert_array_equal(keys >> np.uint64(32), high.astype(np.uint64))


def test_suppressed_ids_of_rows() -> None:
    ids = [np.array([5, 3], np.int32), np.zeros(0, np.int32), np.array([9], np.int32)]
    nothing = np.zeros(5)
    sampling = RowSampling(nothing, nothing, nothing, nothing, ((1, ids[0]), (2, ids[1]), (4, ids[2])))
    starts, joined = _suppressed(sampling, 5)
    assert starts.tolist() == [0, 0, 2, 2, 2, 3]
    assert joined.tolist() == [5, 3, 9]
    starts, joined = _suppressed(RowSampling(nothing, nothing, nothing, nothing, ()), 5)
    assert starts.tolist() == [0] * 6
    assert len(joined) == 0
