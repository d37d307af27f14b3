"""A tenant's flood over the real services: another tenant hardly notices."""

import asyncio
import random
from pathlib import Path

import numpy as np
import pytest

from albireo.rpc import make_channel
from albireo.v1 import generation_pb2_grpc as rpc
from load import EMPTY, Answer, CasePool, fixed_case, random_tokens, run_case, wait_for_metrics, write_report
from services import fixed_ports, read_metrics, scheduler, worker_group

pytestmark = [pytest.mark.e2e, pytest.mark.soak]

MAX_NUM_SEQS = 16
NUM_QUIET = 4  # clients of the quiet tenant, and of its equal
NUM_FLOOD = 300
PHASE_S = 25.0
WARM_UP_S = 3.0


class Tenant:
    """Clients of one tenant, each of which sends its next request when one ends."""

    def __init__(self, target: str, name: str, num_clients: int) -> None:
        self._target = target
        self._name = name
        self._num_clients = num_clients
        self._is_measured = False
        self._is_ending = False
        self._cases = CasePool(
            name, make=lambda rng: fixed_case(random_tokens(rng, rng.randrange(5, 60)), rng.randrange(10, 30), name)
        )
        self._cases.fill()
        self.first_tokens_s: list[float] = []
        self.at_planner_s: list[float] = []  # the same, as the planner saw it

    async def run(self) -> None:
        async with make_channel(self._target) as channel:
            stub = rpc.GenerationStub(channel)
            await asyncio.gather(*(self._run_client(stub, index) for index in range(self._num_clients)))

    def measure(self) -> None:
        """From now on times count."""
        self._is_measured = True

    def end(self) -> None:
        """No client sends another request."""
        self._is_ending = True

    def p99_s(self) -> float:
        """Of the time to first token."""
        return float(np.percentile(self.first_tokens_s, 99))

    async def _run_client(self, stub: rpc.GenerationStub, index: int) -> None:
        rng = random.Random(f"{self._name}/{index}")
        while not self._is_ending:
            is_measured, answer = self._is_measured, Answer(self._cases.draw(rng))
            await run_case(stub, answer)
            if is_measured:
                assert answer.first_token_s is not None
                assert answer.finish is not None
                timings = answer.finish.timings
                self.at_planner_s.append(timings.queue_s + timings.prefill_s)
                self.first_tokens_s.append(answer.first_token_s)


async def run_beside(target: str, num_others: int, metrics_port: int) -> tuple[Tenant, Tenant]:
    """The quiet tenant beside another one with so many clients."""
    quiet, other = Tenant(target, "quiet", NUM_QUIET), Tenant(target, "other", num_others)
    running = [asyncio.create_task(tenant.run()) for tenant in (quiet, other)]
    await asyncio.sleep(WARM_UP_S)
    quiet.measure(), other.measure()
    waiting: list[float] = []
    for _ in range(int(PHASE_S)):
        await asyncio.sleep(1)
        waiting.append((await asyncio.to_thread(read_metrics, metrics_port))["albireo_waiting_sequences"])
    quiet.end(), other.end()
    await asyncio.gather(*running)
    if num_others > MAX_NUM_SEQS:
        assert min(waiting) > num_others - 4 * MAX_NUM_SEQS, "this is no flood"
    return quiet, other


@pytest.mark.timeout(300)
async def test_a_flood_does_not_push_another_tenant_beyond_twice_its_wait(tmp_path: Path, stub_model: Path):
    """p99 of the time to first token of a closed loop of 4, beside an equal tenant and beside one of 300."""
    ports = fixed_ports(4)
    flags = {"engine": "stub", "stub_step_ms": 10, "max_num_seqs": MAX_NUM_SEQS}
    with (
        worker_group(tmp_path / "g", stub_model, **flags) as group,
        scheduler(tmp_path / "s", stub_model, group, port=ports, metrics_port=ports + 1) as target,
    ):
        beside_equal, equal = await run_beside(target, NUM_QUIET, ports + 1)
        await wait_for_metrics(ports + 1, EMPTY)
        beside_flood, flood = await run_beside(target, NUM_FLOOD, ports + 1)
        await wait_for_metrics(ports + 1, EMPTY)
        num_preemptions = read_metrics(ports + 1)["albireo_preemptions_total"]
    tenants = {"beside_equal": beside_equal, "equal": equal, "beside_flood": beside_flood, "flood": flood}
    table = {
        name: {
            "requests": len(tenant.first_tokens_s),
            "ttft_p50_ms": round(1000 * float(np.median(tenant.first_tokens_s)), 1),
            "ttft_p99_ms": round(1000 * tenant.p99_s(), 1),
            "at_planner_p50_ms": round(1000 * float(np.median(tenant.at_planner_s)), 1),
            "at_planner_p99_ms": round(1000 * float(np.percentile(tenant.at_planner_s, 99)), 1),
        }
        for name, tenant in tenants.items()
    }
    write_report({"test": "fairness", **table, "preemptions": num_preemptions})
    assert len(beside_equal.first_tokens_s) > 100
    assert len(beside_flood.first_tokens_s) > 100
    assert flood.p99_s() > 5 * beside_flood.p99_s()
    assert beside_flood.p99_s() <= 2 * beside_equal.p99_s()
