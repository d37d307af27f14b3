"""One window of `albireo bench host`: a stretch of time whose steps, CPU time and clients' latencies are taken."""

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from albireo.cli.client import Server
from albireo.cli.host_services import Services
from albireo.cli.trace import read_ledger
from albireo.errors import GroupError
from albireo.exposure import Page, RankExposure, analyse

Figures = dict[str, Any]

# A ring keeps 8192 rows; a window longer than this is read in pieces.
_PIECE_STEPS = 4000
_SLACK_STEPS = 500
_WARM_UP_STEPS = 100
_WARM_UP_TIMEOUT_S = 60.0
_MIN_WARM_UP_S = 0.5
_POLL_S = 0.25
_MIN_OCCUPANCY = 0.5  # between a sequence's end and its successor's first step lie some steps

Update = Callable[[int], object]


async def warm_up(services: Services) -> float:
    """Runs until all sequences have joined and a hundred steps more; returns a step's time in seconds.

    Raises GroupError when the steps do not come.
    """
    setting = services.setting
    # Joining takes some steps, and sequences that have joined end one by one from then on.
    num_steps = _WARM_UP_STEPS + setting.batch // 4
    deadline = time.monotonic() + _WARM_UP_TIMEOUT_S
    begin = time.monotonic()
    while time.monotonic() < deadline:
        await asyncio.sleep(_MIN_WARM_UP_S)
        services.check()
        planner = _planner(await read_ledger(Server(services.ledgers[0]), _WARM_UP_STEPS))
        if len(planner) == _WARM_UP_STEPS and planner["step_id"][-1] >= num_steps:
            if planner["num_rows"][-1] < setting.batch * _MIN_OCCUPANCY:
                continue  # they join still
            span_ns = int(planner["result_at_ns"][-1] - planner["result_at_ns"][0])
            return span_ns / (len(planner) - 1) / 1e9
    raise GroupError(f"no {num_steps} steps with {setting.batch} rows within {time.monotonic() - begin:.0f} s")


async def measure(services: Services, num_steps: int, step_s: float, update: Update) -> Figures:
    """Figures of about ``num_steps`` steps, which take ``step_s`` each; ``update`` gets steps as they pass."""
    await services.turn_window()
    cpu_before, begin_ns = services.cpu_ns(), time.monotonic_ns()
    pages: list[Page] = []
    while num_steps > 0:
        piece = min(num_steps, _PIECE_STEPS)
        await _pass(services, piece, step_s, update)
        num_steps -= piece
        if num_steps > 0:
            pages = _joined(pages, await _read(services, piece + _SLACK_STEPS))
    end_ns, cpu_after = time.monotonic_ns(), services.cpu_ns()
    seen = await services.turn_window()
    pages = _joined(pages, await _read(services, piece + _SLACK_STEPS))
    used = {name: cpu_after[name] - cpu for name, cpu in cpu_before.items()}
    return figures(pages, begin_ns, end_ns, used, seen, services.setting.engine)


