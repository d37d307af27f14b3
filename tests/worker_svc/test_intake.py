"""What a rank's I/O thread refuses, and in which order things get where they belong."""

import pytest
from arena_server import places, transfer
from transfer_ranks import transfers_plan

from albireo.arrays import EMPTY_INT32
from albireo.errors import GroupError
from albireo.plan import StepPlan, decode_rows
from albireo.transfers import KvLease, TransferKind
from worker_svc.batch import BatchState
from worker_svc.compute import PreparedStep, StepQueue
from worker_svc.intake import Intake

NO_ROWS = decode_rows(EMPTY_INT32)


@pytest.fixture
def steps() -> StepQueue:
    return StepQueue()


@pytest.fixture
def intake(steps: StepQueue) -> Intake:
    """Of a group without a KV store."""
    return Intake(BatchState(4, 64, 32, 64, 100, 64), steps, None)


def test_steps_are_put_in_order(intake: Intake, steps: StepQueue):
    for step_id in range(5, 8):
        intake.take(StepPlan(1, step_id, NO_ROWS), 10)
    for step_id in range(5, 8):
        step = steps.get()
        assert isinstance(step, PreparedStep)
        assert (step.step_id, step.received_at_ns) == (step_id, 10)


def test_a_plan_of_transfers_alone_is_no_step(intake: Intake, steps: StepQueue):
    """It has its place among the steps, and takes none."""
    intake.take(transfers_plan([], step_id=5), 0)
    intake.take(StepPlan(1, 5, NO_ROWS), 0)
    with pytest.raises(GroupError, match="step 5 where step 6 follows"):
        intake.take(transfers_plan([], step_id=5), 0)
    step = steps.get()
    assert isinstance(step, PreparedStep)
    steps.end()
    assert steps.get() is None


def test_without_a_store_there_are_no_transfers(intake: Intake):
    store = transfer(TransferKind.STORE, [0], [0], places(0, 1, 8, 256), KvLease(bytes(16), 0, 0))
    with pytest.raises(GroupError, match="step 5: transfers, and the group has no KV store"):
        intake.take(transfers_plan([store], step_id=5), 0)
