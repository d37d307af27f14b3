"""vllm.grpc.engine.VllmEngine beside generation: what gateways ask to route by, and what operators do."""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable
from typing import Any

from grpc import aio
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

from albireo.errors import AlbireoError, InvalidRequest, NotServed, Overloaded
from scheduler_svc.frontend import vllm_load
from scheduler_svc.frontend.calls import Context, refuse
from scheduler_svc.frontend.config import FrontendConfig
from scheduler_svc.frontend.core import Core
from scheduler_svc.frontend.kv_feed import KvFeed, Subscription
from scheduler_svc.frontend.profiler import Profiler
from scheduler_svc.frontend.tokenizer_zip import TokenizerZip, make_tokenizer_zip

_HEARTBEAT_S = 1.0
_IDLE_POLL_S = 0.05
_CHUNK_BYTES = 64 << 10
_ACTIVITIES = {"CPU", "GPU"}  # a trace shows both
# Field -> whether a request's value asks for something that a trace does not show.
_UNSERVED_PROFILE: dict[str, Callable[[Any], bool]] = {
    "start_step": lambda request: request.HasField("start_step"),
    "activities": lambda request: not _ACTIVITIES.issuperset(request.activities),
    "with_stack": lambda request: request.with_stack,
    "record_shapes": lambda request: request.record_shapes,
    "profile_by_stage": lambda request: request.profile_by_stage,
}


class VllmOperations(vllm_engine_pb2_grpc.VllmEngineServicer):  # type: ignore[misc]  # untyped base
    def __init__(self, core: Core, config: FrontendConfig) -> None:
        self._core = core
        self._write_timeout_s = config.write_timeout
        self._feed = KvFeed(core.link)
        self._profiler = Profiler(config.profile_dir, config.name, core.link.read_ledger)
        self._tokenizer_zip: asyncio.Future[TokenizerZip] | None = None

    def close(self) -> None:
        """Ends what would not end by itself."""
        self._feed.close()
        self._profiler.close()

    async def Embed(self, request: Any, context: Context) -> None:
        await refuse(context, NotServed("Embed: this server generates; it serves no embeddings"))

    async def GetLoads(self, request: Any, context: Context) -> Any:
        async with _refusing(context):
            return vllm_load.loads_response(self._core.group, self._core.link.load, request)

    async def FlushCache(self, request: Any, context: Context) -> Any:
        """Requests that come later compute their prompts anew. What runs meanwhile goes on, and its blocks are cached
        when it ends: with a ``timeout_s``, that much time is given for nothing to run."""
        async with _refusing(context):
            timeout_s = request.timeout_s
            if not 0 <= timeout_s < math.inf:
                raise InvalidRequest(f"timeout_s is {timeout_s:g}; from 0 on, and finite")
            _ = self._core.group
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._idle()
            num_open = _num_requests(self._core)
            self._core.link.flush_cache()
            what_runs = f"; {num_open} requests go on, and their blocks are cached when they end" if num_open else ""
            message = f"the prefix cache is forgotten{what_runs}"
            return common_pb2.FlushCacheResponse(success=True, message=message)

    async def StartProfile(self, request: Any, context: Context) -> Any:
        try:
            for field, is_asked in _UNSERVED_PROFILE.items():
                if is_asked(request):
                    raise NotServed(f"{field} is not served: a profile is the ledgers' trace, from now on")
            num_steps = request.num_steps if request.HasField("num_steps") else None
            message = await self._profiler.start(request.output_dir, num_steps)
        except AlbireoError as error:
            return common_pb2.ProfileResponse(success=False, message=str(error))
        return common_pb2.ProfileResponse(success=True, message=message)

    async def StopProfile(self, request: Any, context: Context) -> Any:
        try:
            message = await self._profiler.stop()
        except AlbireoError as error:
            return common_pb2.ProfileResponse(success=False, message=str(error))
        return common_pb2.ProfileResponse(success=True, message=message)

    async def GetTokenizer(self, request: Any, context: Context) -> None:
        """The archive in chunks, its fingerprint with the last one."""
        async with _refusing(context):
            data, sha256 = await self._zipped_tokenizer()
            for start in range(0, len(data), _CHUNK_BYTES):
                is_last = start + _CHUNK_BYTES >= len(data)
                chunk = common_pb2.GetTokenizerChunk(
                    data=data[start : start + _CHUNK_BYTES], sha256=sha256 if is_last else ""
                )
                await self._write(context, chunk)

    async def SubscribeKvEvents(self, request: Any, context: Context) -> None:
        """What changes in the prefix cache, and how busy the server is: figures come with each batch, when they change,
        and now and then. While the server is not serving there are no figures to give."""
        async with _refusing(context):
            group, link = self._core.group, self._core.link
            with self._feed.subscribe() as news:
                await context.send_initial_metadata(())
                subscription = Subscription(self._feed, request.start_sequence_number)
                records = vllm_load.LoadRecords(group, request.load_records_before_first_batch)
                while True:
                    self._feed.check_open()
                    news.clear()
                    while (batch := subscription.take()) is not None:
                        await self._write(context, records.beside(batch, link.load))
                    if link.is_serving and (record := records.alone(link.load)) is not None:
                        await self._write(context, record)
                    try:
                        async with asyncio.timeout(_HEARTBEAT_S):
                            await news.wait()
                    except TimeoutError:
                        records.repeat()

    async def _zipped_tokenizer(self) -> TokenizerZip:
        """Made once; a failure is not kept."""
        if self._tokenizer_zip is None:
            path = self._core.model.spec.path
            self._tokenizer_zip = asyncio.get_running_loop().run_in_executor(None, make_tokenizer_zip, path)
        try:
            return await asyncio.shield(self._tokenizer_zip)
        except AlbireoError:
            self._tokenizer_zip = None
            raise

    async def _idle(self) -> None:
        """Waits until nothing runs or waits, as far as the planner has told."""
        while _num_requests(self._core):  # noqa: ASYNC110  # figures come four times a second
            await asyncio.sleep(_IDLE_POLL_S)

    async def _write(self, context: Context, message: Any) -> None:
        """Raises Overloaded when the client does not read."""
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await context.write(message)
        except TimeoutError:
            raise Overloaded(f"the client has left a write pending for {self._write_timeout_s:g} s") from None


@contextlib.asynccontextmanager
async def _refusing(context: Context) -> AsyncIterator[None]:
    """Turns errors into a status of the call."""
    try:
        yield
    except AlbireoError as error:
        await refuse(context, error)
    except aio.InternalError:  # a write failed
        raise asyncio.CancelledError from None  # the client went away


def _num_requests(core: Core) -> int:
    return max(core.num_open, core.link.load.num_running + core.link.load.num_waiting)