def figures(
    pages: Sequence[Page], begin_ns: int, end_ns: int, used_ns: dict[str, int], seen: dict[str, Any], engine: str
) -> Figures:
    """What is reported of a window.

    Args:
        pages: of planner, ranks and front ends, with all steps of the window and maybe more.
        used_ns: CPU time that each process took in it.
        seen: by the clients, over a window of ``duration_s`` that is about the same.
    Raises:
        GroupError: the window has no steps.
    """
    planner = _planner(pages)
    done = (planner["result_at_ns"] >= begin_ns) & (planner["result_at_ns"] <= end_ns)
    if not done.any():
        raise GroupError("no step was done within the window")
    planner = planner.select(done)
    first, last = int(planner["step_id"][0]), int(planner["step_id"][-1])
    ranks = analyse(pages, first, last, prepares_in_launch=engine == "eager")
    # A step waits for the rank that is last.
    worst = max(ranks, key=lambda rank: rank.idle_fraction)
    num_steps = (end_ns - begin_ns) / 1e3 / worst.step_us
    num_tokens = seen["num_tokens"] * (end_ns - begin_ns) / 1e9 / seen["duration_s"]

    def per_step(*names: str) -> float:
        return sum(used_ns.get(name, 0) for name in names) / 1e3 / num_steps

    followers = [name for name in used_ns if name.startswith("rank-") and name != "rank-0"]
    return {
        "num_steps": worst.num_steps,
        "step_ms": worst.step_us / 1e3,
        "step_p50_ms": worst.periods.p50_us / 1e3,
        "step_p99_ms": worst.periods.p99_us / 1e3,
        "rows_per_step": float(planner["num_rows"].mean()),
        "idle_fraction": worst.idle_fraction,
        **{f"gap_{name}": value for name, value in asdict(worst.gaps).items()},
        "non_scalable_fraction": worst.non_scalable_fraction,
        "planner_logic_cpu_us_per_step": float(planner["logic_cpu_ns"].mean()) / 1e3,
        "planner_cpu_us_per_step": per_step("planner"),
        "frontend_cpu_us_per_step": per_step(*(name for name in used_ns if name.startswith("frontend-"))),
        "leader_cpu_us_per_step": per_step("rank-0"),
        "rank_cpu_us_per_step": per_step(*followers) / max(1, len(followers)),
        "cpu_us_per_token": sum(used_ns.values()) / 1e3 / max(1.0, num_tokens),
        "launch_delay_p50_us": max(rank.launch_delay.p50_us for rank in ranks),
        "launch_delay_p99_us": max(rank.launch_delay.p99_us for rank in ranks),
        "tasks": _tasks(worst),
        **_latencies(seen),
    }


def medians(runs: Sequence[Figures]) -> Figures:
    """Value by value; runs have the same keys."""
    return {
        name: medians([run[name] for run in runs])
        if isinstance(value, dict)
        else statistics.median(run[name] for run in runs)
        for name, value in runs[0].items()
    }


def _tasks(rank: RankExposure) -> Figures:
    return {name: {"total_us": task.total_us, "exposed_us": task.exposed_us} for name, task in rank.tasks.items()}


def _latencies(seen: dict[str, Any]) -> Figures:
    if "itl_p50_ms" not in seen:
        return {}
    coalescing = seen["num_tokens"] / max(1, seen["num_responses"])
    names = ("itl_p50_ms", "itl_p99_ms", "ttft_p50_ms", "ttft_p99_ms")
    return {"coalescing_factor": coalescing, **{name: seen[name] for name in names if name in seen}}


async def _pass(services: Services, num_steps: int, step_s: float, update: Update) -> None:
    """Lets so much time pass, without a call to the services: they are being measured."""
    begin, duration_s = time.monotonic(), num_steps * step_s
    num_told = 0
    while (passed_s := time.monotonic() - begin) < duration_s:
        await asyncio.sleep(min(duration_s - passed_s, _POLL_S))
        services.check()
        num_passed = min(num_steps, int((time.monotonic() - begin) / step_s))
        update(num_passed - num_told)
        num_told = num_passed


async def _read(services: Services, num_rows: int) -> list[Page]:
    """The latest pages of the planner, the ranks, and all front ends."""
    first, *others = await asyncio.gather(*[read_ledger(Server(target), num_rows) for target in services.ledgers])
    return first + [page for pages in others for page in pages if page.is_frontend]


def _joined(older: Sequence[Page], newer: Sequence[Page]) -> list[Page]:
    before = {page.process: page for page in older}
    return [before[page.process].joined(page) if page.process in before else page for page in newer]


def _planner(pages: Sequence[Page]) -> Page:
    for page in pages:
        if page.is_planner:
            return page
    raise GroupError("the planner's ledger cannot be read")
