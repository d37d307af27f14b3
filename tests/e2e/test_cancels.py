"""Clients that go away: what they leave behind is nothing, and nobody beside them notices."""

import asyncio
import random
from pathlib import Path

import pytest

from albireo.rpc import make_channel
from albireo.v1 import generation_pb2_grpc as rpc
from load import EMPTY, Answer, CasePool, Load, run_case, wait_for_metrics
from services import fixed_ports, scheduler_service, worker_group

pytestmark = [pytest.mark.e2e, pytest.mark.alone]

NUM_STREAMS = 256
NUM_CHANNELS = 16
NUM_STORMS = 24
NUM_RETRIES = 6


async def run_one(stub: rpc.GenerationStub, cases: CasePool, rng: random.Random, cancel: bool) -> bool:
    """One request; returns whether it was cut short."""
    answer = Answer(cases.draw(rng))
    await run_case(stub, answer, cancel_after_s=rng.uniform(0, 3) if cancel else None)
    return answer.finish is None


async def storm(stub: rpc.GenerationStub, cases: CasePool, rng: random.Random) -> None:
    """An impatient client: cancels and sends the same prompt again, several times; the last answer is whole."""
    case = cases.draw(rng)
    for _ in range(NUM_RETRIES):
        if rng.random() < 0.5:
            await run_case(stub, Answer(case), cancel_after_s=rng.choice([0.0, 0.001, 0.01, 0.1]))
        else:
            await run_case(stub, Answer(case), stop_after=rng.randrange(1, 5))
    await run_case(stub, Answer(case))


async def test_cancelled_streams_leave_nothing_behind(tmp_path: Path, stub_model: Path):
    """256 streams on two front ends and a pool for a part of them; every third is cancelled, others storm beside."""
    ports = fixed_ports(5)
    pool_gib = 120 * 32 * 4 * 8 / 2**30
    group_flags = {"engine": "stub", "tp": 2, "kv_cache_gib": pool_gib, "max_num_seqs": 64}
    with (
        worker_group(tmp_path / "g", stub_model, **group_flags) as group,
        scheduler_service(
            tmp_path / "s", stub_model, group, port=ports, frontends=2, depth=3, metrics_port=ports + 1
        ) as scheduler,
    ):
        rng, cases = random.Random(11), CasePool("cancels", size=100)
        channels = [make_channel(scheduler.address) for _ in range(NUM_CHANNELS)]
        stubs = [rpc.GenerationStub(channel) for channel in channels]
        async with Load(scheduler.address, "cancels", num_streams=0) as beside:
            async with beside.canaries():
                streams = [
                    run_one(stubs[i % NUM_CHANNELS], cases, random.Random(rng.random()), cancel=i % 3 == 0)
                    for i in range(NUM_STREAMS)
                ]
                storms = [storm(stubs[i % NUM_CHANNELS], cases, random.Random(rng.random())) for i in range(NUM_STORMS)]
                were_cut, _ = await asyncio.gather(asyncio.gather(*streams), asyncio.gather(*storms))
            assert sum(were_cut) > NUM_STREAMS // 8, "the cancellations came too late"
            assert beside.num_streams > 3
        for channel in channels:
            await channel.close()
        await wait_for_metrics(ports + 1, EMPTY)
        for frontend in range(2):
            await wait_for_metrics(ports + 3 + frontend, {"albireo_frontend_streams_open": 0.0})
