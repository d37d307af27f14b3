"""Clients of the native API: each keeps one streaming call open, and opens the next when it has ended."""

import asyncio
import contextlib
import random
import time
from typing import TYPE_CHECKING

from grpc import aio

from albireo.errors import GroupUnavailable
from albireo.rpc import make_channel
from albireo.v1 import generation_pb2 as pb
from albireo.v1 import generation_pb2_grpc
from albireo.watchdog import Watchdog
from scheduler_svc.load.config import LoadConfig
from scheduler_svc.load.record import Record

if TYPE_CHECKING:
    from albireo.v1.generation_pb2_grpc import GenerationAsyncStub


class StreamLoad:
    """Keeps ``config.streams`` calls open, spread over the front ends and their channels."""

    def __init__(self, config: LoadConfig, record: Record) -> None:
        self._config = config
        self._record = record
        self._rng = random.Random(config.name)  # noqa: S311  # no secret
        self._vocab_size = 0

    async def run(self, watchdog: Watchdog) -> None:
        """Until it is cancelled. Raises GroupUnavailable when a call fails."""
        config = self._config
        async with contextlib.AsyncExitStack() as stack:
            channels = [
                await stack.enter_async_context(make_channel(target))
                for _ in range(config.channels)
                for target in config.targets
            ]
            stubs = [generation_pb2_grpc.GenerationStub(channel) for channel in channels]
            try:
                for stub in stubs:
                    request = pb.GetModelInfoRequest()
                    info = await stub.GetModelInfo(request, timeout=config.startup_timeout, wait_for_ready=True)
                    self._vocab_size = info.vocab_size
            except aio.AioRpcError as error:
                raise _failed(error) from error
            clients = [
                asyncio.create_task(self._run_client(stubs[index % len(stubs)], index))
                for index in range(config.streams)
            ]
            watchdog.ready()
            try:
                await asyncio.gather(*clients)
            except aio.AioRpcError as error:
                raise _failed(error) from error
            finally:
                for client in clients:
                    client.cancel()
                await asyncio.gather(*clients, return_exceptions=True)

    async def _run_client(self, stub: "GenerationAsyncStub", index: int) -> None:
        await self._ask(stub, self._config.first_output_tokens(index))
        while True:
            await self._ask(stub, self._config.output_tokens)

    async def _ask(self, stub: "GenerationAsyncStub", num_tokens: int) -> None:
        prompt = [self._rng.randrange(self._vocab_size) for _ in range(self._config.prompt_tokens)]
        params = pb.SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=0.0, top_p=1.0, top_k=0, n=1)
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling_params=params)
        record = self._record
        asked_at = last_at = time.monotonic()
        is_first = True
        async for response in stub.Generate(request):
            num_new = len(response.token_ids)
            if not num_new:
                continue
            now = time.monotonic()
            record.took(num_new)
            if is_first:
                record.began(now - asked_at)
            else:
                record.waited(now - last_at)
            is_first, last_at = False, now
        record.ended()


def _failed(error: aio.AioRpcError) -> GroupUnavailable:
    return GroupUnavailable(f"a call failed: {error.code().name}: {error.details()}")
