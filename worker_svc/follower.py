"""A rank that is not the leader, as its compute thread sees it."""

import contextlib
import threading
import time
from pathlib import Path

from albireo.errors import GroupError
from albireo.plan import StepResult, decode_plan
from albireo.transfers import TransferResult, encode_transfer_result
from albireo.v1 import plan_pb2
from worker_svc.batch import BatchState
from worker_svc.intake import Intake
from worker_svc.life import Meeting, Membership
from worker_svc.relay import RelayClient


class Follower:
    """Does what the leader says. In each group an I/O thread receives plans and prepares them."""

    def __init__(self, rank: int, relay_path: Path) -> None:
        self._rank = rank
        self._relay_path = relay_path
        self._relay: RelayClient | None = None
        self.loop = None  # it has no gRPC

    def report_progress(self, stage: str, progress: float) -> None:
        """The leader reports its own."""

    def meet(self, membership: Membership, info: plan_pb2.GroupInfo) -> Meeting:
        relay = self._relay = RelayClient(self._relay_path, self._rank, info.num_blocks, membership.check)
        meeting = relay.receive_meeting()
        # From here on, so that a leader that goes away is noticed while this thread joins the others.
        state = BatchState.of_group(info, meeting.num_blocks)
        threading.Thread(target=_receive_plans, args=(relay, state, membership), name="io", daemon=True).start()
        return meeting

    def become_ready(self, membership: Membership, info: plan_pb2.GroupInfo) -> None:
        assert self._relay is not None
        self._relay.send_ready()

    def report(self, result: StepResult) -> None:
        """The leader reports the same."""

    def report_transfer(self, result: TransferResult) -> None:
        assert self._relay is not None
        with contextlib.suppress(GroupError):  # a leader that is gone breaks the group by its silence
            self._relay.send_transferred(encode_transfer_result(result).SerializeToString())

    def part(self, reason: str) -> None:
        if self._relay is not None:
            self._relay.close()

    def close(self) -> None:
        pass


def _receive_plans(relay: RelayClient, state: BatchState, membership: Membership) -> None:
    """The I/O thread of one group."""
    try:
        data = relay.receive_plan()  # none comes before all ranks are ready, as this one's transfers then are
        intake = Intake(state, membership.steps, membership.transfers)
        while True:
            received_at_ns = time.monotonic_ns()
            if data is not None:
                intake.take(decode_plan(data), received_at_ns)
            elif membership.transfers is not None:
                membership.transfers.abandon()
            data = relay.receive_plan()
    except GroupError as error:
        membership.break_up(str(error))
