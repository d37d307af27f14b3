"""A client of ``albireo.v1.Generation``: connecting, collecting completions, and errors fit for people."""

import argparse
import contextlib
import math
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from grpc import aio

from albireo import rpc
from albireo.errors import AlbireoError, ConfigError
from albireo.security import OPEN, Security, SecurityFlags, TlsFlags, load_security
from albireo.v1 import generation_pb2 as pb
from albireo.v1 import generation_pb2_grpc

if TYPE_CHECKING:
    from albireo.v1.generation_pb2_grpc import GenerationAsyncStub

DEFAULT_TARGET = "127.0.0.1:50051"
_CONNECT_TIMEOUT_S = 10.0
_VARIABLE = "ALBIREO_TOKEN"
_GRPCS_OWN_WORDS = "Deadline Exceeded"  # within the details, where no server said why


class CallFailed(AlbireoError):
    """The server refused a call, failed in it, or is out of reach."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message

    def to_json(self) -> dict[str, Any]:
        return {"error": {"code": self.code, "message": self.message}}


@dataclass(frozen=True)
class Server:
    """Where a server is, and what it is shown."""

    target: str
    security: Security = OPEN


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Which server is meant, and what it is shown."""
    parser.add_argument("--target", default=DEFAULT_TARGET, metavar="HOST:PORT", help="default: %(default)s")
    token_help = f"holds the token that the server asks for; else the variable {_VARIABLE} does"
    parser.add_argument("--token-file", metavar="FILE", help=token_help)
    for each in fields(TlsFlags):
        name = "--" + each.name.replace("_", "-")
        metavar = "NAME" if each.name == "tls_server_name" else "FILE"
        parser.add_argument(name, default="", metavar=metavar, help=each.metadata["help"])


def server_of(args: argparse.Namespace) -> Server:
    """What the flags of `add_server_flags` say. Raises ConfigError where that cannot be used."""
    token = os.environ.get(_VARIABLE, "")
    if args.token_file:
        try:
            token = Path(args.token_file).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--token-file {args.token_file}: {error}") from error
    flags = SecurityFlags(**{each.name: getattr(args, each.name) for each in fields(TlsFlags)})
    return Server(args.target, load_security(flags, token))


@contextlib.asynccontextmanager
async def connect(server: Server) -> AsyncIterator[tuple["GenerationAsyncStub", pb.ModelInfo]]:
    """A stub of a server, and its model. Raises CallFailed at once when nothing answers there."""
    async with rpc.make_channel(server.target, security=server.security) as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        try:
            info = await stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=_CONNECT_TIMEOUT_S)
        except aio.AioRpcError as error:
            raise CallFailed(error.code().name, explain(server.target, error)) from error
        yield stub, info


@dataclass
class Completion:
    """What has arrived of one completion."""

    text: str = ""
    prompt_token_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[pb.TokenLogprobs] = field(default_factory=list)  # of the tokens, where they were asked for
    prompt_logprobs: list[pb.TokenLogprobs] = field(default_factory=list)  # of the prompt's tokens but the first
    finish: pb.Finish | None = None

    def add(self, response: pb.GenerateResponse) -> None:
        self.text += response.text
        self.prompt_token_ids += response.prompt_token_ids
        self.token_ids += response.token_ids
        self.logprobs += response.logprobs
        self.prompt_logprobs += response.prompt_logprobs
        if response.HasField("finish"):
            self.finish = response.finish

    def to_json(self) -> dict[str, Any]:
        finish = self.finish or pb.Finish()
        return {
            "text": self.text,
            "prompt_token_ids": self.prompt_token_ids,
            "token_ids": self.token_ids,
            **({"prompt_logprobs": [None, *_to_json(self.prompt_logprobs)]} if self.prompt_logprobs else {}),
            **({"logprobs": _to_json(self.logprobs)} if self.logprobs else {}),
            "finish_reason": pb.FinishReason.Name(finish.reason).removeprefix("FINISH_REASON_").lower(),
            "usage": {
                "prompt_tokens": finish.usage.prompt_tokens,
                "completion_tokens": finish.usage.completion_tokens,
                "cached_tokens": finish.usage.cached_tokens,
            },
        }


def _to_json(logprobs: list[pb.TokenLogprobs]) -> list[dict[str, Any]]:
    return [
        {
            "logprob": _number(each.logprob),
            "rank": each.rank,
            "top": [{"token_id": top.token_id, "logprob": _number(top.logprob)} for top in each.top],
        }
        for each in logprobs
    ]


def _number(value: float) -> float | None:
    """For JSON, which has no infinity."""
    return round(value, 6) if math.isfinite(value) else None


@dataclass(frozen=True)
class CallOptions:
    """What goes with a request and is no part of it.

    Attributes:
        timeout_s: from the call to the end of its stream; None: no limit.
        tenant: whom the server counts the request for; empty: its default one.
    """

    timeout_s: float | None = None
    tenant: str = ""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("x-tenant", self.tenant),) if self.tenant else ()


async def stream(
    stub: "GenerationAsyncStub", request: pb.GenerateRequest, options: CallOptions = CallOptions()
) -> AsyncIterator[pb.GenerateResponse]:
    """The responses of one call. Leaving the loop early cancels the call, which aborts the request."""
    call = stub.Generate(request, timeout=options.timeout_s, metadata=options.metadata)
    try:
        async for response in call:
            yield response
    except aio.AioRpcError as error:
        raise CallFailed(error.code().name, _failure(error, options)) from error
    finally:
        call.cancel()


async def collect(
    stub: "GenerationAsyncStub", request: pb.GenerateRequest, options: CallOptions = CallOptions()
) -> list[Completion]:
    """The completions of one request, by index."""
    completions: dict[int, Completion] = {}
    async for response in stream(stub, request, options):
        completions.setdefault(response.index, Completion()).add(response)
    num_expected = max(1, request.sampling_params.n)
    if len(completions) < num_expected or not all(each.finish for each in completions.values()):
        raise CallFailed("INTERNAL", "the stream ended before its completions did")
    return [completions[index] for index in sorted(completions)]


def _failure(error: aio.AioRpcError, options: CallOptions) -> str:
    details = error.details() or ""
    if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED or options.timeout_s is None:
        return details
    late = f"the request did not end within its timeout of {options.timeout_s:g} s"
    return late if not details or _GRPCS_OWN_WORDS in details else f"{late}: {details}"


def explain(target: str, error: aio.AioRpcError, service: str = "albireo.v1.Generation") -> str:
    """Why a call to ``service`` at ``target`` failed, in one line."""
    details = (error.details() or "no details").splitlines()[0]
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return f"the server at {target} does not offer {service}"
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return f"no Albireo server answers at {target} ({details}); start one with `albireo serve`, or give --target"
    return f"the server at {target} failed: {details}"
