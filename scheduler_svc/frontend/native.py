"""albireo.v1.Generation."""

from albireo.errors import AlbireoError
from albireo.v1 import generation_pb2, generation_pb2_grpc
from scheduler_svc.frontend.calls import Context, named_tenant, refuse, tenant_of
from scheduler_svc.frontend.completion import Delta, Finish
from scheduler_svc.frontend.core import Core
from scheduler_svc.frontend.deadline import deadline_in
from scheduler_svc.frontend.logprobs import TokenLogprobs
from scheduler_svc.frontend.stream import RequestStream
from scheduler_svc.frontend.validation import RequestFields, SamplingFields, check_labels

SERVICE_NAME = generation_pb2.DESCRIPTOR.services_by_name["Generation"].full_name


class GenerationServicer(generation_pb2_grpc.GenerationServicer):
    def __init__(self, core: Core) -> None:
        self._core = core

    async def Generate(  # type: ignore[override]  # writes by itself instead of yielding
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> None:
        async def generate(request_id: str) -> None:
            with await self._core.open(_fields(request, request_id, context)) as stream:
                while (delta := await stream.next_delta()) is not None:
                    if delta:
                        await stream.write(context, _response(delta, stream))

        await self._core.handle(context, request.request_id, generate)

    async def Abort(self, request: generation_pb2.AbortRequest, context: Context) -> generation_pb2.AbortResponse:
        try:
            self._core.link.abort(check_labels(request.request_ids), named_tenant(context))
        except AlbireoError as error:
            await refuse(context, error)
        return generation_pb2.AbortResponse()

    async def GetModelInfo(
        self, request: generation_pb2.GetModelInfoRequest, context: Context
    ) -> generation_pb2.ModelInfo:
        try:
            return _model_info(self._core)
        except AlbireoError as error:
            await refuse(context, error)
            raise


def _fields(request: generation_pb2.GenerateRequest, request_id: str, context: Context) -> RequestFields:
    which = request.WhichOneof("prompt")
    return RequestFields(
        request_id=request_id,
        prompt=None if which is None else request.text if which == "text" else request.token_ids.ids,
        prompt_field=which or "prompt",
        sampling=_sampling_fields(request.sampling_params),
        wants_text=True,
        wants_stop_token=True,
        priority=request.priority,
        tenant=tenant_of(context),
        deadline=deadline_in(context.time_remaining()),
    )


def _sampling_fields(params: generation_pb2.SamplingParams) -> SamplingFields:
    return SamplingFields(
        temperature=params.temperature if params.HasField("temperature") else None,
        top_p=params.top_p if params.HasField("top_p") else None,
        top_k=params.top_k if params.HasField("top_k") else None,
        seed=params.seed if params.HasField("seed") else None,
        max_tokens=params.max_tokens if params.HasField("max_tokens") else None,
        min_tokens=params.min_tokens,
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        include_stop_str_in_output=params.include_stop_str_in_output,
        skip_special_tokens=params.skip_special_tokens if params.HasField("skip_special_tokens") else True,
        n=params.n if params.HasField("n") else 1,
        min_p=params.min_p if params.HasField("min_p") else None,
        repetition_penalty=params.repetition_penalty if params.HasField("repetition_penalty") else None,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.logit_bias,
        allowed_token_ids=params.allowed_token_ids.ids if params.HasField("allowed_token_ids") else None,
        bad_words=params.bad_words,
        bad_words_token_ids=[word.ids for word in params.bad_words_token_ids],
        logprobs=params.logprobs if params.HasField("logprobs") else None,
        prompt_logprobs=params.prompt_logprobs if params.HasField("prompt_logprobs") else None,
        truncate_prompt_tokens=params.truncate_prompt_tokens if params.HasField("truncate_prompt_tokens") else None,
    )


def _response(delta: Delta, stream: RequestStream) -> generation_pb2.GenerateResponse:
    response = generation_pb2.GenerateResponse(text=delta.text, token_ids=delta.token_ids)
    if delta.index:
        response.index = delta.index
    if delta.is_first:
        response.prompt_token_ids.extend(stream.request.token_ids.tolist())
    if delta.finish is not None:
        usage = generation_pb2.Usage(
            prompt_tokens=len(stream.request.token_ids),
            completion_tokens=delta.finish.num_output_tokens,
            cached_tokens=delta.num_cached_tokens,
        )
        response.finish.CopyFrom(_finish(delta.finish, usage))
    if delta.prompt_logprobs is not None:
        response.prompt_logprobs.extend(map(_logprobs, delta.prompt_logprobs))
    if delta.logprobs:
        response.logprobs.extend(map(_logprobs, delta.logprobs))
    return response


def _logprobs(logprobs: TokenLogprobs) -> generation_pb2.TokenLogprobs:
    top = [generation_pb2.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in logprobs.top]
    return generation_pb2.TokenLogprobs(logprob=logprobs.logprob, rank=logprobs.rank, top=top)


def _finish(finish: Finish, usage: generation_pb2.Usage) -> generation_pb2.Finish:
    return generation_pb2.Finish(
        reason=finish.reason,
        matched_token_id=finish.matched_token_id,
        matched_stop_str=finish.matched_stop_str,
        usage=usage,
        timings=finish.timings,
    )


def _model_info(core: Core) -> generation_pb2.ModelInfo:
    group, model = core.group, core.model
    return generation_pb2.ModelInfo(
        name=model.name,
        path=str(model.spec.path),
        architectures=[model.spec.architecture],
        vocab_size=group.vocab_size,
        max_model_len=group.max_model_len,
        eos_token_ids=group.eos_token_ids,
        tp_size=group.tp_size,
        engine=group.engine,
        dtype=group.dtype,
        max_num_seqs=group.max_num_seqs,
        block_size=group.block_size,
        num_blocks=group.num_blocks,
        default_sampling_params=generation_pb2.SamplingParams(
            temperature=model.defaults.temperature,
            top_p=model.defaults.top_p,
            top_k=model.defaults.top_k,
            min_p=model.defaults.min_p,
            repetition_penalty=model.defaults.repetition_penalty,
        ),
    )
