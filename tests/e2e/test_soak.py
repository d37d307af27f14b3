"""Nothing grows: memory, file descriptors, threads and shared memory of every process under hours of load."""

import asyncio
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from load import EMPTY, CasePool, Load, wait_for_metrics, write_report
from services import Service, fixed_ports, scheduler_service, worker_service

pytestmark = [pytest.mark.e2e, pytest.mark.soak]

SAMPLE_INTERVAL_S = 5.0
# CPython takes memory in arenas of 1 MiB and malloc in steps of its own: two such steps in the middle of the 20 minutes
# that count are a slope of about 8 MiB an hour, while a kilobyte lost per request would be more than 100.
TOLERANCE_MIB_PER_HOUR = 8.0
# In a short run, even one such step is a steeper slope than that.
STEP_MIB = 1.0
# gRPC's own thread pool breathes; a thread lost per request or connection would be hundreds.
TOLERANCE_THREADS = 2
# Connections end and begin all the time (they have an age limit): typically one more or less. One lost per connection
# would be hundreds, too.
TOLERANCE_FDS = 1


@dataclass(frozen=True)
class Sample:
    """Of one process. ``memory_mib`` is Private_Dirty: what only this process has and has written, swapped out or not.
    Code and shared pages are not in it, nor are clean pages, which the system may take back."""

    at_s: float
    memory_mib: float
    num_fds: int
    num_threads: int


def take_sample(pid: int, at_s: float) -> Sample:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return Sample(
        at_s,
        (kib["Private_Dirty"] + kib.get("Swap", 0)) / 1024,
        len(list(Path(f"/proc/{pid}/fd").iterdir())),
        len(list(Path(f"/proc/{pid}/task").iterdir())),
    )


def processes(group: Service, scheduler: Service, tp: int) -> dict[str, int]:
    """Names and pids of all processes of the services."""
    found = {"worker supervisor": group.process.pid, "scheduler supervisor": scheduler.process.pid}
    found |= {f"rank-{rank}": group.pids("--rank", str(rank))[0] for rank in range(tp)}
    found["planner"] = scheduler.pids("scheduler_svc", "planner")[0]
    found |= {f"frontend-{i}": scheduler.pids("--name", f"frontend-{i}")[0] for i in range(2)}
    return found


def slope_per_hour(samples: list[Sample]) -> tuple[float, float]:
    """Of memory, MiB per hour, with its standard error."""
    hours = np.array([sample.at_s for sample in samples]) / 3600
    memory = np.array([sample.memory_mib for sample in samples])
    hours -= hours.mean()
    slope = float(hours @ (memory - memory.mean()) / (hours @ hours))
    residuals = memory - memory.mean() - slope * hours
    return slope, math.sqrt(float(residuals @ residuals) / max(1, len(samples) - 2) / float(hours @ hours))


def growth(values: list[int]) -> float:
    """Of the typical value, from the first half to the second: connections come and go, a leak stays."""
    middle = len(values) // 2
    return float(np.median(values[middle:]) - np.median(values[:middle]))


def fds_of(samples: dict[str, list[Sample]]) -> dict[str, list[int]]:
    """Of each process, but of the front ends together: clients' connections move from one to the other."""
    fds = {name: [sample.num_fds for sample in several] for name, several in samples.items()}
    frontends = [fds.pop(name) for name in list(fds) if name.startswith("frontend")]
    return {**fds, "the front ends": [sum(numbers) for numbers in zip(*frontends, strict=True)]}


def judge(samples: list[Sample]) -> dict[str, object]:
    """Figures of one process after the warm-up, which is the first third."""
    counted = samples[len(samples) // 3 :]
    slope, error = slope_per_hour(counted)
    hours = (counted[-1].at_s - counted[0].at_s) / 3600
    return {
        "memory_mib": [round(sample.memory_mib, 2) for sample in samples[:: max(1, len(samples) // 20)]],
        "slope_mib_per_hour": round(slope, 3),
        "standard_error": round(error, 3),
        "tolerance": round(max(TOLERANCE_MIB_PER_HOUR, STEP_MIB / hours), 3),
        "fds": counted[-1].num_fds,
        "threads": counted[-1].num_threads,
        "threads_growth": growth([sample.num_threads for sample in counted]),
    }


async def sample_all(
    pids: dict[str, int], minutes: float, check: Callable[[], None]
) -> tuple[dict[str, list[Sample]], list[int]]:
    """Samples every process until the time is over; also the numbers of entries of /dev/shm."""
    samples: dict[str, list[Sample]] = {name: [] for name in pids}
    shm: list[int] = []
    start = time.monotonic()
    while (at_s := time.monotonic() - start) < 60 * minutes:
        check()
        for name, pid in pids.items():
            samples[name].append(take_sample(pid, at_s))
        shm.append(len(list(Path("/dev/shm").iterdir())))
        await asyncio.sleep(SAMPLE_INTERVAL_S)
    return samples, shm


@pytest.mark.timeout(0)
async def test_nothing_grows(tmp_path: Path, stub_model: Path):
    """ALBIREO_SOAK_MINUTES (30) of streams, short requests, cancellations and new connections at TP 2."""
    minutes = float(os.environ.get("ALBIREO_SOAK_MINUTES", "30"))
    ports, tp = fixed_ports(5), 2
    pool_gib = 72 * 32 * 4 * 8 / 2**30
    group_flags = {"engine": "stub", "tp": tp, "kv_cache_gib": pool_gib, "max_num_seqs": 32, "stub_step_ms": 5}
    with (
        worker_service(tmp_path / "g", stub_model, **group_flags) as group,
        scheduler_service(
            tmp_path / "s", stub_model, group.address, port=ports, frontends=2, metrics_port=ports + 1
        ) as scheduler,
    ):
        pids = processes(group, scheduler, tp)
        async with (
            Load(scheduler.address, "soak", 20, cancels=0.3) as streams,
            Load(scheduler.address, "soak-short", 6, cases=CasePool("soak-short", longest=8)) as requests,
        ):

            def check() -> None:
                streams.check()
                requests.check()

            async with streams.canaries(pause_s=2):
                samples, shm = await sample_all(pids, minutes, check)
            await streams.finish()
            await requests.finish()
        await wait_for_metrics(ports + 1, {**EMPTY, "albireo_frontends": 2.0})
        assert processes(group, scheduler, tp) == pids, "a process was replaced"
    table = {name: judge(several) for name, several in samples.items()}
    fds = fds_of(samples)
    shm_growth = growth(shm[len(shm) // 3 :])
    load = {"streams": streams.report(), "short_requests": requests.report()}
    write_report({"test": "soak", "minutes": minutes, "processes": table, "shm_growth": shm_growth, **load})
    for name, row in table.items():
        assert row["slope_mib_per_hour"] < row["tolerance"], f"{name} grows: {row}"
        assert row["threads_growth"] <= TOLERANCE_THREADS, f"{name} leaks threads: {row}"
    for name, several in fds.items():
        assert growth(several[len(several) // 3 :]) <= TOLERANCE_FDS, f"file descriptors leak, {name}: {several}"
    assert shm_growth <= 0
