"""The block pool: who may write which KV block, what blocks hold, and when they may be used again.

Plain lists: a step touches a handful of blocks, for which numpy's calls would cost more than the work.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Blocks with reference counts, frees that wait behind a fence, and a cache of what unreferenced blocks hold.

    A block is *held* (reference count > 0), *fenced* (nobody's, but a step in flight still reads or writes it) or
    *free* (may be allocated). A block with a hash can be found by it and held again as long as it is not allocated
    anew, fenced or not; free blocks without a hash go first, then those least recently given back.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_fenced = 0
        self.num_evicted = 0  # hashes forgotten because their blocks were needed
        self._ref_counts = [0] * num_blocks
        self._last_steps = [-1] * num_blocks  # the last planned that touches a block
        self._completed_step = -1
        self._is_fenced = [False] * num_blocks
        self._fenced: defaultdict[int, list[int]] = defaultdict(list)  # by the step that they wait for
        # A stack: lately freed blocks, still warm in caches, are used first.
        self._plain = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # free blocks with a hash, least recently used first
        self._hashes: dict[int, bytes] = {}
        self._blocks: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._plain) + len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_free - self.num_fenced

    @property
    def num_cached(self) -> int:
        """Blocks that can be found by a hash."""
        return len(self._hashes)

    def allocate(self, num: int) -> list[int]:
        """Takes ``num`` free blocks, each with one reference. The caller has checked ``num_free``."""
        if num > self.num_free:
            raise AssertionError(f"{num} blocks asked of {self.num_free} free ones")
        self._evict(num - len(self._plain))
        start = len(self._plain) - num
        blocks = self._plain[start:]
        del self._plain[start:]
        for block in blocks:
            self._ref_counts[block] = 1
        return blocks

    def give_back(self, blocks: Iterable[int], last_step: int) -> None:
        """Drops one reference of each of ``blocks`` (no repeats among them), in the order of their sequence.

        Those that nobody holds any more become free when the last step that touches them has completed: for this
        holder that is ``last_step``; others may have named a later one.
        """
        unheld = []
        for block in blocks:
            assert self._ref_counts[block] > 0, "a block was given back twice"
            self._ref_counts[block] -= 1
            self._last_steps[block] = fence = max(self._last_steps[block], last_step)
            if self._ref_counts[block]:
                continue
            if fence > self._completed_step:
                self._is_fenced[block] = True
                self._fenced[fence].append(block)
                self.num_fenced += 1
            else:
                unheld.append(block)
        self._free(unheld)

    def release(self, step_id: int) -> None:
        """Step ``step_id`` has completed: what it fenced is free, save what is held again."""
        self._completed_step = step_id
        unheld = []
        for block in self._fenced.pop(step_id, ()):
            # A block may be here twice: given back, found again and given back once more behind the same step.
            if self._is_fenced[block] and self._last_steps[block] == step_id:
                self._is_fenced[block] = False
                unheld.append(block)
        self.num_fenced -= len(unheld)
        self._free(unheld)

    # Blocks by what they hold.

    def publish(self, blocks: Iterable[int], hashes: Iterable[bytes]) -> None:
        """Lets held blocks be found: block i holds what hash i names once the steps planned so far have run, and is not
        written again. A hash that is known already keeps its block."""
        for block, block_hash in zip(blocks, hashes, strict=True):
            if block_hash not in self._blocks and block not in self._hashes:
                self._blocks[block_hash] = block
                self._hashes[block] = block_hash

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the leading ones of ``hashes`` that are known."""
        found = []
        for block_hash in hashes:
            block = self._blocks.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def num_free_among(self, blocks: Sequence[int]) -> int:
        """How many of ``blocks`` would no longer be free if they were held."""
        return sum(block in self._cached for block in blocks)

    def hold(self, blocks: Sequence[int]) -> None:
        """Adds a reference to each of ``blocks``, which `find` has just returned."""
        for block in blocks:
            if self._is_fenced[block]:
                self._is_fenced[block] = False
                self.num_fenced -= 1
            elif not self._ref_counts[block]:
                del self._cached[block]
            self._ref_counts[block] += 1

    def forget_cache(self) -> None:
        """Nothing can be found any more; held blocks stay held."""
        self._hashes.clear()
        self._blocks.clear()
        self._plain.extend(self._cached)
        self._cached.clear()

    def _free(self, blocks: list[int]) -> None:
        # The end of a sequence goes before its beginning, which more sequences may share.
        for block in reversed(blocks):
            if block in self._hashes:
                self._cached[block] = None
            else:
                self._plain.append(block)

    def _evict(self, num: int) -> None:
        """Forgets what the ``num`` least recently used free blocks hold."""
        for _ in range(num):
            block, _ = self._cached.popitem(last=False)
            del self._blocks[self._hashes.pop(block)]
            self._plain.append(block)
            self.num_evicted += 1
