"""Messages of vllm.grpc.engine: what a request asks for, and what of it is not served."""

from collections.abc import Callable
from typing import Any

from smg_grpc_proto import vllm_engine_pb2

from albireo.arrays import Int32Array
from albireo.errors import InvalidRequest, NotServed
from albireo.v1 import generation_pb2
from scheduler_svc.frontend.calls import Context, tenant_of
from scheduler_svc.frontend.completion import Delta
from scheduler_svc.frontend.deadline import deadline_in
from scheduler_svc.frontend.logprobs import TokenLogprobs
from scheduler_svc.frontend.validation import RequestFields, SamplingFields

# Field -> whether a request's value asks for something. The messages come without types.
_UNSERVED_SAMPLING: dict[str, Callable[[Any], bool]] = {
    "grammar_from_first_token": lambda params: params.grammar_from_first_token,
}
_UNSERVED: dict[str, Callable[[Any], bool]] = {
    "kv_transfer_params": lambda request: request.HasField("kv_transfer_params"),
    "kv_transfer_params_json": lambda request: request.HasField("kv_transfer_params_json"),
    "mm_inputs": lambda request: request.HasField("mm_inputs"),
    "extra_mm_inputs": lambda request: len(request.extra_mm_inputs) > 0,
    "media_refs": lambda request: request.HasField("media_refs"),
    "data_parallel_rank": lambda request: request.data_parallel_rank > 0,
}
_FINISH_REASONS = {
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
    generation_pb2.FINISH_REASON_ABORT: "abort",
}


def request_fields(request: Any, request_id: str, context: Context) -> RequestFields:
    """Of a GenerateRequest and its call.

    Raises NotServed for a parameter that is not served, InvalidRequest for a wrong one.

    Scalars without presence: 0 is 1 for top_p, repetition_penalty and n, and all for top_k. What only shapes text
    (spaces_between_special_tokens) or repeats the prompt as text (tokenized.original_text) changes nothing: answers
    carry token ids.
    """
    _check_served(request)
    which = request.WhichOneof("input")
    prompt = None if which is None else request.text if which == "text" else request.tokenized.input_ids
    return RequestFields(
        request_id=request_id,
        prompt=prompt,
        prompt_field="text" if which == "text" else "tokenized.input_ids",
        sampling=_sampling_fields(request.sampling_params),
        wants_text=False,
        wants_stop_token=False,
        tenant=tenant_of(context),
        deadline=deadline_in(context.time_remaining()),
    )


def chunk(delta: Delta, prompt_ids: Int32Array) -> Any:
    """A GenerateResponse with what is new in a stream."""
    return vllm_engine_pb2.GenerateResponse(
        chunk=vllm_engine_pb2.GenerateStreamChunk(
            token_ids=delta.token_ids,
            prompt_tokens=len(prompt_ids),
            completion_tokens=len(delta.token_ids),
            cached_tokens=delta.num_cached_tokens,
            output_logprobs=_output_logprobs(delta),
            input_logprobs=_input_logprobs(delta, prompt_ids),
            index=delta.index,
        )
    )


def complete(delta: Delta, prompt_ids: Int32Array, num_tokens: int, in_full: bool) -> Any:
    """A GenerateResponse with the end of a completion of ``num_tokens`` tokens; ``delta`` is its last. ``in_full``: the
    tokens come with the end, and not in chunks before it."""
    finish = delta.finish
    assert finish is not None
    has_chunk = not in_full and bool(delta.token_ids)
    return vllm_engine_pb2.GenerateResponse(
        complete=vllm_engine_pb2.GenerateComplete(
            output_ids=delta.token_ids if in_full else (),
            finish_reason=_FINISH_REASONS.get(finish.reason, "error"),
            prompt_tokens=len(prompt_ids),
            completion_tokens=num_tokens,
            cached_tokens=delta.num_cached_tokens,
            output_logprobs=_output_logprobs(delta) if in_full else None,
            input_logprobs=None if has_chunk else _input_logprobs(delta, prompt_ids),
            index=delta.index,
            matched_token_id=finish.matched_token_id,
            matched_stop_str=finish.matched_stop_str,
        )
    )


def _output_logprobs(delta: Delta) -> Any:
    """OutputLogProbs of a delta's tokens; None without logprobs. Three parallel arrays, the last one only where the
    likeliest tokens are asked for."""
    if not delta.logprobs:
        return None
    return vllm_engine_pb2.OutputLogProbs(
        token_logprobs=[each.logprob for each in delta.logprobs],
        token_ids=delta.token_ids,
        top_logprobs=[_top_logprobs(each) for each in delta.logprobs if each.top],
    )


def _input_logprobs(delta: Delta, prompt_ids: Int32Array) -> Any:
    """InputLogProbs of the prompt, in a completion's first message; None without logprobs. Arrays as of the output's;
    the first token has a place in them and no value."""
    if delta.prompt_logprobs is None:
        return None
    message = vllm_engine_pb2.InputLogProbs(token_ids=prompt_ids)
    message.token_logprobs.add()
    for each in delta.prompt_logprobs:
        message.token_logprobs.add(value=each.logprob)
        if each.top:
            message.top_logprobs.append(_top_logprobs(each))
    if message.top_logprobs:
        message.top_logprobs.insert(0, vllm_engine_pb2.TopLogProbs())
    return message


def _top_logprobs(of: TokenLogprobs) -> Any:
    return vllm_engine_pb2.TopLogProbs(
        values=[logprob for _, logprob in of.top], token_ids=[token_id for token_id, _ in of.top]
    )


def _check_served(request: Any) -> None:
    for field, is_asked in _UNSERVED.items():
        if is_asked(request):
            raise NotServed(f"{field} is not served")
    params = request.sampling_params
    for field, is_asked in _UNSERVED_SAMPLING.items():
        if is_asked(params):
            raise NotServed(f"sampling_params.{field} is not served")
    constraint = params.WhichOneof("constraint")
    if constraint is not None:
        raise NotServed(f"sampling_params.{constraint} is not served: there are no structured outputs yet")
    if request.data_parallel_rank < 0:
        raise InvalidRequest(f"data_parallel_rank is {request.data_parallel_rank}; it must be 0")


def _sampling_fields(params: Any) -> SamplingFields:
    return SamplingFields(
        temperature=params.temperature if params.HasField("temperature") else None,
        top_p=params.top_p if params.top_p != 0 else 1.0,
        top_k=params.top_k,
        seed=params.seed if params.HasField("seed") else None,
        max_tokens=params.max_tokens if params.HasField("max_tokens") else None,
        min_tokens=params.min_tokens,
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        include_stop_str_in_output=params.include_stop_str_in_output,
        skip_special_tokens=params.skip_special_tokens,
        n=params.n or 1,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty or 1.0,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.logit_bias,
        logprobs=params.logprobs if params.HasField("logprobs") else None,
        prompt_logprobs=params.prompt_logprobs if params.HasField("prompt_logprobs") else None,
        truncate_prompt_tokens=params.truncate_prompt_tokens if params.HasField("truncate_prompt_tokens") else None,
    )
