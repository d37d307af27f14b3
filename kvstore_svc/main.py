"""The store's process."""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import uvloop
from grpc import aio

from albireo import rpc
from albireo.config import parse
from albireo.errors import AlbireoError, ConfigError
from albireo.logging import set_up_logging
from albireo.metrics import serve_metrics
from albireo.security import Security, load_security
from albireo.stopping import run_until_stopped
from albireo.v1 import kvstore_pb2 as pb
from albireo.watchdog import Watchdog
from kvstore_svc.config import StoreConfig
from kvstore_svc.counts import Counts
from kvstore_svc.index import Index
from kvstore_svc.memory import Memory
from kvstore_svc.redis_blocks import connect, load_mac_key
from kvstore_svc.redis_process import RedisProcess
from kvstore_svc.service import SERVICE_NAME, Store
from kvstore_svc.sessions import serve_session
from kvstore_svc.tier import Tier

_GIB = 1 << 30
_SOCKET = "kv-arena.sock"
_MAX_SOCKET_PATH = 107  # sun_path

log = structlog.get_logger()


def main(argv: list[str] | None, watchdog: Watchdog) -> int:
    """Runs the store until SIGTERM. What it holds is gone then; what Redis holds is not.

    Exit status: 0 asked to stop, 1 failed while running, 2 the configuration does not work.
    """
    config = parse(StoreConfig, "python -m kvstore_svc", "Keeps KV blocks for planners and their ranks.", argv)
    set_up_logging("kvstore", config.log_level)
    try:
        with contextlib.ExitStack() as stack:
            run_dir = Path(config.run_dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="albireo-kv-")))
            if uvloop.run(run_until_stopped(_serve(config, load_security(config), run_dir.absolute(), watchdog))):
                log.info("store ends")
    except AlbireoError as error:
        log.error("store ends", error=str(error), kind=type(error).__name__)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


async def _serve(config: StoreConfig, security: Security, run_dir: Path, watchdog: Watchdog) -> None:
    beating = asyncio.create_task(watchdog.keep_beating())
    server = rpc.make_server(for_peers=True, security=security)
    tasks: list[asyncio.Task[None]] = []
    try:
        path = _socket_path(run_dir)
        store = _make_store(config, path)
        server.add_generic_rpc_handlers((store.handlers(_session_handler(store)),))
        health = await rpc.add_health(server, [SERVICE_NAME])
        rpc.listen(server, config.listen, security)
        serve_metrics(config.metrics_port, security)
        tasks = [asyncio.create_task(store.ranks.serve(path)), asyncio.create_task(store.keep_sweeping())]
        if store.tier is not None:
            tasks.append(asyncio.create_task(store.tier.run()))
        await server.start()
        await health.set_serving(True)
        log.info("store is ready", listen=config.listen, arena_bytes=config.arena_bytes, redis=bool(config.redis))
        watchdog.ready()
        await asyncio.gather(*tasks)
    finally:
        beating.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.stop(grace=0.2)


def _make_store(config: StoreConfig, path: Path) -> Store:
    memory = Memory.create(config.arena_bytes)
    index = Index(config.arena_bytes, config.segment_bytes, int(config.tenant_gib * _GIB), config.ttl)
    counts = Counts()
    store = Store(index, memory, str(path), config.credit_bytes, counts)
    if config.redis:
        connect(config)  # what is wrong with the flags is said now, not by a worker
        load_mac_key(config)
        start = partial(RedisProcess.start, config, arena=memory.descriptor)
        store.tier = Tier(index, start, config.redis_workers, config.redis_queue, config.ttl, counts, store.tell_change)
    return store


def _session_handler(store: Store) -> Any:
    """An asynchronous generator: gRPC does not take a partial for one."""

    async def run(
        requests: AsyncIterator[pb.KvRequest], context: "aio.ServicerContext[Any, Any]"
    ) -> AsyncIterator[pb.KvReply]:
        async for reply in serve_session(store, requests, context):
            yield reply

    return run


def _socket_path(run_dir: Path) -> Path:
    path = run_dir / _SOCKET
    if len(str(path)) > _MAX_SOCKET_PATH:
        raise ConfigError(f"--run-dir {run_dir}: {path} is longer than {_MAX_SOCKET_PATH} bytes, a socket's limit")
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path
