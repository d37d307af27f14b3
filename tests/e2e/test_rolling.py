"""A rolling restart under load: every process of the scheduler is replaced, and no client notices."""

import signal
from pathlib import Path

import pytest

from load import EMPTY, CasePool, Load, wait_for_metrics, wait_until, write_report
from services import Service, fixed_ports, scheduler_service, worker_group

pytestmark = [pytest.mark.e2e, pytest.mark.alone]

NUM_RESTARTS = 2
# A front end drains for half of it at least, until its clients' connections have all been replaced; the longest stream
# takes less than the other half.
DRAIN_TIMEOUT_S = 14


def parts(scheduler: Service) -> dict[str, list[int]]:
    names = {"planner": ("scheduler_svc", "planner")}
    names |= {f"frontend-{index}": ("--name", f"frontend-{index}") for index in range(2)}
    return {name: scheduler.pids(*words) for name, words in names.items()}


def is_replaced(scheduler: Service, before: dict[str, list[int]]) -> bool:
    """One process of each part, and none of them from before."""
    return all(len(pids) == 1 and pids != before[name] for name, pids in parts(scheduler).items())


async def test_no_client_notices_a_rolling_restart(tmp_path: Path, stub_model: Path):
    """Long streams, and short requests on connections that stay open: no error of any kind, every token right."""
    ports = fixed_ports(5)
    with (
        worker_group(tmp_path / "g", stub_model, engine="stub", tp=2, stub_step_ms=5, max_num_seqs=48) as group,
        scheduler_service(
            tmp_path / "s",
            stub_model,
            group,
            port=ports,
            frontends=2,
            drain_timeout=DRAIN_TIMEOUT_S,
            metrics_port=ports + 1,
        ) as scheduler,
    ):
        short = CasePool("short", longest=8)
        async with (
            Load(scheduler.address, "long", 24, cases=CasePool("long", longest=250)) as streams,
            Load(scheduler.address, "short", 8, cases=short, num_channels=4) as requests,
        ):
            await streams.canary()
            for _ in range(NUM_RESTARTS):
                before = parts(scheduler)
                assert all(len(pids) == 1 for pids in before.values()), before
                scheduler.process.send_signal(signal.SIGUSR2)
                await wait_until(lambda before=before: is_replaced(scheduler, before), "all processes are new", 90)
                await streams.canary()
                await wait_for_metrics(ports + 1, {"albireo_frontends": 2.0})
                streams.check()
                requests.check()
            await streams.finish()
            await requests.finish()
        await wait_for_metrics(ports + 1, {**EMPTY, "albireo_frontends": 2.0})
        report = {"streams": streams.report(), "short_requests": requests.report()}
    write_report({"test": "rolling", "restarts": NUM_RESTARTS, **report})
    assert streams.num_unavailable == requests.num_unavailable == 0
