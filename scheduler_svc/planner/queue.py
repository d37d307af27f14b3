"""Sequences that wait for a slot."""

import heapq
from collections import Counter, defaultdict

from scheduler_svc.planner.sequence import Place, Sequence, Status
from scheduler_svc.planner.tenants import Tenants

Order = tuple[int, float, int]


class WaitingQueue:
    """Higher priority first, then the tenant that has been served least, then earlier arrival.

    A sequence that ends while it waits is skipped when it is met.

    Attributes:
        num_waiting: those that really wait.
        num_waiting_of: of them, those of a tenant, by its index.
        num_waiting_tokens: what they have, all of which are computed if the prefix cache has none of them.
    """

    def __init__(self, tenants: Tenants) -> None:
        self.num_waiting = self.num_waiting_tokens = 0
        self.num_waiting_of: Counter[int] = Counter()
        self._tenants = tenants
        self._heaps: defaultdict[int, list[tuple[Place, Sequence]]] = defaultdict(list)  # by tenant; none is empty

    def order_of(self, sequence: Sequence) -> Order:
        """Sorts sequences, waiting or not, by who is served first."""
        place = sequence.place
        return place.negative_priority, self._tenants.served(sequence.tenant), place.arrival

    def push(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        heapq.heappush(self._heaps[sequence.tenant], (sequence.place, sequence))
        self.num_waiting += 1
        self.num_waiting_of[sequence.tenant] += 1
        self.num_waiting_tokens += len(sequence.token_ids)

    def peek(self) -> Sequence | None:
        """The first in order."""
        for tenant in list(self._heaps):
            heap = self._heaps[tenant]
            while heap and heap[0][1].status is not Status.WAITING:
                heapq.heappop(heap)
            if not heap:
                del self._heaps[tenant]
        if not self._heaps:
            return None
        return min((heap[0][1] for heap in self._heaps.values()), key=self.order_of)

    def pop(self, sequence: Sequence) -> None:
        """Removes the one that `peek` returned."""
        first = heapq.heappop(self._heaps[sequence.tenant])
        assert first[1] is sequence
        self.forget(sequence)

    def forget(self, sequence: Sequence) -> None:
        """One of the sequences here waits no longer; where it has ended, the caller changes its status."""
        self.num_waiting -= 1
        self.num_waiting_of[sequence.tenant] -= 1
        self.num_waiting_tokens -= len(sequence.token_ids)
