"""Transfers under way in a group, as its leader knows them: a transfer is over when all ranks have told."""

import asyncio
from collections.abc import Iterable

import numpy as np

from albireo.arrays import BoolArray
from albireo.transfers import Transfer, TransferResult


class TransferBoard:
    """Combines what ``tp_size`` ranks report. ``is_clear``: nothing is under way."""

    def __init__(self, tp_size: int) -> None:
        self._tp_size = tp_size
        self._results: dict[int, list[TransferResult]] = {}
        self.is_clear = asyncio.Event()
        self.is_clear.set()

    def put(self, transfers: Iterable[Transfer]) -> None:
        for transfer in transfers:
            self._results[transfer.transfer_id] = []
            self.is_clear.clear()

    def clear(self) -> None:
        """The group is broken: nothing of it counts any more."""
        self._results.clear()
        self.is_clear.set()

    def add(self, result: TransferResult) -> TransferResult | None:
        """A rank is through with a transfer. Returns what became of it on all ranks, once all are."""
        results = self._results.get(result.transfer_id, [])
        results.append(result)
        if len(results) < self._tp_size:  # or it is of a group that has broken meanwhile
            return None
        del self._results[result.transfer_id]
        if not self._results:
            self.is_clear.set()
        return combine(results)


def combine(results: list[TransferResult]) -> TransferResult:
    """Of one transfer on all ranks. A block has moved where all ranks have moved their parts of it."""
    succeeded: BoolArray = np.logical_and.reduce([result.succeeded for result in results])
    return TransferResult(
        results[0].transfer_id,
        succeeded,
        sum(result.num_bytes for result in results),
        max(result.duration_ns for result in results),
    )
