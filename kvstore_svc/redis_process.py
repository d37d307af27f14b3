"""A Redis worker's process, from the store's side: started, asked, and ended."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from albireo.child import python_module
from albireo.config import to_argv
from albireo.v1 import kvtier_pb2 as pb
from kvstore_svc.config import REDIS_FLAGS, StoreConfig
from kvstore_svc.tier_wire import read_message, write_message

_ANSWER_WITHIN_S = 20.0  # beside the timeouts of its operations
_URL_FLAG = "redis"  # may hold a password: not for a command line


class WorkerLost(Exception):
    """The worker is dead, and touches nothing any more."""


@dataclass(eq=False)
class RedisProcess:
    """Made by `start`. One that does not answer a job within ``patience_s`` is killed."""

    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    patience_s: float

    def __post_init__(self) -> None:
        self._waiting: dict[int, asyncio.Future[pb.TierReport]] = {}
        self._listening = asyncio.create_task(self._listen())

    @classmethod
    async def start(cls, config: StoreConfig, number: int, arena: int) -> "RedisProcess":
        """Returns when it is ready. ``arena``: the descriptor of the memfd.

        Raises WorkerLost where it did not get so far.
        """
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            argv = [*python_module("kvstore_svc"), "redis-worker", "--name", f"redis-{number}"]
            argv += ["--socket-fd", str(theirs.fileno()), "--arena-fd", str(arena)]
            argv += to_argv(config, *(name for name in REDIS_FLAGS if name != _URL_FLAG), "log_level")
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), arena),
                env=_environment(config),
                start_new_session=True,  # Ctrl-C in a terminal is for the store
            )
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        worker = cls(process, reader, writer, _ANSWER_WITHIN_S + 10 * config.redis_timeout)
        try:
            await worker.ask(pb.TierJob())
        except BaseException:
            worker.kill()
            raise
        return worker

    @property
    def num_waiting(self) -> int:
        """Jobs without a report."""
        return len(self._waiting)

    async def ask(self, job: pb.TierJob) -> pb.TierReport:
        """Raises WorkerLost. A caller that is cancelled does not stop the job."""
        if self._listening.done():
            raise WorkerLost("the Redis worker has died")
        answer = self._waiting[job.id] = asyncio.get_running_loop().create_future()
        write_message(self.writer, job.SerializeToString())
        hung = asyncio.get_running_loop().call_later(self.patience_s, self.kill)
        try:
            return await asyncio.shield(answer)
        finally:
            hung.cancel()

    async def wait_until_gone(self) -> None:
        await asyncio.shield(self._listening)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    async def _listen(self) -> None:
        """Hands out reports until the worker is dead and reaped; whoever still waits is told then, not before."""
        try:
            while (message := await read_message(self.reader)) is not None:
                report = pb.TierReport.FromString(message)
                answer = self._waiting.pop(report.id, None)
                if answer is not None and not answer.done():
                    answer.set_result(report)
        finally:
            self.kill()
            await self.process.wait()
            self.writer.close()
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(WorkerLost("the Redis worker has died"))
                    answer.exception()  # seen, should nobody wait


def _environment(config: StoreConfig) -> Mapping[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ALBIREO_")}
    return {**inherited, "ALBIREO_REDIS": config.redis}
