"""``albireo trace``: a picture of a running server's latest steps."""

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path

from grpc import aio

from albireo import rpc
from albireo.cli import client
from albireo.cli.client import CallFailed, Server
from albireo.errors import ConfigError
from albireo.exposure import Page, read_pages
from albireo.perfetto import NoSteps, make_trace, summary, write_trace
from albireo.v1 import ledger_pb2, ledger_pb2_grpc

_READ_TIMEOUT_S = 10.0


def run(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="albireo trace",
        description="Write a picture of a running server's latest steps: open it at https://ui.perfetto.dev, or in "
        "Chrome at chrome://tracing.",
    )
    client.add_server_flags(parser)
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="the latest steps; default: %(default)s")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the JSON file to write")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error("--steps: at least 1 is needed")
    pages = asyncio.run(read_ledger(client.server_of(args), args.steps))
    try:
        trace = make_trace(pages, args.steps)
    except NoSteps:
        raise CallFailed("NOT_FOUND", "the server has run no steps yet: send it a request first") from None
    num_steps, duration_us = summary(trace)
    try:
        write_trace(Path(args.output), trace)
    except OSError as error:
        raise ConfigError(f"-o {args.output}: {error.strerror}") from error
    print(f"{args.output}: {num_steps} steps, {duration_us / 1e3:.1f} ms of {len(pages)} processes")
    print("open it at https://ui.perfetto.dev, or in Chrome at chrome://tracing")
    return 0


async def read_ledger(server: Server, num_rows: int = 0) -> list[Page]:
    """The pages that ``server`` answers with: its latest ``num_rows`` rows each, 0 for all."""
    target = server.target
    async with rpc.make_channel(target, security=server.security) as channel:
        stub = ledger_pb2_grpc.LedgerStub(channel)
        try:
            answer = await stub.Read(ledger_pb2.ReadLedgerRequest(num_rows=num_rows), timeout=_READ_TIMEOUT_S)
        except aio.AioRpcError as error:
            raise CallFailed(error.code().name, client.explain(target, error, "albireo.v1.Ledger")) from error
    try:
        return read_pages(answer.pages)
    except ValueError as error:
        raise CallFailed("INTERNAL", f"{target} answers with a page that cannot be read: {error}") from error
