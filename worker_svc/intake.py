"""What the I/O thread of any rank does with a plan: its step goes to the compute thread, its transfers to the copying
thread. A plan that does not fit has no effect but on the batch state."""

from albireo.errors import GroupError
from albireo.plan import StepPlan
from worker_svc.batch import BatchState
from worker_svc.compute import StepQueue, prepare
from worker_svc.transfers import Transfers


class Intake:
    """Takes the plans of one stream, in order.

    Args:
        transfers: None where the group has no KV store.
    """

    def __init__(self, state: BatchState, steps: StepQueue, transfers: Transfers | None) -> None:
        self._state = state
        self._steps = steps
        self._transfers = transfers

    def take(self, plan: StepPlan, received_at_ns: int) -> None:
        """Raises GroupError when the plan does not follow the last one, or does not fit."""
        self._check(plan)
        if plan.only_transfers:
            self._state.check_order(plan)
            self._put_transfers(plan)
            return
        step = prepare(self._state, plan, received_at_ns)
        self._put_transfers(plan)
        self._steps.put(step)

    def _check(self, plan: StepPlan) -> None:
        if self._transfers is not None:
            self._transfers.check(plan)
        elif plan.transfers:
            raise GroupError(f"step {plan.step_id}: transfers, and the group has no KV store")

    def _put_transfers(self, plan: StepPlan) -> None:
        if self._transfers is not None:
            self._transfers.put(plan)
