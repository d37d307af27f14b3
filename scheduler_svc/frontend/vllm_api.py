"""vllm.grpc.engine.VllmEngine, so that gateways and clients of vLLM's gRPC mode work unchanged.

Answers carry token ids; text is the gateway's. A token that ended the sequence is named in matched_token_id and is
neither among the ids nor counted in completion_tokens.
"""

import json
import time
from typing import Any

from smg_grpc_proto import vllm_engine_pb2

from albireo.errors import AlbireoError
from scheduler_svc.frontend import vllm_fields
from scheduler_svc.frontend.calls import Context, named_tenant, refuse
from scheduler_svc.frontend.core import Core
from scheduler_svc.frontend.validation import RequestFields, check_labels
from scheduler_svc.frontend.vllm_operations import VllmOperations

SERVICE_NAME = vllm_engine_pb2.DESCRIPTOR.services_by_name["VllmEngine"].full_name


class VllmEngineServicer(VllmOperations):
    async def Generate(self, request: Any, context: Context) -> None:
        async def generate(request_id: str) -> None:
            fields = vllm_fields.request_fields(request, request_id, context)
            if request.stream:
                await self._stream(fields, context)
            else:
                await self._answer_in_full(fields, context)

        await self._core.handle(context, request.request_id, generate)

    async def _stream(self, fields: RequestFields, context: Context) -> None:
        num_sent: dict[int, int] = {}
        with await self._core.open(fields) as stream:
            prompt_ids = stream.request.token_ids
            while (delta := await stream.next_delta()) is not None:
                if delta.token_ids:
                    num_sent[delta.index] = num_sent.get(delta.index, 0) + len(delta.token_ids)
                    await stream.write(context, vllm_fields.chunk(delta, prompt_ids))
                if delta.finish is not None:
                    num_tokens = num_sent.get(delta.index, 0)
                    await stream.write(context, vllm_fields.complete(delta, prompt_ids, num_tokens, in_full=False))

    async def _answer_in_full(self, fields: RequestFields, context: Context) -> None:
        with await self._core.open(fields, in_full=True) as stream:
            prompt_ids = stream.request.token_ids
            while (delta := await stream.next_delta()) is not None:
                num_tokens = len(delta.token_ids)
                await stream.write(context, vllm_fields.complete(delta, prompt_ids, num_tokens, in_full=True))

    async def Abort(self, request: Any, context: Context) -> Any:
        try:
            self._core.link.abort(check_labels(request.request_ids), named_tenant(context))
        except AlbireoError as error:
            await refuse(context, error)
        return vllm_engine_pb2.AbortResponse()

    async def HealthCheck(self, request: Any, context: Context) -> Any:
        try:
            self._core.check_serving()
        except AlbireoError as error:
            return vllm_engine_pb2.HealthCheckResponse(healthy=False, message=str(error))
        return vllm_engine_pb2.HealthCheckResponse(healthy=True, message=f"serving {self._core.group.engine}")

    async def GetModelInfo(self, request: Any, context: Context) -> Any:
        try:
            return _model_info(self._core)
        except AlbireoError as error:
            await refuse(context, error)

    async def GetServerInfo(self, request: Any, context: Context) -> Any:
        try:
            return _server_info(self._core)
        except AlbireoError as error:
            await refuse(context, error)


def _model_info(core: Core) -> Any:
    group, model = core.group, core.model
    path = str(model.spec.path)
    return vllm_engine_pb2.GetModelInfoResponse(
        model_path=path,
        is_generation=True,
        max_context_length=group.max_model_len,
        vocab_size=group.vocab_size,
        served_model_name=model.name,
        tokenizer_path=path,
        model_type=model.spec.model_type,
        architectures=[model.spec.architecture],
        eos_token_ids=group.eos_token_ids,
        bos_token_id=model.spec.bos_token_id,
        max_req_input_len=group.max_model_len - 1,
        default_sampling_params_json=json.dumps(model.stated_defaults) if model.stated_defaults else "",
    )


def _server_info(core: Core) -> Any:
    group = core.group
    return vllm_engine_pb2.GetServerInfoResponse(
        active_requests=core.metrics.num_streams_open,
        is_paused=False,
        last_receive_timestamp=core.last_received_at,
        uptime_seconds=time.monotonic() - core.started_at,
        server_type="vllm-grpc",  # the protocol's name for itself
        data_parallel_size=1,
        kv_cache_dtype="auto",
        block_size=group.block_size,
        model_dtype=group.dtype,
        max_num_seqs=group.max_num_seqs,
    )
