"""Streaming clients of each API that the services have, for `albireo bench api`."""

import asyncio
import contextlib
import http.client
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

from grpc import aio
from smg_grpc_proto import vllm_engine_pb2, vllm_engine_pb2_grpc

from albireo.cli import client
from albireo.cli.client import CallFailed
from albireo.rpc import make_channel
from albireo.v1 import generation_pb2 as pb
from albireo.v1 import generation_pb2_grpc

PROMPT = "def read_lines(path):\n    return path\n"
_HTTP_TIMEOUT_S = 60.0

# Runs one request for so many tokens to its end. Raises CallFailed when it fails, or has other tokens.
Ask: TypeAlias = Callable[[int], Awaitable[None]]


@contextlib.asynccontextmanager
async def native_clients(target: str, num_clients: int) -> AsyncIterator[list[Ask]]:
    """albireo.v1.Generation: text in, text and token ids out."""
    async with make_channel(target) as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)

        async def ask(num_tokens: int) -> None:
            sampling = pb.SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=0)
            request = pb.GenerateRequest(text=PROMPT, sampling_params=sampling)
            num_came = 0
            async for response in client.stream(stub, request):
                num_came += len(response.token_ids)
            _check(num_came, num_tokens)

        yield [ask] * num_clients


@contextlib.asynccontextmanager
async def vllm_clients(target: str, num_clients: int, prompt_ids: list[int]) -> AsyncIterator[list[Ask]]:
    """vllm.grpc.engine.VllmEngine: token ids in and out, as its gateways use it."""
    async with make_channel(target) as channel:
        stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        tokenized = vllm_engine_pb2.TokenizedInput(input_ids=prompt_ids)

        async def ask(num_tokens: int) -> None:
            sampling = vllm_engine_pb2.SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=0)
            request = vllm_engine_pb2.GenerateRequest(
                request_id=uuid.uuid4().hex, tokenized=tokenized, sampling_params=sampling, stream=True
            )
            num_came = 0
            try:
                async for response in stub.Generate(request):
                    num_came += len(response.chunk.token_ids)
            except aio.AioRpcError as error:
                raise CallFailed(error.code().name, error.details() or "") from error
            _check(num_came, num_tokens)

        yield [ask] * num_clients


@contextlib.asynccontextmanager
async def http_clients(port: int, num_clients: int, model: str) -> AsyncIterator[list[Ask]]:
    """OpenAI's HTTP API: text in and out, server-sent events, one connection per client."""
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(num_clients) as pool, contextlib.ExitStack() as stack:

        def client_of(connection: http.client.HTTPConnection) -> Ask:
            async def ask(num_tokens: int) -> None:
                await loop.run_in_executor(pool, _complete, connection, model, num_tokens)

            return ask

        yield [
            client_of(
                stack.enter_context(
                    contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=_HTTP_TIMEOUT_S))
                )
            )
            for _ in range(num_clients)
        ]


def _complete(connection: http.client.HTTPConnection, model: str, num_tokens: int) -> None:
    body = {
        "model": model,
        "prompt": PROMPT,
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    if response.status != http.client.OK:
        raise CallFailed(str(response.status), response.read().decode(errors="replace"))
    num_came = 0
    for line in response:
        data = line.removeprefix(b"data: ").strip()
        if b'"usage":{' in data:
            num_came = json.loads(data)["usage"]["completion_tokens"]
    _check(num_came, num_tokens)


def _check(num_came: int, num_tokens: int) -> None:
    if num_came != num_tokens:
        raise CallFailed("INTERNAL", f"an answer has {num_came} tokens, not {num_tokens}")
