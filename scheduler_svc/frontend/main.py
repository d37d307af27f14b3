"""The front end's process: ``python -m scheduler_svc frontend``."""

import asyncio
import gc
import signal

import structlog
import uvloop

from albireo.config import parse
from albireo.errors import AlbireoError, ConfigError
from albireo.logging import set_up_logging
from albireo.security import load_security
from albireo.tracing import Tracer, open_tracer
from albireo.watchdog import Watchdog
from scheduler_svc.frontend.config import FrontendConfig
from scheduler_svc.frontend.model import load_served_model
from scheduler_svc.frontend.server import FrontendServer

log = structlog.get_logger()

_FAIL_S = 1.0  # for the last answers, when the front end cannot go on


def main(argv: list[str] | None, watchdog: Watchdog) -> int:
    """Runs until SIGTERM or SIGINT.

    Exit status: 0 asked to stop, 1 failed while running, 2 the configuration does not work.
    """
    config = parse(FrontendConfig, "python -m scheduler_svc frontend", "Serves clients of one planner.", argv)
    set_up_logging(config.name, config.log_level)
    try:
        with open_tracer(config.name, config.otlp_endpoint, config.otlp_sample_ratio) as tracer:
            return uvloop.run(_run(config, watchdog, tracer))
    except AlbireoError as error:
        log.error("cannot start", reason=str(error))
        return 2 if isinstance(error, ConfigError) else 1


async def _run(config: FrontendConfig, watchdog: Watchdog, tracer: Tracer | None) -> int:
    beating = asyncio.create_task(watchdog.keep_beating())
    try:
        return await _serve(config, watchdog, tracer)
    finally:
        beating.cancel()


async def _serve(config: FrontendConfig, watchdog: Watchdog, tracer: Tracer | None) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    security = load_security(config)
    model = await asyncio.to_thread(load_served_model, config)
    gc.freeze()  # a full collection of what stays anyway would hold up every stream for tens of milliseconds
    server = FrontendServer(config, model, security, tracer, on_serving=watchdog.ready)
    await server.start()
    running = asyncio.create_task(server.run())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if stopping.done():
        log.info("stopping", drain_timeout_s=config.drain_timeout)
        await server.stop(config.drain_timeout)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        log.info("stopped")
        return 0
    stopping.cancel()
    error = running.exception()
    if isinstance(error, AlbireoError):
        log.error("the front end cannot go on", reason=str(error))
    else:
        log.error("the front end met a bug", exc_info=error)
    await server.stop(_FAIL_S)
    return 1
