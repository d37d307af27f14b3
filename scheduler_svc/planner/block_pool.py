"""The block pool: who may write which KV block, what blocks hold, and when they may be used again.

Plain lists: a step touches a handful of blocks, for which numpy's calls would cost more than the work.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from albireo.arrays import Int32Array, pack_int32
from albireo.cache_events import Cached, Stored
from scheduler_svc.planner.cache_follower import CacheFollower


@dataclass(slots=True, eq=False, weakref_slot=True)
class CacheShare:
    """What the cache keeps of a tenant with a limit: so many free blocks, least recently used first."""

    limit: int
    blocks: OrderedDict[int, None] = field(default_factory=OrderedDict)


class BlockPool:
    """Blocks with reference counts, frees that wait behind a fence, and a cache of what unreferenced blocks hold.

    A block is *held* (reference count > 0), *fenced* (nobody's, but a step in flight or a transfer still reads or
    writes it) or *free* (may be allocated). A block with a hash can be found by it and held again as long as it is not
    allocated anew, fenced or not; free blocks without a hash go first, then those least recently given back.

    What can be found is remembered with its tokens, 0.3 KiB a block, whether or not anybody follows the cache: whoever
    begins to must be told all of it.

    Args:
        followers: those of the pool whose place this one takes.

    Attributes:
        followers: who is told what can be found, by front end.
    """

    def __init__(self, num_blocks: int, followers: dict[int, CacheFollower] | None = None) -> None:
        self.num_blocks = num_blocks
        self.num_fenced = 0
        self.num_evicted = 0  # hashes forgotten because their blocks were needed
        self._ref_counts = [0] * num_blocks
        self._last_steps = [-1] * num_blocks  # the last planned that touches a block
        self._completed_step = -1
        self._is_fenced = [False] * num_blocks
        self._num_transfers = [0] * num_blocks  # that read or write a block
        self._fenced: defaultdict[int, list[int]] = defaultdict(list)  # by the step that they wait for
        # A stack: lately freed blocks, still warm in caches, are used first.
        self._plain = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # free blocks with a hash, least recently used first
        self._hashes: dict[int, bytes] = {}
        self._shares: dict[int, CacheShare] = {}  # of blocks with a hash whose tenant has a limit
        # A share lives as long as a block is of it, so those of bygone tenants need no clearing up.
        self._shares_by_root: WeakValueDictionary[bytes, CacheShare] = WeakValueDictionary()
        self._blocks: dict[bytes, int] = {}
        self._contents: Cached = {}  # of the same hashes
        self.followers = followers or {}
        for follower in self.followers.values():
            follower.reset()

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
            if fence <= self._completed_step and not self._num_transfers[block]:
                unheld.append(block)
                continue
            self._is_fenced[block] = True
            self.num_fenced += 1
            if fence > self._completed_step:
                self._fenced[fence].append(block)
        self._free(unheld)

    def release(self, step_id: int) -> None:
        """Step ``step_id`` has completed: what it fenced is free, save what is held again."""
        self._completed_step = step_id
        unheld = []
        for block in self._fenced.pop(step_id, ()):
            # A block may be here twice: given back, found again and given back once more behind the same step.
            if self._is_fenced[block] and self._last_steps[block] == step_id and not self._num_transfers[block]:
                self._is_fenced[block] = False
                unheld.append(block)
        self.num_fenced -= len(unheld)
        self._free(unheld)

    def fence(self, blocks: Iterable[int]) -> None:
        """A transfer reads or writes ``blocks``, which somebody holds or `find` has just returned: until `unfence` they
        are not free, whoever gives them back."""
        for block in blocks:
            if not self._ref_counts[block] and not self._is_fenced[block]:
                self._uncache(block)
                self._is_fenced[block] = True
                self.num_fenced += 1
            self._num_transfers[block] += 1

    def unfence(self, blocks: Iterable[int]) -> None:
        """The transfer is over: those that nobody holds are free, unless steps in flight still touch them."""
        unheld = []
        for block in blocks:
            self._num_transfers[block] -= 1
            is_last = not self._num_transfers[block] and self._last_steps[block] <= self._completed_step
            if self._is_fenced[block] and is_last:
                self._is_fenced[block] = False
                unheld.append(block)
        self.num_fenced -= len(unheld)
        self._free(unheld)

    # Blocks by what they hold.

    def share_of(self, root: bytes, limit: int) -> CacheShare:
        """Of the tenant whose chains of hashes begin with ``root``."""
        return self._shares_by_root.setdefault(root, CacheShare(limit))

    def publish(
        self,
        blocks: Sequence[int],
        hashes: Sequence[bytes],
        parent_hash: bytes,
        token_ids: Int32Array,
        share: CacheShare | None = None,
    ) -> None:
        """Lets held blocks be found: block i holds what hash i names once the steps planned so far have run, and is not
        written again. A hash that is known already keeps its block.

        Args:
            parent_hash: of the block before the first; empty: it begins a prompt.
            token_ids: of all these blocks, the same number each.
            share: what they count for while they are free; None: there is no limit.
        """
        data = pack_int32(token_ids)
        stride = len(data) // max(1, len(blocks))
        start = 0
        for block, block_hash in zip(blocks, hashes, strict=True):
            if block_hash not in self._blocks and block not in self._hashes:
                self._blocks[block_hash] = block
                self._hashes[block] = block_hash
                if share is not None:
                    self._shares[block] = share
                content = self._contents[block_hash] = (parent_hash, data[start : start + stride])
                if self.followers:
                    self._tell_stored(Stored(block_hash, *content))
            parent_hash = block_hash
            start += stride

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
                self._uncache(block)
            self._ref_counts[block] += 1

    def forget_cache(self) -> None:
        """Nothing can be found any more; held blocks stay held."""
        self._hashes.clear()
        self._blocks.clear()
        self._contents.clear()
        self._plain.extend(self._cached)
        self._cached.clear()
        self._shares.clear()
        for follower in self.followers.values():
            follower.reset()

    def follow(self, index: int, follower: CacheFollower) -> None:
        """``follower`` is told all that can be found, and what changes from now on."""
        self.followers[index] = follower
        follower.begin(self._contents.copy())

    def _tell_stored(self, block: Stored) -> None:
        for follower in self.followers.values():
            follower.store(block)

    def _free(self, blocks: list[int]) -> None:
        # The end of a sequence goes before its beginning, which more sequences may share.
        for block in reversed(blocks):
            if block in self._hashes:
                self._cached[block] = None
                if (share := self._shares.get(block)) is not None:
                    share.blocks[block] = None
                    if len(share.blocks) > share.limit:
                        self._forget(next(iter(share.blocks)))
            else:
                self._plain.append(block)

    def _evict(self, num: int) -> None:
        """Forgets what the ``num`` least recently used free blocks hold."""
        for _ in range(num):
            self._forget(next(iter(self._cached)))

    def _forget(self, block: int) -> None:
        """A free block cannot be found any more."""
        self._uncache(block)
        self._shares.pop(block, None)
        block_hash = self._hashes.pop(block)
        del self._blocks[block_hash], self._contents[block_hash]
        self._plain.append(block)
        self.num_evicted += 1
        for follower in self.followers.values():
            follower.remove(block_hash)

    def _uncache(self, block: int) -> None:
        del self._cached[block]
        if (share := self._shares.get(block)) is not None:
            del share.blocks[block]
