"""What the planner is told of a request."""

from albireo.arrays import pack_float32, pack_int32
from albireo.v1 import frontend_pb2, plan_pb2
from scheduler_svc.frontend.deadline import remaining_s
from scheduler_svc.frontend.validation import GenerationRequest


def submit_of(request: GenerationRequest) -> frontend_pb2.Submit:
    """Of each of its completions, but for the seed. Raises DeadlineExceeded."""
    return frontend_pb2.Submit(
        request_id=request.request_id,
        token_ids=pack_int32(request.token_ids),
        max_tokens=request.max_tokens,
        sampling=_sampling(request),
        stop_token_ids=pack_int32(request.stop_token_ids),
        ignore_eos=request.ignore_eos,
        priority=request.priority,
        tenant=request.tenant,
        remaining_s=remaining_s(request.deadline),
        min_output_tokens=_min_output_tokens(request),
        num_prompt_logprobs=request.logits.num_prompt_logprobs,
    )


def _sampling(request: GenerationRequest) -> plan_pb2.Sampling:
    logits = request.logits
    return plan_pb2.Sampling(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_tokens=request.min_tokens,
        min_p=logits.min_p,
        repetition_penalty=logits.repetition_penalty,
        presence_penalty=logits.presence_penalty,
        frequency_penalty=logits.frequency_penalty,
        bias_token_ids=pack_int32(logits.bias_token_ids),
        biases=pack_float32(logits.biases),
        allowed_token_ids=pack_int32(logits.allowed_token_ids),
        allowed_mask=logits.allowed_mask,
        bad_words=[pack_int32(word) for word in logits.bad_words],
        num_logprobs=logits.num_logprobs,
    )


def _min_output_tokens(request: GenerationRequest) -> int:
    """Each completion has so many tokens at least."""
    may_stop = request.stop or request.stop_token_ids or not request.ignore_eos
    return request.min_tokens if may_stop else request.max_tokens
