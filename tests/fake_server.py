"""A server that speaks albireo.v1.Generation without a model: what it answers can be read off the request."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc

from albireo.v1 import generation_pb2 as pb
from albireo.v1 import generation_pb2_grpc


@dataclass
class FakeServer(generation_pb2_grpc.GenerationServicer):
    """Completes with the ids 0, 1, 2 ... as text "t0 t1 t2 ", max_tokens of them (3 unless told).

    Where they are wanted, the log-probability of token i is -i - 0.5 and its rank i + 1; the likeliest are 0, 1 ...

    Text prompts become their UTF-8 bytes. A prompt "wait" takes 0.3 s; "abort" ends as aborted; "break" loses the
    server in the middle; "busy" is refused with a deadline within 30 s; a temperature above 10 is refused.

    Attributes:
        tenants: of the requests, by their metadata.
    """

    info: pb.ModelInfo = field(
        default_factory=lambda: pb.ModelInfo(
            name="fake", engine="stub", dtype="float32", tp_size=2, vocab_size=1003, max_model_len=4096
        )
    )
    requests: list[pb.GenerateRequest] = field(default_factory=list)
    tenants: list[str | None] = field(default_factory=list)
    target: str = ""
    num_open: int = 0
    max_open: int = 0
    num_cancelled: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Any) -> pb.ModelInfo:
        return self.info

    def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:
        return pb.AbortResponse()

    def Generate(self, request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        with self.lock:
            self.requests.append(request)
            self.tenants.append(dict(context.invocation_metadata()).get("x-tenant"))
            self.num_open += 1
            self.max_open = max(self.max_open, self.num_open)
        try:
            if request.sampling_params.temperature > 10:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "temperature: must be at most 10")
            if request.text == "busy" and context.time_remaining() < 30:  # without a deadline, aeons
                context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the queue takes 30 s")
            if request.text == "wait":
                time.sleep(0.3)
            for index in range(request.sampling_params.n or 1):
                yield from self._completion(request, index, context)
        finally:
            with self.lock:
                self.num_open -= 1
                self.num_cancelled += not context.is_active()

    def _completion(self, request: pb.GenerateRequest, index: int, context: Any) -> Iterator[pb.GenerateResponse]:
        prompt = list(request.text.encode()) if request.HasField("text") else list(request.token_ids.ids)
        num_tokens = request.sampling_params.max_tokens or 3
        for token in range(num_tokens):
            if request.text == "endless":
                time.sleep(0.05)
            yield pb.GenerateResponse(
                index=index,
                text=f"t{token} ",
                token_ids=[token],
                prompt_token_ids=prompt if token == 0 else [],
                logprobs=_logprobs(token, request.sampling_params),
                prompt_logprobs=_prompt_logprobs(len(prompt), request.sampling_params) if token == 0 else [],
            )
            if request.text == "break":
                context.abort(grpc.StatusCode.UNAVAILABLE, "the worker group is gone")
        reason = pb.FINISH_REASON_ABORT if request.text == "abort" else pb.FINISH_REASON_LENGTH
        usage = pb.Usage(prompt_tokens=len(prompt), completion_tokens=num_tokens, cached_tokens=1)
        yield pb.GenerateResponse(index=index, finish=pb.Finish(reason=reason, usage=usage))


def _prompt_logprobs(num_tokens: int, params: pb.SamplingParams) -> list[pb.TokenLogprobs]:
    if not params.HasField("prompt_logprobs"):
        return []
    return [pb.TokenLogprobs(logprob=-position, rank=position) for position in range(1, num_tokens)]


def _logprobs(token: int, params: pb.SamplingParams) -> list[pb.TokenLogprobs]:
    if not params.HasField("logprobs"):
        return []
    top = [pb.TopLogprob(token_id=i, logprob=-i - 0.5) for i in range(params.logprobs)]
    return [pb.TokenLogprobs(logprob=-token - 0.5, rank=token + 1, top=top)]
