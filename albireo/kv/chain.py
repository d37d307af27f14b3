"""Packed ranges of block hashes, the form in which chains travel."""

from collections.abc import Sequence

HASH_BYTES = 32
ANCHOR_BYTES = 8
BLOCKS_PER_ANCHOR = 64


def anchors_of(hashes: Sequence[bytes]) -> list[bytes]:
    """The anchors of a chain's blocks: 64 in a row lie on one node of a Redis cluster.

    Args:
        hashes: of the blocks from the beginning of the chain.
    Returns:
        For each block, the first 8 bytes of the hash that begins its run of 64.
    """
    return [hashes[i - i % BLOCKS_PER_ANCHOR][:ANCHOR_BYTES] for i in range(len(hashes))]


def split(packed: bytes, size: int) -> list[bytes]:
    """Items of ``size`` bytes each; ValueError when ``packed`` is no whole number of them."""
    if len(packed) % size:
        raise ValueError(f"{len(packed)} bytes: no multiple of {size}")
    return [packed[start : start + size] for start in range(0, len(packed), size)]
