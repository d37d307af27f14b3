"""The block pool: who may write which KV block, and when a block may be used again."""

from collections import defaultdict

import numpy as np

from albireo.arrays import Int32Array


class BlockPool:
    """Blocks with reference counts, and frees that wait behind a fence.

    A block is *free* (may be allocated), *held* (reference count > 0) or *fenced*: given back, but still read or
    written by a step in flight. `release` ends the fence of one step once its result is in.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = np.zeros(num_blocks, dtype=np.int32)
        # A stack: the first num_free entries are free; lately freed blocks, still warm in caches, are used first.
        self._free = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)
        self.num_free = num_blocks
        self.num_fenced = 0
        self._fenced: defaultdict[int, list[Int32Array]] = defaultdict(list)

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_free - self.num_fenced

    def allocate(self, num: int) -> Int32Array:
        """Takes ``num`` free blocks, each with one reference. The caller has checked ``num_free``."""
        if num > self.num_free:
            raise AssertionError(f"{num} blocks asked of {self.num_free} free ones")
        self.num_free -= num
        blocks = self._free[self.num_free : self.num_free + num].copy()
        self._ref_counts[blocks] = 1
        return blocks

    def share(self, blocks: Int32Array) -> None:
        """Adds a reference to each of ``blocks``, which are held."""
        assert (self._ref_counts[blocks] > 0).all()
        self._ref_counts[blocks] += 1

    def give_back(self, blocks: Int32Array, fence: int | None) -> None:
        """Drops one reference of each of ``blocks`` (no repeats among them).

        Those that nobody holds any more become free when step ``fence``, the last that touches them, has completed;
        None when no step in flight touches them.
        """
        assert (self._ref_counts[blocks] > 0).all(), "a block was given back twice"
        self._ref_counts[blocks] -= 1
        unheld = blocks[self._ref_counts[blocks] == 0]
        if fence is None:
            self._push(unheld)
        else:
            self._fenced[fence].append(unheld)
            self.num_fenced += len(unheld)

    def release(self, step_id: int) -> None:
        """Step ``step_id`` has completed: what it fenced is free."""
        for blocks in self._fenced.pop(step_id, ()):
            self.num_fenced -= len(blocks)
            self._push(blocks)

    def _push(self, blocks: Int32Array) -> None:
        self._free[self.num_free : self.num_free + len(blocks)] = blocks
        self.num_free += len(blocks)
