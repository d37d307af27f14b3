"""The front end's process: ``python -m scheduler_svc frontend``."""

import asyncio
import signal

import structlog
import uvloop

from albireo.config import parse
from albireo.errors import AlbireoError
from albireo.logging import set_up_logging
from scheduler_svc.frontend.config import FrontendConfig
from scheduler_svc.frontend.model import load_served_model
from scheduler_svc.frontend.server import FrontendServer

log = structlog.get_logger()

_DRAIN_S = 5.0  # for running streams, on SIGTERM
_FAIL_S = 1.0  # for the last answers, when the planner is lost


def main(argv: list[str] | None = None) -> int:
    """Runs until SIGTERM or SIGINT (0), or until it cannot serve any more (1)."""
    config = parse(FrontendConfig, "python -m scheduler_svc frontend", "Serves clients of one planner.", argv)
    set_up_logging(config.name, config.log_level)
    try:
        return uvloop.run(_serve(config))
    except AlbireoError as error:
        log.error("cannot start", reason=str(error))
        return 1


async def _serve(config: FrontendConfig) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server = FrontendServer(config, load_served_model(config))
    await server.start()
    running = asyncio.create_task(server.run())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if stopping.done():
        log.info("stopping", drain_s=_DRAIN_S)
        await server.stop(_DRAIN_S)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return 0
    stopping.cancel()
    error = running.exception()
    if isinstance(error, AlbireoError):
        log.error("the front end cannot go on", reason=str(error))
    else:
        log.error("the front end met a bug", exc_info=error)
    await server.stop(_FAIL_S)
    return 1
