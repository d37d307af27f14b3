"""The leader of a group, as its compute thread sees it. Its I/O thread runs the plan stream's server and the relay."""

import asyncio
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import uvloop
from grpc import aio

from albireo import rpc
from albireo.metrics import serve_metrics
from albireo.plan import StepResult
from albireo.security import Security
from albireo.tracing import Tracer
from albireo.transfers import TransferResult, decode_transfer_result
from albireo.v1 import plan_pb2
from worker_svc import ledgers
from worker_svc.ledgers import GroupLedgers
from worker_svc.life import Meeting, Membership
from worker_svc.plan_stream import SERVICE_NAME, WorkerGroup
from worker_svc.relay import RelayServer

Result = TypeVar("Result")


class Leader:
    """Gathers the ranks of each group, and serves its planner. Methods with an underscore run on the I/O thread."""

    def __init__(
        self,
        tp_size: int,
        listen: str,
        relay_path: Path,
        metrics_port: int,
        group_ledgers: GroupLedgers,
        security: Security,
        tracer: Tracer | None,
    ) -> None:
        self.loop = uvloop.new_event_loop()
        self._relay = RelayServer(tp_size - 1, self._lose, self._take_transferred)
        self._group = WorkerGroup(tp_size, self._relay.send_all, tracer)
        self._ledgers = group_ledgers
        self._membership: Membership | None = None
        self._server: aio.Server | None = None
        self._health: rpc.Health | None = None
        self._tasks: set[asyncio.Task[None]] = set()  # references: the loop itself holds none
        threading.Thread(target=self.loop.run_forever, name="io", daemon=True).start()
        self._call(self._start(listen, relay_path, metrics_port, security))

    def report_progress(self, stage: str, progress: float) -> None:
        self.loop.call_soon_threadsafe(self._group.report_progress, stage, progress)

    def meet(self, membership: Membership, info: plan_pb2.GroupInfo) -> Meeting:
        return self._call(self._meet(membership, info.num_blocks))

    def become_ready(self, membership: Membership, info: plan_pb2.GroupInfo) -> None:
        self._call(self._become_ready(membership, info))

    def report(self, result: StepResult) -> None:
        self.loop.call_soon_threadsafe(self._group.put_result, result)

    def report_transfer(self, result: TransferResult) -> None:
        self.loop.call_soon_threadsafe(self._group.put_transfer, result)

    def part(self, reason: str) -> None:
        self.loop.call_soon_threadsafe(self._part, reason)

    def close(self) -> None:
        self._call(self._stop())

    def _call(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Runs ``work`` on the I/O thread and waits for it."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    async def _start(self, listen: str, relay_path: Path, metrics_port: int, security: Security) -> None:
        await self._relay.listen(relay_path)
        self._server = rpc.make_server(for_peers=True, security=security)
        self._server.add_generic_rpc_handlers((self._group.handlers(), self._ledgers.handlers()))
        self._health = await rpc.add_health(self._server, [SERVICE_NAME, ledgers.SERVICE_NAME])
        rpc.listen(self._server, listen, security)
        await self._server.start()
        serve_metrics(metrics_port, security)
        self._run(self._ledgers.keep_folding())

    async def _meet(self, membership: Membership, num_blocks: int) -> Meeting:
        self._membership = membership
        self._group.report_progress("meeting the other ranks", 1.0)
        return await self._relay.gather(num_blocks, membership.check)

    async def _become_ready(self, membership: Membership, info: plan_pb2.GroupInfo) -> None:
        await self._relay.wait_until_ready(membership.check)
        self._group.set_ready(info, membership.steps, membership.transfers)
        await self._show_health()

    def _lose(self, rank: int) -> None:
        assert self._membership is not None
        self._membership.break_up(f"rank {rank} is gone")

    def _take_transferred(self, payload: bytes) -> None:
        self._group.put_transfer(decode_transfer_result(plan_pb2.TransferResult.FromString(payload)))

    def _part(self, reason: str) -> None:
        self._group.set_broken(reason)
        self._relay.release()
        self._run(self._show_health())

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _show_health(self) -> None:
        assert self._health is not None
        await self._health.set_serving(self._group.is_ready)

    async def _stop(self) -> None:
        assert self._server is not None
        await self._server.stop(grace=0.5)
