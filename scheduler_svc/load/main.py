"""The load's process: ``python -m scheduler_svc load``."""

import asyncio
import signal
from pathlib import Path

import structlog
import uvloop

from albireo.config import parse
from albireo.errors import AlbireoError
from albireo.logging import set_up_logging
from albireo.watchdog import Watchdog
from scheduler_svc.load.config import LoadConfig
from scheduler_svc.load.internal import InternalLoad
from scheduler_svc.load.record import Record, write_report
from scheduler_svc.load.streams import StreamLoad

log = structlog.get_logger()


def main(argv: list[str] | None, watchdog: Watchdog) -> int:
    """Runs until SIGTERM or SIGINT. Exit status: 0 asked to stop, 1 a sequence failed or the services are gone."""
    description = "Keeps a number of sequences running, for measurements."
    config = parse(LoadConfig, "python -m scheduler_svc load", description, argv)
    set_up_logging(config.name, config.log_level)
    try:
        uvloop.run(_run(config, watchdog))
    except AlbireoError as error:
        log.error("the load ends", reason=str(error))
        return 1
    return 0


async def _run(config: LoadConfig, watchdog: Watchdog) -> None:
    record = Record()
    loop = asyncio.get_running_loop()
    beating = asyncio.create_task(watchdog.keep_beating())
    load = InternalLoad(config, record) if config.planner else StreamLoad(config, record)
    running = asyncio.create_task(load.run(watchdog))

    def turn() -> None:
        report = record.turn()
        log.info("window", **report)
        if config.report:
            write_report(Path(config.report), report)

    loop.add_signal_handler(signal.SIGUSR1, turn)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, running.cancel)
    try:
        await running
    except asyncio.CancelledError:
        log.info("the load ends")
    finally:
        beating.cancel()
