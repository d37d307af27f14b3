"""Words that look random, for the truth machine."""

import numpy as np

from albireo.arrays import UInt64Array

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(words: UInt64Array) -> UInt64Array:
    """splitmix64's finaliser (Steele, Lea, Flood 2014), element by element."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
