"""Front ends' messages change the planner's state. Bounds are checked again: no front end can bypass them."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import grpc
import numpy as np

from albireo.block_hash import root_hash
from albireo.limits import MAX_LOGPROBS
from albireo.v1 import frontend_pb2
from scheduler_svc.planner.admission import find_blocks
from scheduler_svc.planner.commit import Ended
from scheduler_svc.planner.deadlines import watch_deadline
from scheduler_svc.planner.messages import Refused
from scheduler_svc.planner.rates import StepRates
from scheduler_svc.planner.sampling import checked_sampling, token_ids
from scheduler_svc.planner.sequence import EndReason, Place, Sequence
from scheduler_svc.planner.state import PlannerState, end, submit

_MAX_REMAINING_S = 1e9
_root_hash = functools.lru_cache(maxsize=1024)(root_hash)


@dataclass(frozen=True, slots=True)
class Arrived:
    """What a front end's message brought. Sequences that are resumed may be over with what they have.

    Attributes:
        refused: (sequence id, why).
        ended: resumed with their last token; they never enter the state.
    """

    refused: list[tuple[int, Refused]]
    ended: list[Ended]


def apply_message(
    state: PlannerState,
    frontend: int,
    message: frontend_pb2.FrontendMessage,
    arrival: int,
    now_ns: int,
    rates: StepRates,
) -> Arrived:
    """Applies one message of a front end. ``arrival`` numbers the message's first sequence."""
    arrived = Arrived([], [])
    for offset, request in enumerate(message.submits):
        try:
            if not request.is_resumed:
                _check_allowance(state, request.tenant)
            sequence = _sequence(state, frontend, request, arrival + offset)
            sequence.submitted_ns = now_ns
            ended = _already_over(sequence)
            least_ns = _least_ns(state, sequence, request, rates) if ended is None else 0
        except Refused as refused:
            arrived.refused.append((request.sequence_id, refused))
            continue
        if ended is not None:
            arrived.ended.append(ended)
            continue
        submit(state, sequence, request.tenant)
        if request.remaining_s:
            sequence.deadline_ns = now_ns + int(request.remaining_s * 1e9)
            watch_deadline(state, sequence, least_ns)
    if message.flushes_cache:
        state.pool.forget_cache()
    for truncate in message.truncates:
        _end_if_known(state, frontend, truncate.sequence_id, truncate.num_kept)
    for sequence_id in message.cancels:
        _end_if_known(state, frontend, sequence_id)
    return arrived


def abort_labelled(state: PlannerState, aborts: Iterable[frontend_pb2.Abort]) -> list[Sequence]:
    """Ends every sequence with one of these request labels, whichever front end it came by; returns them."""
    anyones = {each.request_id for each in aborts if not each.HasField("tenant")}
    secret = state.limits.kv_secret
    of_tenants = {(each.request_id, _root_hash(each.tenant, secret)) for each in aborts if each.HasField("tenant")}
    aborted = [
        sequence
        for sequence in state.sequences.values()
        if sequence.request_id in anyones or (sequence.request_id, sequence.root) in of_tenants
    ]
    for sequence in aborted:
        end(state, sequence)
    return aborted


def end_all_of(state: PlannerState, frontend: int) -> None:
    """A front end is gone: the lease of its sequences is over."""
    for sequence in [one for one in state.sequences.values() if one.frontend == frontend]:
        end(state, sequence)


def _end_if_known(state: PlannerState, frontend: int, sequence_id: int, num_kept: int | None = None) -> None:
    """Ends a sequence unless it has ended by itself meanwhile."""
    sequence = state.sequences.get((frontend, sequence_id))
    if sequence is not None:
        end(state, sequence, num_kept)


def _check_allowance(state: PlannerState, tenant: str) -> None:
    """Raises Refused where the tenant has no more to come now."""
    allowance, index = state.limits.allowances.of(tenant), state.tenants.index_of(tenant)
    num_waiting = 0 if index is None else state.queue.num_waiting_of[index]
    if 0 < allowance.max_waiting <= num_waiting:
        raise Refused(
            f"max_waiting: {num_waiting} sequences of this tenant wait already, which is its limit",
            grpc.StatusCode.RESOURCE_EXHAUSTED,
        )
    if (debt_s := state.buckets.debt_s(tenant)) > 0:
        raise Refused(
            f"tokens_per_s: this tenant is served {allowance.tokens_per_s:g} at most, and is {debt_s:.3g} s ahead",
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            debt_s,
        )


