"""Health means progress: readiness fails in time when a process freezes, and comes back when it is healed."""

import asyncio
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from albireo.rpc import make_channel
from albireo.v1 import generation_pb2_grpc as rpc
from load import random_case
from services import scheduler_service, worker_service

pytestmark = [pytest.mark.e2e, pytest.mark.alone]

# The notes of every engine's users ask for 5 s; the rest is for a machine that is busy with other tests.
NOTICED_WITHIN_S = 6.0


async def is_serving(channel: aio.Channel) -> bool:
    try:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=1)
    except aio.AioRpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def wait_for_health(channel: aio.Channel, wanted: bool, within_s: float) -> float:
    """How long it takes until health says so."""
    start = time.monotonic()
    while await is_serving(channel) is not wanted:
        assert time.monotonic() - start < within_s, f"health is not {wanted} within {within_s} s"
        await asyncio.sleep(0.05)
    return time.monotonic() - start


async def read_all(stub: rpc.GenerationStub, case: Any) -> list[int]:
    return [token async for response in stub.Generate(case.request(), timeout=60) for token in response.token_ids]


@pytest.mark.parametrize("victim", ["leader", "planner"])
async def test_a_frozen_process_fails_readiness_and_is_healed(tmp_path: Path, stub_model: Path, victim: str):
    with (
        worker_service(tmp_path / "g", stub_model, engine="stub", tp=2, stub_step_ms=20) as group,
        scheduler_service(tmp_path / "s", stub_model, group.address) as scheduler,
    ):
        service, words = {
            "leader": (group, ("--rank", "0")),
            "planner": (scheduler, ("scheduler_svc", "planner")),
        }[victim]
        async with make_channel(f"unix:{tmp_path}/s/frontend-0.sock") as channel:
            await wait_for_health(channel, True, 10)
            case = random_case(random.Random(victim), longest=400)
            while len(case.expected) < 150:
                case = random_case(random.Random(str(case)), longest=400)
            running = asyncio.create_task(read_all(rpc.GenerationStub(channel), case))
            await asyncio.sleep(0.5)
            (pid,) = service.pids(*words)
            service.send_signal(pid, signal.SIGSTOP)
            await wait_for_health(channel, False, NOTICED_WITHIN_S)
            await wait_for_health(channel, True, 30)
            assert service.pids(*words) not in ([], [pid])
            assert await running == case.expected
