"""How a service's process runs until it is asked to stop."""

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any


async def run_until_stopped(serving: Coroutine[Any, Any, None]) -> bool:
    """Runs ``serving`` until it ends, or raises, or SIGTERM or SIGINT comes: then it is cancelled, and awaited.

    Returns:
        Whether it was asked to stop.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    stopped = asyncio.create_task(stop.wait())
    task = asyncio.create_task(serving)
    await asyncio.wait({stopped, task}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        return True
    return False
