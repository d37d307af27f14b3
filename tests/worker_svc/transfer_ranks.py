"""The copying threads of ranks, in this process."""

import queue
from collections.abc import Sequence

from albireo.arrays import EMPTY_INT32
from albireo.plan import StepPlan
from albireo.security import OPEN
from albireo.transfers import Transfer, TransferResult
from worker_svc.kv_parts import KvCopies, KvShape
from worker_svc.kv_store import attach_to
from worker_svc.transfer_board import combine
from worker_svc.transfers import Attach, KvStore, Transfers

FINGERPRINT = bytes(range(32))
WAIT_S = 20


def transfers_plan(transfers: Sequence[Transfer], epoch: int = 1, step_id: int = 0) -> StepPlan:
    return StepPlan(epoch, step_id, None, EMPTY_INT32, transfers=tuple(transfers), only_transfers=True)


class TransferRank:
    """One rank's transfers, and what came of them. ``how``: an address, or what attaches to an arena."""

    def __init__(
        self, shape: KvShape, copies: KvCopies, num_blocks: int, how: str | Attach, share: float = 1.0
    ) -> None:
        self.shape, self.copies = shape, copies
        self.results: queue.Queue[TransferResult] = queue.Queue()
        self.failures: list[str] = []
        attach = attach_to(how, OPEN, None) if isinstance(how, str) else how
        store = KvStore(FINGERPRINT, shape, attach, share)
        self.transfers = Transfers(store, copies, num_blocks, self.results.put, self.failures.append)

    def take(self, plan: StepPlan) -> None:
        self.transfers.check(plan)
        self.transfers.put(plan)

    def result(self) -> TransferResult:
        return self.results.get(timeout=WAIT_S)

    def close(self) -> None:
        self.transfers.end()
        self.transfers.wait_until_ended()
        assert self.failures == []


def run_all(ranks: Sequence[TransferRank], transfer: Transfer) -> TransferResult:
    """Has all ranks of a group do a transfer."""
    for rank in ranks:
        rank.take(transfers_plan([transfer]))
    return combine([rank.result() for rank in ranks])
