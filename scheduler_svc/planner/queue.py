"""Sequences that wait for a slot."""

import heapq
from collections import defaultdict

from scheduler_svc.planner.sequence import Place, Sequence, Status
from scheduler_svc.planner.tenants import Tenants

Order = tuple[int, float, int]


class WaitingQueue:
    """Higher priority first, then the tenant that has been served least, then earlier arrival.

    A sequence that ends while it waits is skipped when it is met; `num_waiting` counts those that really wait.
    """

    def __init__(self, tenants: Tenants) -> None:
        self.num_waiting = 0
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
        self.num_waiting -= 1

    def forget(self) -> None:
        """One of the sequences here has ended; the caller changes its status."""
        self.num_waiting -= 1
