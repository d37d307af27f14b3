"""The front end as a whole: its gRPC server with both client APIs, its link to the planner, its metrics."""

import asyncio
from threading import Thread
from wsgiref.simple_server import WSGIServer

import structlog
from prometheus_client import start_http_server
from smg_grpc_proto import vllm_engine_pb2_grpc

from albireo.errors import ConfigError, GroupUnavailable
from albireo.rpc import Health, add_health, make_server
from albireo.v1 import generation_pb2_grpc
from scheduler_svc.frontend import native, vllm_api
from scheduler_svc.frontend.config import FrontendConfig
from scheduler_svc.frontend.core import Core
from scheduler_svc.frontend.link import PlannerLink
from scheduler_svc.frontend.metrics import Metrics
from scheduler_svc.frontend.model import ServedModel

log = structlog.get_logger()


class FrontendServer:
    """Use: `start`, then `run` until it raises or is cancelled, then `stop`."""

    def __init__(self, config: FrontendConfig, model: ServedModel) -> None:
        self._config = config
        self._link = PlannerLink(config.planner, config.name)
        self._metrics = Metrics()
        self._core = Core(model, self._link, self._metrics)
        self._server = make_server(reuse_port=True)
        generation_pb2_grpc.add_GenerationServicer_to_server(native.GenerationServicer(self._core), self._server)
        vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(vllm_api.VllmEngineServicer(self._core), self._server)
        self._health: Health | None = None
        self._metrics_server: tuple[WSGIServer, Thread] | None = None

    async def start(self) -> None:
        """Listens. Until the planner is there, health says NOT_SERVING and requests get UNAVAILABLE."""
        config = self._config
        own = [config.listen] if config.listen else []
        shared = [f"{config.host}:{config.port}"] if config.port else []
        if not own and not shared:
            raise ConfigError("--port is 0 and there is no --listen: nowhere to listen")
        for address in [*shared, *own]:
            try:
                self._server.add_insecure_port(address)
            except RuntimeError as error:
                raise ConfigError(f"cannot listen on {address}: {error}") from error
        if config.metrics_port:
            self._metrics_server = _serve_metrics(config.host, config.metrics_port, self._metrics)
        self._health = await add_health(self._server, [native.SERVICE_NAME, vllm_api.SERVICE_NAME])
        await self._server.start()
        log.info("listening", addresses=[*shared, *own], model=self._core.model.name)

    async def run(self) -> None:
        """Serves until the link to the planner is lost; then raises GroupUnavailable."""
        await self._link.connect(self._config.startup_timeout)
        await self._set_serving(True)
        try:
            await self._link.run()
        finally:
            await self._set_serving(False)

    async def stop(self, drain_s: float) -> None:
        """Stops accepting, lets running requests finish for ``drain_s``, fails the rest with UNAVAILABLE."""
        await self._set_serving(False)
        stopping = asyncio.create_task(self._server.stop(grace=drain_s + 1))
        await asyncio.wait({stopping}, timeout=drain_s)
        self._link.fail_all(GroupUnavailable("the server is shutting down"))
        await stopping
        await self._link.close()
        self._core.close()
        if self._metrics_server is not None:
            server, thread = self._metrics_server
            server.shutdown()
            server.server_close()
            thread.join()

    async def _set_serving(self, serving: bool) -> None:
        if self._health is not None:
            await self._health.set_serving(serving)


def _serve_metrics(host: str, port: int, metrics: Metrics) -> tuple[WSGIServer, Thread]:
    try:
        return start_http_server(port, addr=host, registry=metrics.registry)
    except OSError as error:
        raise ConfigError(f"--metrics-port {port}: {error.strerror}") from error
