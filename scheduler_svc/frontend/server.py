"""The front end as a whole: its gRPC server (both client APIs, the ledger), its link to the planner, its metrics."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import structlog
from smg_grpc_proto import vllm_engine_pb2_grpc

from albireo.errors import ConfigError, GroupUnavailable
from albireo.rpc import Health, add_health, make_server
from albireo.security import OPEN, Security
from albireo.tracing import Tracer
from albireo.v1 import generation_pb2_grpc, ledger_pb2_grpc
from scheduler_svc.frontend import ledger, native, vllm_api
from scheduler_svc.frontend.addresses import Addresses
from scheduler_svc.frontend.config import FrontendConfig
from scheduler_svc.frontend.core import Core
from scheduler_svc.frontend.link import PlannerLink
from scheduler_svc.frontend.malformed import RefuseMalformed
from scheduler_svc.frontend.metrics import Metrics, MetricsPage
from scheduler_svc.frontend.model import ServedModel

log = structlog.get_logger()

_SERVICES = (native.SERVICE_NAME, vllm_api.SERVICE_NAME, ledger.SERVICE_NAME)
# What a tenant may not do: see what others send and when, or slow them down.
_FOR_OPERATORS = (
    f"/{ledger.SERVICE_NAME}/Read",
    f"/{vllm_api.SERVICE_NAME}/FlushCache",
    f"/{vllm_api.SERVICE_NAME}/SubscribeKvEvents",
    f"/{vllm_api.SERVICE_NAME}/StartProfile",
    f"/{vllm_api.SERVICE_NAME}/StopProfile",
)
_MIN_CONNECTION_AGE_S = 1.0
_AGE_SPREAD = 1.1  # gRPC varies the age of connections by a tenth
_SUCCESSOR_CHECK_S = 0.25
_ATTACH_FIRST_S = 1.0
_LAST_WORDS_S = 0.5  # for the last answers to leave


class FrontendServer:
    """Use: `start`, then `run` until it raises or is cancelled, then `stop`.

    ``on_serving`` is called when it serves for the first time.
    """

    def __init__(
        self,
        config: FrontendConfig,
        model: ServedModel,
        security: Security = OPEN,
        tracer: Tracer | None = None,
        on_serving: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        shared = [f"{config.host}:{config.port}"] if config.port else []
        self._addresses = Addresses([*shared, *([config.listen] if config.listen else [])], security)
        self._link = PlannerLink(config.planner, config.name, config.recovery_timeout, security)
        self._metrics = Metrics()
        self._metrics_page = MetricsPage(config.host, config.metrics_port, self._metrics, security)
        self._core = Core(config, model, self._link, self._metrics, tracer)
        self._connection_age_s = max(_MIN_CONNECTION_AGE_S, config.drain_timeout / 2)
        self._server = make_server(
            reuse_port=True,
            interceptors=[RefuseMalformed(_SERVICES)],
            security=security,
            for_operators=_FOR_OPERATORS,
            options={
                "grpc.max_receive_message_length": config.max_message_mib << 20,
                # Streams that a client does not read stay open, so there may be more of them than requests.
                "grpc.max_concurrent_streams": 2 * config.max_streams,
                "grpc.max_connection_age_ms": round(self._connection_age_s * 1000),
            },
        )
        generation_pb2_grpc.add_GenerationServicer_to_server(native.GenerationServicer(self._core), self._server)
        self._vllm = vllm_api.VllmEngineServicer(self._core, config)
        vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(self._vllm, self._server)
        ledger_pb2_grpc.add_LedgerServicer_to_server(ledger.LedgerServicer(self._link), self._server)
        self._health: Health | None = None
        self._on_serving = on_serving
        self._connecting: asyncio.Task[object] | None = None
        self._runner: asyncio.Task[object] | None = None
        self._is_stopping = False

    async def start(self) -> None:
        """Listens. Until the planner is there, health says NOT_SERVING and requests get UNAVAILABLE.

        A planner that is there already is attached to first: others may serve the port meanwhile.
        """
        if not self._addresses.names:
            raise ConfigError("--port is 0 and there is no --listen: nowhere to listen")
        self._connecting = asyncio.create_task(self._link.connect(self._config.startup_timeout))
        await asyncio.wait({self._connecting}, timeout=_ATTACH_FIRST_S)
        self._addresses.bind(self._server)
        await self._metrics_page.open()
        self._health = await add_health(self._server, _SERVICES)
        await self._server.start()
        self._addresses.take_over()
        log.info("listening", addresses=self._addresses.names, model=self._core.model.name)

    async def run(self) -> None:
        """Serves for ever. Raises GroupUnavailable when there is no planner at the start, or another one later."""
        self._runner = asyncio.current_task()
        assert self._connecting is not None, "start first"
        async with self._publishing_health():
            await self._connecting
            await self._link.run()

    async def stop(self, drain_s: float) -> None:
        """Gives the addresses up, lets running requests finish for ``drain_s``, fails the rest with UNAVAILABLE.

        Where a successor listens, requests are taken until their connections have moved there; else none any more.
        """
        self._is_stopping = True
        self._vllm.close()
        if self._health is not None:
            await self._health.set_serving(False)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                await self._hand_over()
                self._core.refuse_new()
                await self._core.idle()
        self._core.refuse_new()
        self._link.fail_all(GroupUnavailable("the server is shutting down"))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                await self._core.idle()
        self._addresses.remove()
        await self._server.stop(_LAST_WORDS_S)
        for task in (self._connecting, self._runner):
            if task is not None:
                task.cancel()
        await self._link.close()
        self._core.close()
        await self._metrics_page.close()

    async def _hand_over(self) -> None:
        """Waits until every connection has gone to the successor, where there is one."""
        self._addresses.close()
        loop = asyncio.get_running_loop()
        all_aged_at = loop.time() + self._connection_age_s * _AGE_SPREAD + _SUCCESSOR_CHECK_S
        while loop.time() < all_aged_at and self._addresses.num_connections():
            if not await self._addresses.have_successor():
                return
            await asyncio.sleep(_SUCCESSOR_CHECK_S)

    @contextlib.asynccontextmanager
    async def _publishing_health(self) -> AsyncIterator[None]:
        """Health follows the link for as long as this is open."""
        changed = asyncio.Event()
        changed.set()
        self._link.on_change = changed.set
        publisher = asyncio.create_task(self._publish_health(changed))
        try:
            yield
        finally:
            publisher.cancel()
            await asyncio.gather(publisher, return_exceptions=True)
            await self._set_serving(False)

    async def _publish_health(self, changed: asyncio.Event) -> None:
        was_serving = False
        while True:
            await changed.wait()
            changed.clear()
            is_serving = self._link.is_serving
            if is_serving == was_serving:
                continue
            was_serving = is_serving
            log.info("health", serving=is_serving)
            await self._set_serving(is_serving)
            if is_serving:
                self._on_serving()

    async def _set_serving(self, is_serving: bool) -> None:
        if self._health is not None:
            await self._health.set_serving(is_serving and not self._is_stopping)
