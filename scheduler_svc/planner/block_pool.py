"""The block pool: who may write which KV block, what blocks hold, and when they may be used again."""

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from albireo.arrays import BoolArray, Int32Array, Int64Array


class BlockPool:
    """Blocks with reference counts, frees that wait behind a fence, and a cache of what unreferenced blocks hold.

    A block is *held* (reference count > 0), *fenced* (nobody's, but a step in flight still reads or writes it) or
    *free* (may be allocated). A block with a hash can be found by it and held again as long as it is not allocated
    anew, fenced or not; free blocks without a hash go first, then those least recently given back.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self.num_fenced = 0
        self.num_evicted = 0  # hashes forgotten because their blocks were needed
        self._ref_counts = np.zeros(num_blocks, dtype=np.int32)
        self._last_steps: Int64Array = np.full(num_blocks, -1, dtype=np.int64)  # the last planned that touches a block
        self._completed_step = -1
        self._is_fenced: BoolArray = np.zeros(num_blocks, dtype=np.bool_)
        self._fenced: defaultdict[int, list[Int32Array]] = defaultdict(list)
        # A stack: the first entries are free; lately freed blocks, still warm in caches, are used first.
        self._plain = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)
        self._num_plain = num_blocks
        self._cached: OrderedDict[int, None] = OrderedDict()  # free blocks with a hash, least recently used first
        self._hashes: dict[int, bytes] = {}
        self._blocks: dict[bytes, int] = {}

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_free - self.num_fenced

    @property
    def num_cached(self) -> int:
        """Blocks that can be found by a hash."""
        return len(self._hashes)

    def allocate(self, num: int) -> Int32Array:
        """Takes ``num`` free blocks, each with one reference. The caller has checked ``num_free``."""
        if num > self.num_free:
            raise AssertionError(f"{num} blocks asked of {self.num_free} free ones")
        if num > self._num_plain:
            self._evict(num - self._num_plain)
        self.num_free -= num
        self._num_plain -= num
        blocks = self._plain[self._num_plain : self._num_plain + num].copy()
        self._ref_counts[blocks] = 1
        return blocks

    def give_back(self, blocks: Int32Array, last_step: int) -> None:
        """Drops one reference of each of ``blocks`` (no repeats among them), in the order of their sequence.

        Those that nobody holds any more become free when the last step that touches them has completed: for this
        holder that is ``last_step``; others may have named a later one.
        """
        assert (self._ref_counts[blocks] > 0).all(), "a block was given back twice"
        self._ref_counts[blocks] -= 1
        self._last_steps[blocks] = np.maximum(self._last_steps[blocks], last_step)
        unheld = blocks[self._ref_counts[blocks] == 0]
        fences = self._last_steps[unheld]
        for fence in np.unique(fences[fences > self._completed_step]).tolist():
            fenced = unheld[fences == fence]
            self._is_fenced[fenced] = True
            self._fenced[fence].append(fenced)
            self.num_fenced += len(fenced)
        self._free(unheld[fences <= self._completed_step])

    def release(self, step_id: int) -> None:
        """Step ``step_id`` has completed: what it fenced is free, save what is held again."""
        self._completed_step = step_id
        fenced = self._fenced.pop(step_id, None)
        if fenced is None:
            return
        # A block may be here twice: given back, found again and given back once more behind the same step.
        blocks = np.array(list(dict.fromkeys(np.concatenate(fenced).tolist())), dtype=np.int32)
        blocks = blocks[self._is_fenced[blocks] & (self._last_steps[blocks] == step_id)]
        self._is_fenced[blocks] = False
        self.num_fenced -= len(blocks)
        self._free(blocks)

    # Blocks by what they hold.

    def publish(self, blocks: Iterable[int], hashes: Sequence[bytes]) -> None:
        """Lets held blocks be found: block i holds what hash i names once the steps planned so far have run, and is not
        written again. A hash that is known already keeps its block."""
        for block, block_hash in zip(blocks, hashes, strict=True):
            if block_hash not in self._blocks and block not in self._hashes:
                self._blocks[block_hash] = block
                self._hashes[block] = block_hash

    def find(self, hashes: Iterable[bytes]) -> Int32Array:
        """The blocks of the leading ones of ``hashes`` that are known."""
        found = []
        for block_hash in hashes:
            block = self._blocks.get(block_hash)
            if block is None:
                break
            found.append(block)
        return np.array(found, dtype=np.int32)

    def forget_cache(self) -> None:
        """Nothing can be found any more; held blocks stay held."""
        self._hashes.clear()
        self._blocks.clear()
        cached = np.fromiter(self._cached, dtype=np.int32)
        self._cached.clear()
        self._plain[self._num_plain : self._num_plain + len(cached)] = cached
        self._num_plain += len(cached)

    def num_free_among(self, blocks: Int32Array) -> int:
        """How many of ``blocks`` would no longer be free if they were held."""
        return int(((self._ref_counts[blocks] == 0) & ~self._is_fenced[blocks]).sum())

    def hold(self, blocks: Int32Array) -> None:
        """Adds a reference to each of ``blocks``, which `find` has just returned."""
        unheld = blocks[self._ref_counts[blocks] == 0]
        fenced = self._is_fenced[unheld]
        self._is_fenced[unheld] = False
        self.num_fenced -= int(fenced.sum())
        for block in unheld[~fenced].tolist():
            del self._cached[block]
        self.num_free -= int((~fenced).sum())
        self._ref_counts[blocks] += 1

    def _free(self, blocks: Int32Array) -> None:
        self.num_free += len(blocks)
        if self._hashes:
            is_known = np.array([block in self._hashes for block in blocks.tolist()], dtype=np.bool_)
            # The end of a sequence goes before its beginning, which more sequences may share.
            for block in blocks[is_known][::-1].tolist():
                self._cached[block] = None
            blocks = blocks[~is_known]
        self._plain[self._num_plain : self._num_plain + len(blocks)] = blocks
        self._num_plain += len(blocks)

    def _evict(self, num: int) -> None:
        """Forgets what the ``num`` least recently used free blocks hold."""
        for _ in range(num):
            block, _ = self._cached.popitem(last=False)
            del self._blocks[self._hashes.pop(block)]
            self._plain[self._num_plain] = block
            self._num_plain += 1
        self.num_evicted += num
