"""``albireo generate``: completions from a running server, streamed as text or printed as JSON."""

import argparse
import asyncio
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from albireo.cli import client, requests
from albireo.cli.client import CallFailed, CallOptions, Server
from albireo.cli.progress import counting_bar, print_line
from albireo.errors import ConfigError, InvalidRequest
from albireo.v1 import generation_pb2 as pb

if TYPE_CHECKING:
    from albireo.v1.generation_pb2_grpc import GenerationAsyncStub

_MAX_OPEN_STREAMS = 1024
_MAX_TENANT_CHARS = 128

_EPILOG = """\
A line of --prompts is an object with prompt or prompt_token_ids and any of the parameters above by its API name
(max_tokens, stop_token_ids, ...); flags are defaults for all lines. All run at once; the answers are printed in order:

  {"text", "prompt_token_ids", "token_ids", "finish_reason": "stop"|"length"|"abort",
   with --prompt-logprobs "prompt_logprobs": [null, then as below for each further token of the prompt],
   with --logprobs "logprobs": [{"logprob", "rank", "top": [{"token_id", "logprob"}]}, one per token],
   "usage": {"prompt_tokens", "completion_tokens", "cached_tokens"}}

or, with n > 1, {"choices": [one such object per completion]}, or {"error": {"code", "message"}} for a request that was
refused; the exit status is then 1.
"""


def run(argv: Sequence[str]) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if (args.prompt is None) == (args.prompts is None):
        parser.error("exactly one of PROMPT and --prompts FILE is needed")
    defaults = requests.flag_values(args)
    options = CallOptions(timeout_s=args.timeout, tenant=args.tenant)
    server = client.server_of(args)
    requests.build_request({"prompt": "", **defaults})  # a wrong flag is wrong usage, not a refused request
    if args.prompts is not None:
        return asyncio.run(_answer_lines(server, _read_lines(args.prompts), defaults, options))
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    request = requests.build_request({"prompt": prompt, **defaults})
    show = _print_json if args.json else _print_text
    return asyncio.run(show(server, request, options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="albireo generate",
        description="Complete a prompt, or a file of prompts, on a running server.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --prompt would mean --prompts
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text to complete; - reads it from stdin")
    client.add_server_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of streaming text")
    parser.add_argument("--prompts", metavar="FILE", help="complete all prompts of a JSON lines file; - is stdin")
    parser.add_argument(
        "--timeout", type=_seconds, metavar="S", help="the seconds that each request may take (default: no limit)"
    )
    parser.add_argument(
        "--tenant", type=_tenant, default="", metavar="NAME", help="whom the server counts the requests for"
    )
    requests.add_flags(parser.add_argument_group("request", "What is not given takes the model's default."))
    return parser


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def _tenant(text: str) -> str:
    if not (len(text) <= _MAX_TENANT_CHARS and text.isascii() and text.isprintable()):
        raise argparse.ArgumentTypeError(f"{text[:80]!r}: printable ASCII characters, {_MAX_TENANT_CHARS} at most")
    return text


def _read_lines(file: str) -> list[bytes]:
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    return [line for line in content.split(b"\n") if line.strip()]


async def _print_text(server: Server, request: pb.GenerateRequest, options: CallOptions) -> int:
    """Streams the text; several completions cannot share a terminal, so they come whole, one after another."""
    async with client.connect(server) as (stub, info):
        n = request.sampling_params.n or info.default_sampling_params.n
        if n > 1:
            completions = await client.collect(stub, request, options)
            for index, each in enumerate(completions):
                print(f"[{index + 1}/{len(completions)}]\n{each.text}")
                _print_logprobs(each)
        else:
            completions = [client.Completion()]
            async for response in client.stream(stub, request, options):
                completions[0].add(response)
                print(response.text, end="", flush=True)
            if not completions[0].text.endswith("\n"):
                print()
            _print_logprobs(completions[0])
    if any(each.finish is None or each.finish.reason == pb.FINISH_REASON_ABORT for each in completions):
        raise CallFailed("ABORTED", "the request was aborted; the text is not complete")
    return 0


def _print_logprobs(completion: client.Completion) -> None:
    """A line per token, below the text; those of the prompt come first."""
    _print_table("prompt", completion.prompt_token_ids[1:], completion.prompt_logprobs)
    _print_table("token", completion.token_ids, completion.logprobs)


def _print_table(title: str, token_ids: Sequence[int], logprobs: Sequence[pb.TokenLogprobs]) -> None:
    if not logprobs:
        return
    print(f"\n{title:>8} {'logprob':>10} {'rank':>6}  likeliest")
    for token_id, each in zip(token_ids, logprobs, strict=True):
        likeliest = "  ".join(f"{top.token_id}: {top.logprob:.4f}" for top in each.top)
        print(f"{token_id:>8} {each.logprob:>10.4f} {each.rank:>6}  {likeliest}".rstrip())


async def _print_json(server: Server, request: pb.GenerateRequest, options: CallOptions) -> int:
    async with client.connect(server) as (stub, _):
        answer = await _answer(stub, request, options)
    print(json.dumps(answer))
    return int("error" in answer)


async def _answer_lines(
    server: Server, lines: Sequence[bytes], defaults: Mapping[str, Any], options: CallOptions
) -> int:
    """Runs all lines at once, prints one answer per line, in their order."""
    gate = asyncio.Semaphore(_MAX_OPEN_STREAMS)
    num_errors = 0
    async with client.connect(server) as (stub, _):
        with counting_bar(len(lines), "generating", "req") as bar:

            async def answer(line: bytes) -> dict[str, Any]:
                async with gate:
                    result = await _answer_line(stub, line, defaults, options)
                bar.update()
                return result

            tasks = [asyncio.create_task(answer(line)) for line in lines]
            try:
                for task in tasks:
                    result = await task
                    num_errors += "error" in result
                    print_line(json.dumps(result))
            finally:
                for task in tasks:
                    task.cancel()
    return int(num_errors > 0)


async def _answer_line(
    stub: "GenerationAsyncStub", line: bytes, defaults: Mapping[str, Any], options: CallOptions
) -> dict[str, Any]:
    try:
        request = requests.parse_line(line, defaults)
    except InvalidRequest as error:
        return CallFailed(error.status.name, str(error)).to_json()
    return await _answer(stub, request, options)


async def _answer(stub: "GenerationAsyncStub", request: pb.GenerateRequest, options: CallOptions) -> dict[str, Any]:
    try:
        completions = [each.to_json() for each in await client.collect(stub, request, options)]
    except CallFailed as error:
        return error.to_json()
    return completions[0] if len(completions) == 1 else {"choices": completions}
