"""A pool of KV blocks that is full all the time: whatever comes and goes, work gets on and every token is exact."""

import asyncio
import random
import statistics
import time
from pathlib import Path

import pytest

from load import EMPTY, Case, CasePool, Load, fixed_case, random_tokens, wait_for_metrics, write_report
from services import fixed_ports, read_metrics, scheduler, worker_group

pytestmark = [pytest.mark.e2e, pytest.mark.alone]

NUM_BLOCKS = 560
NUM_STREAMS = 64
SAMPLE_INTERVAL_S = 0.1
WARM_UP_S = 2.0


def make_case(rng: random.Random) -> Case:
    """Long and short requests of several tenants and priorities; a third begins with one of two texts."""
    tenant = rng.choice(["a", "b", "c"])
    shared = random_tokens(random.Random(rng.randrange(2)), 150) if rng.random() < 0.3 else []
    if rng.random() < 0.25:
        own, num_tokens = rng.randrange(1, 40), rng.randrange(1, 80)
    else:
        own, num_tokens = rng.randrange(300, 450), rng.randrange(200, 400)
    # Few are urgent: those of the highest priorities could keep all others waiting.
    priority = rng.choice([1, 3]) if rng.random() < 0.2 else 0
    return fixed_case(shared + random_tokens(rng, own), num_tokens, tenant, priority)


async def watch(
    port: int, load: Load, seconds: float
) -> tuple[list[float], list[tuple[float, float]], dict[str, float]]:
    """Samples the planner's metrics: how full the pool is, and (when, how many tokens have been committed)."""
    full: list[float] = []
    committed: list[tuple[float, float]] = []
    metrics: dict[str, float] = {}
    start = time.monotonic()
    while (now := time.monotonic()) - start < seconds:
        load.check()
        metrics = await asyncio.to_thread(read_metrics, port)
        full.append(metrics["albireo_kv_blocks_used"] / metrics["albireo_kv_blocks"])
        committed.append((now, metrics["albireo_output_tokens_total"]))
        await asyncio.sleep(SAMPLE_INTERVAL_S)
    return full, committed, metrics


def longest_stall_s(committed: list[tuple[float, float]]) -> float:
    """Between samples that show progress, at most."""
    moved_at, count = committed[0]
    longest = 0.0
    for at, num in committed:
        if num > count:
            longest, moved_at, count = max(longest, at - moved_at), at, num
    return max(longest, committed[-1][0] - moved_at)


@pytest.mark.parametrize(
    ("seconds", "least_full"), [(8, 0.88), pytest.param(120, 0.92, marks=[pytest.mark.soak, pytest.mark.timeout(400)])]
)
async def test_a_full_pool_serves_everyone(tmp_path: Path, stub_model: Path, seconds: int, least_full: float):
    """Tenants, priorities, cancellations, shared beginnings, preemption, while hardly a block is free: each running
    sequence keeps one free for its next, so the pool cannot be fuller."""
    ports, tp = fixed_ports(4), 2
    pool_gib = NUM_BLOCKS * 32 * (8 // tp) * 8 / 2**30
    flags = {"engine": "stub", "tp": tp, "kv_cache_gib": pool_gib, "max_num_seqs": 64, "max_model_len": 1024}
    cases = CasePool(f"full pool, {seconds}", size=40 if seconds < 60 else 300, make=make_case)
    cases.fill()
    with (
        worker_group(tmp_path / "g", stub_model, **flags) as group,
        scheduler(tmp_path / "s", stub_model, group, port=ports, metrics_port=ports + 1) as target,
    ):
        async with Load(target, "full pool", NUM_STREAMS, cases=cases, cancels=0.2) as load:
            await asyncio.sleep(WARM_UP_S)
            full, committed, metrics = await watch(ports + 1, load, seconds)
            await load.finish()
        await wait_for_metrics(ports + 1, {**EMPTY, "albireo_active_tenants": 0.0})
    stall_s = longest_stall_s(committed)
    figures = {name: metrics[f"albireo_{name}_total"] for name in ("preemptions", "cached_tokens", "prompt_tokens")}
    quantiles = [round(float(value), 3) for value in statistics.quantiles(full, n=10)]
    report = {"test": "full pool", "seconds": seconds, "used_deciles": quantiles, "longest_stall_s": round(stall_s, 3)}
    write_report({**report, "median_used": statistics.median(full), **figures, **load.report()})
    assert statistics.median(full) >= least_full
    assert stall_s < 1
    assert figures["preemptions"] > 0
    assert load.num_streams > NUM_STREAMS
    assert load.num_cancelled > 0