def _sequence(state: PlannerState, frontend: int, request: frontend_pb2.Submit, arrival: int) -> Sequence:
    limits = state.limits
    if (frontend, request.sequence_id) in state.sequences:
        raise Refused(f"sequence_id {request.sequence_id} is running already")
    if state.queue.num_waiting >= limits.max_waiting and not request.is_resumed:
        raise Refused(f"{limits.max_waiting} sequences wait already", grpc.StatusCode.RESOURCE_EXHAUSTED)
    prompt = token_ids("token_ids", request.token_ids, limits)
    output = token_ids("output_token_ids", request.output_token_ids, limits)
    stop_token_ids = token_ids("stop_token_ids", request.stop_token_ids, limits)
    if not 1 <= len(prompt) < limits.max_model_len:
        raise Refused(f"prompt of {len(prompt)} tokens; 1 to {limits.max_model_len - 1} fit the context")
    if request.max_tokens < 1:
        raise Refused("max_tokens 0; at least 1")
    if not (0 <= request.remaining_s < _MAX_REMAINING_S):
        raise Refused(f"remaining_s {request.remaining_s}; from 0 to {_MAX_REMAINING_S}")
    max_total_tokens = min(len(prompt) + request.max_tokens, limits.max_model_len)
    if len(prompt) + len(output) > max_total_tokens:
        raise Refused(f"{len(output)} output tokens, where {max_total_tokens - len(prompt)} is the limit")
    if request.num_prompt_logprobs > MAX_LOGPROBS:
        raise Refused(f"num_prompt_logprobs {request.num_prompt_logprobs}; {MAX_LOGPROBS} at most")
    if request.num_scored_tokens > len(prompt):
        raise Refused(f"num_scored_tokens {request.num_scored_tokens}, where the prompt has {len(prompt)}")
    ends = frozenset(stop_token_ids.tolist())
    if not request.ignore_eos:
        ends |= limits.eos_token_ids
    return Sequence(
        frontend=frontend,
        sequence_id=request.sequence_id,
        request_id=request.request_id,
        token_ids=np.concatenate([prompt, output]) if len(output) else prompt,
        num_prompt_tokens=len(prompt),
        max_total_tokens=max_total_tokens,
        sampling=checked_sampling(request, ends, limits),
        place=Place(-request.priority, arrival),
        stop_token_ids=ends,
        root=_root_hash(request.tenant, limits.kv_secret),
        cache_limit=limits.allowances.of(request.tenant).cache_blocks,
        min_output_tokens=max(1, min(request.min_output_tokens, max_total_tokens - len(prompt))),
        trace_parent=request.trace_parent,
        num_prompt_logprobs=request.num_prompt_logprobs if request.HasField("num_prompt_logprobs") else None,
        num_scored=max(1, request.num_scored_tokens),
    )


def _least_ns(state: PlannerState, sequence: Sequence, request: frontend_pb2.Submit, rates: StepRates) -> int:
    """What the sequence takes at least. Raises Refused when its deadline does not leave that much."""
    if not request.remaining_s:
        return 0
    num_missing = len(sequence.token_ids) - len(find_blocks(state, sequence)) * state.limits.block_size
    num_outputs = max(1, sequence.min_output_tokens - (len(sequence.token_ids) - sequence.num_prompt_tokens))
    least_s = rates.least_s(num_missing, num_outputs, state.limits.max_num_batched_tokens)
    if not request.remaining_s > least_s:
        raise Refused(
            f"deadline: {request.remaining_s:.3g} s are left; at the measured rates {num_missing} prompt tokens and"
            f" {num_outputs} output tokens take {least_s:.3g} s at least",
            grpc.StatusCode.DEADLINE_EXCEEDED,
        )
    return int(least_s * 1e9)


def _already_over(sequence: Sequence) -> Ended | None:
    """How a resumed sequence has ended, when its planner was lost between its last token and saying so."""
    if len(sequence.token_ids) == sequence.num_prompt_tokens:
        return None
    token = int(sequence.token_ids[-1])
    if sequence.stops_at(token, len(sequence.token_ids)):
        return Ended(sequence, EndReason.STOP, token)
    if len(sequence.token_ids) >= sequence.max_total_tokens:
        return Ended(sequence, EndReason.LENGTH)
    return None
