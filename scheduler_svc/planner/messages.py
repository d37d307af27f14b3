"""What front ends are told of the end of a sequence."""

import grpc

from albireo.v1 import frontend_pb2, generation_pb2
from scheduler_svc.planner.commit import Ended
from scheduler_svc.planner.sequence import EndReason

_REASONS = {
    EndReason.STOP: generation_pb2.FINISH_REASON_STOP,
    EndReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
    EndReason.ABORT: generation_pb2.FINISH_REASON_ABORT,
}


class Refused(Exception):
    """A sequence that is not taken, or fails: the group cannot run it, or cannot run it now."""

    def __init__(
        self, message: str, code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT, retry_after_s: float = 0.0
    ) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s  # 0: whenever anybody may try again


def refusal_message(sequence_id: int, refused: Refused, retry_after_s: float) -> frontend_pb2.Ended:
    """``retry_after_s`` is told to those for whom there was no room, unless they have their own."""
    refusal = frontend_pb2.Refusal(code=refused.code.value[0], message=str(refused))
    if refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        refusal.retry_after_s = refused.retry_after_s or retry_after_s
    return frontend_pb2.Ended(sequence_id=sequence_id, refusal=refusal)


def ended_message(ended: Ended, now_ns: int) -> frontend_pb2.Ended:
    sequence = ended.sequence
    scheduled_ns = sequence.scheduled_ns or now_ns
    first_token_ns = sequence.first_token_ns or now_ns
    return frontend_pb2.Ended(
        sequence_id=sequence.sequence_id,
        reason=_REASONS[ended.reason],
        matched_token_id=ended.matched_token_id,
        num_output_tokens=len(sequence.token_ids) - sequence.num_prompt_tokens,
        timings=generation_pb2.Timings(
            queue_s=(scheduled_ns - sequence.submitted_ns) / 1e9,
            prefill_s=(first_token_ns - scheduled_ns) / 1e9,
            decode_s=(now_ns - first_token_ns) / 1e9,
            num_preemptions=sequence.num_preemptions,
        ),
    )
