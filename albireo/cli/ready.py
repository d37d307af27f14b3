"""Waiting until the services are ready, with a progress bar for the loading."""

import asyncio
import sys

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from albireo import rpc
from albireo.cli.client import Server
from albireo.cli.progress import loading_bar
from albireo.errors import GroupError
from albireo.v1 import plan_pb2, plan_pb2_grpc

_POLL_S = 0.1
_CALL_TIMEOUT_S = 5.0  # a loading worker may be slow to answer
# The service is not up yet, or busy.
_NOT_YET = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


async def wait_for_group(server: Server) -> plan_pb2.GroupInfo:
    """Waits until the worker group there has loaded its model. Endless: the caller watches the process."""
    stage = ""
    with loading_bar() as bar:
        bar.set_description_str("starting the worker")
        while True:
            status = await _group_status(server)
            if status.state == plan_pb2.GroupStatus.STATE_READY:
                return status.info
            if status.stage != stage:
                stage = status.stage
                bar.set_description_str(stage)
                if bar.disable:
                    print(f"albireo: {stage}", file=sys.stderr, flush=True)
            bar.n = min(1.0, status.progress)
            bar.refresh()
            await asyncio.sleep(_POLL_S)


async def wait_until_serving(server: Server) -> None:
    """Waits until the health service there says SERVING. Endless: the caller watches the process."""
    while not await is_serving(server):  # noqa: ASYNC110  # the event is in another process
        await asyncio.sleep(_POLL_S)


# Each question has a channel of its own: one that has failed to connect would wait longer each time.


async def _group_status(server: Server) -> plan_pb2.GroupStatus:
    async with rpc.make_channel(server.target, security=server.security) as channel:
        stub = plan_pb2_grpc.WorkerGroupStub(channel)
        try:
            return await stub.GetStatus(plan_pb2.GetStatusRequest(), timeout=_CALL_TIMEOUT_S)
        except aio.AioRpcError as error:
            if error.code() in _NOT_YET:
                return plan_pb2.GroupStatus(state=plan_pb2.GroupStatus.STATE_LOADING)
            raise GroupError(f"the worker group does not tell its state: {error.code().name}") from error


async def is_serving(server: Server) -> bool:
    """Whether its health service says SERVING. GroupError: it has none."""
    async with rpc.make_channel(server.target, security=server.security) as channel:
        stub = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]  # grpc_health ships no types
        try:
            response = await stub.Check(health_pb2.HealthCheckRequest(), timeout=_CALL_TIMEOUT_S)
        except aio.AioRpcError as error:
            if error.code() in _NOT_YET:
                return False
            raise GroupError(f"{server.target} has no health service: {error.code().name}") from error
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)
