"""Front ends' messages change the planner's state. Bounds are checked again: no front end can bypass them."""

import grpc
import numpy as np

from albireo.arrays import Int32Array, pack_int32, unpack_int32
from albireo.v1 import frontend_pb2, plan_pb2
from scheduler_svc.planner.sequence import Place, Sequence
from scheduler_svc.planner.state import Limits, PlannerState, end, submit


class Refused(Exception):
    """A front end submitted what the group cannot run."""


def apply_message(
    state: PlannerState, frontend: int, message: frontend_pb2.FrontendMessage, arrival: int, now_ns: int
) -> list[frontend_pb2.Ended]:
    """Applies one message of a front end; returns what is refused. ``arrival`` numbers the message's first sequence."""
    refused = []
    for offset, request in enumerate(message.submits):
        try:
            sequence = _sequence(state, frontend, request, arrival + offset)
        except Refused as error:
            refusal = frontend_pb2.Refusal(code=grpc.StatusCode.INVALID_ARGUMENT.value[0], message=str(error))
            refused.append(frontend_pb2.Ended(sequence_id=request.sequence_id, refusal=refusal))
            continue
        sequence.submitted_ns = now_ns
        submit(state, sequence)
    for truncate in message.truncates:
        _end_if_known(state, frontend, truncate.sequence_id)
    for sequence_id in message.cancels:
        _end_if_known(state, frontend, sequence_id)
    return refused


def abort_labelled(state: PlannerState, labels: set[str]) -> list[Sequence]:
    """Ends every sequence with one of these request labels, whichever front end it came by; returns them."""
    aborted = [sequence for sequence in state.sequences.values() if sequence.request_id in labels]
    for sequence in aborted:
        end(state, sequence)
    return aborted


def end_all_of(state: PlannerState, frontend: int) -> None:
    """A front end is gone: the lease of its sequences is over."""
    for sequence in [one for one in state.sequences.values() if one.frontend == frontend]:
        end(state, sequence)


def _end_if_known(state: PlannerState, frontend: int, sequence_id: int) -> None:
    """Ends a sequence unless it has ended by itself meanwhile."""
    sequence = state.sequences.get((frontend, sequence_id))
    if sequence is not None:
        end(state, sequence)


def _sequence(state: PlannerState, frontend: int, request: frontend_pb2.Submit, arrival: int) -> Sequence:
    limits = state.limits
    if (frontend, request.sequence_id) in state.sequences:
        raise Refused(f"sequence_id {request.sequence_id} is running already")
    try:
        prompt = unpack_int32(request.token_ids)
        stop_token_ids = unpack_int32(request.stop_token_ids)
    except ValueError as error:
        raise Refused(f"token ids are not packed int32: {error}") from error
    if not 1 <= len(prompt) < limits.max_model_len:
        raise Refused(f"prompt of {len(prompt)} tokens; 1 to {limits.max_model_len - 1} fit the context")
    for name, ids in (("token_ids", prompt), ("stop_token_ids", stop_token_ids)):
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < limits.vocab_size:
            raise Refused(f"{name} has ids outside the vocabulary of {limits.vocab_size}")
    if request.max_tokens < 1:
        raise Refused("max_tokens 0; at least 1")
    return Sequence(
        frontend=frontend,
        sequence_id=request.sequence_id,
        request_id=request.request_id,
        token_ids=prompt,
        num_prompt_tokens=len(prompt),
        max_total_tokens=min(len(prompt) + request.max_tokens, limits.max_model_len),
        sampling=_sampling(request, stop_token_ids, limits),
        place=Place(-request.priority, arrival),
        stop_token_ids=frozenset(stop_token_ids.tolist()),
        ignore_eos=request.ignore_eos,
    )


def _sampling(request: frontend_pb2.Submit, stop_token_ids: Int32Array, limits: Limits) -> plan_pb2.Sampling:
    """The request's sampling parameters, with the ids that min_tokens forbids: those that would end the sequence."""
    sampling = request.sampling
    if not (np.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise Refused(f"temperature {sampling.temperature}; a finite number >= 0")
    if not 0 < sampling.top_p <= 1:
        raise Refused(f"top_p {sampling.top_p}; in (0, 1]")
    if sampling.min_tokens:
        suppressed = np.union1d(stop_token_ids, [] if request.ignore_eos else limits.eos_token_ids)
        if len(suppressed) >= limits.vocab_size:
            raise Refused("with min_tokens, the stop_token_ids leave no token to sample")
        sampling.suppressed_token_ids = pack_int32(suppressed)
    return sampling
