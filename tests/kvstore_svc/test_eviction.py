"""What the index keeps of conversations, beside plain LRU and ARC over single blocks.

The trace has the shape of published ones: conversations of several turns, each a longer prefix of the same chain, a few
system prompts that most of them share (Zipf), and many conversations between two turns of one.
"""

import heapq
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from albireo.kv.fingerprint import Namespace
from kvstore_svc.index import Index

NUM_CONVERSATIONS = 4000
BLOCKS_OF_PROMPT = 12
FRAME = 1024
NAMESPACE = Namespace(b"e" * 32, num_parts=1, part_bytes=FRAME - 64)
Chain = list[bytes]


def trace(seed: int = 0) -> Iterator[Chain]:
    """The chain of each turn, in the order in which they come."""
    rng = np.random.default_rng(seed)
    turns: list[tuple[float, int, int]] = []
    lengths: dict[int, list[int]] = {}
    prompts = {}
    for conversation in range(NUM_CONVERSATIONS):
        num_turns = int(rng.geometric(0.28))
        prompts[conversation] = int(min(rng.zipf(1.4), 200))
        grown = np.cumsum(np.minimum(1 + rng.lognormal(2.0, 0.9, num_turns), 120)).astype(int)
        lengths[conversation] = [BLOCKS_OF_PROMPT + int(each) for each in grown]
        start = conversation * 10.0
        for turn, gap in enumerate(np.cumsum(rng.lognormal(5.5, 1.2, num_turns))):
            heapq.heappush(turns, (start + float(gap), conversation, turn))
    while turns:
        _, conversation, turn = heapq.heappop(turns)
        num = lengths[conversation][turn]
        yield [
            f"p{prompts[conversation]}.{i}".encode() if i < BLOCKS_OF_PROMPT else f"c{conversation}.{i}".encode()
            for i in range(num)
        ]


class IndexCache:
    """Our index, as a planner uses it: acquire, reserve, commit, release."""

    def __init__(self, num_blocks: int) -> None:
        self._index = Index(num_blocks * FRAME, 8 * FRAME)
        self._session = self._index.open_session(1, "p", 1, NAMESPACE, sys.maxsize)

    def use(self, chain: Chain) -> int:
        hits = len(self._index.acquire(self._session, 1, chain, 0.0))
        reserved = self._index.reserve(self._session, 2, chain, [], "t", 0.0)
        self._index.commit(self._session, 2, [True] * len(reserved.blocks))
        self._index.release(self._session, 1)
        return hits


class Lru:
    """Blocks one by one, in the order of the chain."""

    def __init__(self, num_blocks: int) -> None:
        self._num = num_blocks
        self._blocks: OrderedDict[bytes, None] = OrderedDict()

    def use(self, chain: Chain) -> int:
        hits = prefix_of(chain, self._blocks.__contains__)
        for each in chain:
            self._blocks[each] = None
            self._blocks.move_to_end(each)
            if len(self._blocks) > self._num:
                self._blocks.popitem(last=False)
        return hits


class Arc:
    """Megiddo and Modha, 2003."""

    def __init__(self, num_blocks: int) -> None:
        self._num = num_blocks
        self._target = 0.0
        # Seen once, seen more often; and of both, what has lately left.
        self._once, self._often, self._once_gone, self._often_gone = (OrderedDict[bytes, None]() for _ in range(4))

    def use(self, chain: Chain) -> int:
        hits = prefix_of(chain, lambda each: each in self._once or each in self._often)
        for each in chain:
            self._use(each)
        return hits

    def _use(self, each: bytes) -> None:
        once, often, once_gone, often_gone = self._once, self._often, self._once_gone, self._often_gone
        if each in once or each in often:
            once.pop(each, None)
            often.pop(each, None)
            often[each] = None
            return
        if each in once_gone:
            self._target = min(self._num, self._target + max(1.0, len(often_gone) / len(once_gone)))
        elif each in often_gone:
            self._target = max(0.0, self._target - max(1.0, len(once_gone) / len(often_gone)))
        if each in once_gone or each in often_gone:
            self._replace(each in often_gone)
            once_gone.pop(each, None)
            often_gone.pop(each, None)
            often[each] = None
            return
        if len(once) + len(once_gone) == self._num:
            if len(once) < self._num:
                once_gone.popitem(last=False)
                self._replace(False)
            else:
                once.popitem(last=False)
        elif len(once) + len(often) + len(once_gone) + len(often_gone) >= self._num:
            if len(once) + len(often) + len(once_gone) + len(often_gone) >= 2 * self._num:
                often_gone.popitem(last=False)
            if len(once) + len(often) >= self._num:
                self._replace(False)
        once[each] = None

    def _replace(self, comes_from_often: bool) -> None:
        if len(self._once) + len(self._often) < self._num:
            return
        num_once = len(self._once)
        takes_once = num_once and (num_once > self._target or (comes_from_often and num_once == self._target))
        if takes_once or not self._often:
            self._once_gone[self._once.popitem(last=False)[0]] = None
        else:
            self._often_gone[self._often.popitem(last=False)[0]] = None


def prefix_of(chain: Chain, is_there: Callable[[bytes], bool]) -> int:
    return next((i for i, each in enumerate(chain) if not is_there(each)), len(chain))


def hit_rate(cache: IndexCache | Lru | Arc, turns: list[Chain]) -> float:
    """Blocks found as a prefix, of all that were asked for."""
    return sum(cache.use(chain) for chain in turns) / sum(map(len, turns))


@pytest.mark.soak
def test_hit_rates_beside_lru_and_arc(capsys: pytest.CaptureFixture[str]) -> None:
    """The index is never worse than plain LRU, which evicts the beginnings of chains first."""
    turns = list(trace())
    num_blocks = len({each for chain in turns for each in chain})
    longest = max(map(len, turns))
    lines = [f"{len(turns)} turns, {num_blocks} blocks", "capacity   index     LRU     ARC"]
    for part in (0.02, 0.05, 0.10, 0.25):
        num = max(longest, int(part * num_blocks))
        index, lru, arc = (hit_rate(kind(num), turns) for kind in (IndexCache, Lru, Arc))
        lines.append(f"{part:>8.0%}{index:>8.3f}{lru:>8.3f}{arc:>8.3f}")
        assert index >= lru
    with capsys.disabled():
        print("\n" + "\n".join(lines))  # noqa: T201  # the point of the test
