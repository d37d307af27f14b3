"""What KV store and group answer about blocks on their way."""

from albireo.errors import GroupError
from albireo.transfers import TransferResult
from scheduler_svc.planner.loads import fetch_blocks, finish_load
from scheduler_svc.planner.prefix import forget_coming
from scheduler_svc.planner.state import PlannerState
from scheduler_svc.planner.store_messages import Acquired, Reply, Reserved
from scheduler_svc.planner.stores import finish_store, place_blocks
from scheduler_svc.planner.transfers import Load, Store, Transfers


def apply_reply(state: PlannerState, transfers: Transfers, reply: Reply) -> None:
    """The store answers a request."""
    job = transfers.asked.pop(reply.request_id)
    if isinstance(job, Store):
        assert not isinstance(reply, Acquired)
        place_blocks(transfers, state.pool, job, reply, last_step=state.next_step_id - 1)
    else:
        assert not isinstance(reply, Reserved)
        fetch_blocks(state, transfers, job, reply)


def apply_result(state: PlannerState, result: TransferResult) -> None:
    """The group is through with a transfer. Raises GroupError when it is none of this epoch's."""
    job = state.transfers.moving.pop(result.transfer_id, None) if state.transfers is not None else None
    if job is None or len(result.succeeded) != len(job.blocks):
        expected = "none" if job is None else f"one of {len(job.blocks)}"
        raise GroupError(
            f"result of transfer {result.transfer_id} with {len(result.succeeded)} blocks where {expected} was expected"
        )
    assert state.transfers is not None
    if isinstance(job, Store):
        finish_store(state.transfers, state.pool, job, result)
    else:
        finish_load(state, state.transfers, job, result)


def lose_store(state: PlannerState, transfers: Transfers) -> None:
    """The store is gone, with all that it offered. Whoever waits for blocks goes on without; requests are denied."""
    transfers.lose_store()
    for job in transfers.moving.values():
        if isinstance(job, Load) and not job.is_void:
            job.is_void = True
            del transfers.loading[job.sequence]
            forget_coming(state.coming, job.sequence)
