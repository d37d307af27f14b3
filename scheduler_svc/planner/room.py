"""How much room a sequence needs to start."""

from scheduler_svc.planner.sequence import Sequence
from scheduler_svc.planner.state import PlannerState


def num_needed_blocks(state: PlannerState, sequence: Sequence, found: list[int]) -> int:
    """How many free blocks ``sequence`` takes when it starts with those that were found."""
    num_blocks = -(-len(sequence.token_ids) // state.limits.block_size)
    return num_blocks - len(found) + state.pool.num_free_among(found)


def num_missing_blocks(state: PlannerState, sequence: Sequence, found: list[int]) -> int:
    """How many more blocks must become free before ``sequence`` can start. One per running sequence stays free, so that
    an arrival does not make the others preempt it at once."""
    return num_needed_blocks(state, sequence, found) + state.table.num_running - state.pool.num_free
