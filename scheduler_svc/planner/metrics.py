"""The planner's Prometheus metrics, read from what there is anyway when they are asked for."""

from collections.abc import Callable, Sized
from dataclasses import dataclass

from albireo.arrays import Float64Array, Int64Array
from albireo.ledger import PLANNER_COLUMNS, Ledger
from albireo.metrics import LedgerHistograms, Readings
from scheduler_svc.planner.state import PlannerState


@dataclass(slots=True)
class Counts:
    """What has happened since the start."""

    num_steps: int = 0
    num_tokens: int = 0
    num_recoveries: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_overdue: int = 0


def register_metrics(state: PlannerState, counts: Counts, frontends: Sized, ledger: Ledger) -> LedgerHistograms:
    """Makes all metrics known to Prometheus; the histograms must be folded now and then."""
    Readings(
        gauges={
            "albireo_running_sequences": ("Sequences that own a slot", lambda: state.table.num_running),
            "albireo_waiting_sequences": ("Sequences in the queue", lambda: state.queue.num_waiting),
            "albireo_active_tenants": ("Tenants with sequences", lambda: state.tenants.num_active),
            "albireo_kv_blocks_used": ("KV blocks held by sequences", lambda: state.pool.num_held),
            "albireo_kv_blocks_cached": ("KV blocks that the prefix cache finds", lambda: state.pool.num_cached),
            "albireo_kv_blocks": ("KV blocks in all", lambda: state.pool.num_blocks),
            "albireo_steps_in_flight": ("Plans sent without a result yet", lambda: len(state.in_flight)),
            "albireo_frontends": ("Front ends attached", lambda: len(frontends)),
        },
        counters={
            "albireo_planned_steps": ("Steps planned", lambda: counts.num_steps),
            "albireo_output_tokens": ("Output tokens committed", lambda: counts.num_tokens),
            "albireo_prompt_tokens": ("Prompt tokens of sequences that began", lambda: counts.num_prompt_tokens),
            "albireo_cached_tokens": ("Of them, found in the prefix cache", lambda: counts.num_cached_tokens),
            "albireo_preemptions": ("Sequences preempted", lambda: state.num_preemptions),
            "albireo_overdue": ("Sequences dropped because of their deadline", lambda: counts.num_overdue),
            "albireo_recoveries": ("Times that a lost group came back", lambda: counts.num_recoveries),
        },
    )
    return LedgerHistograms(
        ledger,
        {
            "albireo_plan_seconds": ("T1: making a plan", _seconds("plan_start_at_ns", "plan_end_at_ns")),
            "albireo_commit_seconds": ("T5: booking tokens", _seconds("commit_start_at_ns", "commit_end_at_ns")),
            "albireo_deliver_seconds": ("T5: handing on tokens", _seconds("deliver_start_at_ns", "deliver_end_at_ns")),
            "albireo_step_turnaround_seconds": (
                "From a plan's leaving to its result, the steps before it included",
                _seconds("plan_end_at_ns", "result_at_ns"),
            ),
        },
    )


def _seconds(start: str, end: str) -> Callable[[Int64Array], Float64Array]:
    first, last = PLANNER_COLUMNS.index(start), PLANNER_COLUMNS.index(end)
    return lambda rows: (rows[:, last] - rows[:, first]) / 1e9
