"""Faults under load: processes are killed and frozen, messages of the plan stream are lost, held up and doubled.

Clients see pauses and nothing else: every token is compared, and only the streams of a front end that died may end.
"""

import asyncio
import collections
import contextlib
import itertools
import random
import signal
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pytest
import torch

from albireo.rpc import make_channel
from albireo.v1 import generation_pb2 as pb
from albireo.v1 import generation_pb2_grpc as rpc
from checkpoints import make_checkpoint
from e2e_oracle import Case, Oracle
from load import EMPTY, CasePool, Load, wait_for_metrics, wait_until, write_report
from plan_proxy import PlanProxy
from services import Service, fixed_ports, read_metrics, scheduler_service, worker_service

pytestmark = [pytest.mark.e2e, pytest.mark.alone]

NUM_STREAMS = 24
NUM_FRONTENDS = 2
# The load wants about twice as much, so sequences are preempted all the time.
NUM_BLOCKS = 72
# A message fault waits for its message: there is none while the group is being put together again.
MESSAGE_TIMEOUT_S = 60.0
RECOVERY_P99_S = 15.0

Place = Literal["follower", "leader", "planner", "frontend", "plan", "result"]
Action = Literal["kill", "stop", "drop", "delay", "duplicate"]

_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


@dataclass(frozen=True)
class Fault:
    action: Action
    place: Place

    def __str__(self) -> str:
        return f"{self.action} {self.place}"


SIGNAL_PLACES: tuple[Place, ...] = ("follower", "leader", "planner", "frontend")
MESSAGE_FAULTS = [Fault(action, place) for action in ("drop", "delay", "duplicate") for place in ("plan", "result")]
ALL_FAULTS = [*MESSAGE_FAULTS, *(Fault(action, place) for action in ("kill", "stop") for place in SIGNAL_PLACES)]
# A frozen process is noticed after seconds; the short run freezes each kind once over its TP degrees.
QUICK_STOPS: dict[int, tuple[Place, ...]] = {2: ("follower", "planner"), 4: ("leader", "frontend")}


def possible_faults(tp: int) -> list[Fault]:
    """A group of one has no followers."""
    return [fault for fault in ALL_FAULTS if tp > 1 or fault.place != "follower"]


def quick_faults(tp: int, rng: random.Random) -> list[Fault]:
    """A few freezes, and this TP degree's share of message faults and kills."""
    others = [one for one in ALL_FAULTS if one.action != "stop"]
    share = others[list(QUICK_STOPS).index(tp) :: len(QUICK_STOPS)]
    deck = [*share, *(Fault("stop", place) for place in QUICK_STOPS[tp])]
    return rng.sample(deck, len(deck))


def many_faults(tp: int, rng: random.Random, num: int) -> list[Fault]:
    """All kinds equally often, in any order."""
    deck = possible_faults(tp)
    rounds = itertools.chain.from_iterable(rng.sample(deck, len(deck)) for _ in itertools.count())
    return list(itertools.islice(rounds, num))


def test_the_short_runs_contain_every_kind_of_fault():
    kinds = {fault for tp in QUICK_STOPS for fault in quick_faults(tp, random.Random(0))}
    assert kinds == set(ALL_FAULTS)
    assert {fault.place for fault in ALL_FAULTS} == set(get_args(Place))


@dataclass
class Cluster:
    """The services under test, with the proxy on the plan stream between them."""

    tp: int
    group: Service
    scheduler: Service
    proxy: PlanProxy
    metrics_port: int

    def pids(self, place: Place) -> list[int]:
        match place:
            case "leader":
                return self.group.pids("--rank", "0")
            case "follower":
                return [pid for rank in range(1, self.tp) for pid in self.group.pids("--rank", str(rank))]
            case "planner":
                return self.scheduler.pids("scheduler_svc", "planner")
            case _:
                return [pid for i in range(NUM_FRONTENDS) for pid in self.scheduler.pids("--name", f"frontend-{i}")]

    def service(self, place: Place) -> Service:
        return self.group if place in ("leader", "follower") else self.scheduler

    def is_whole(self) -> bool:
        """Every process is there, and all are attached to each other."""
        wanted = {"leader": 1, "follower": self.tp - 1, "planner": 1, "frontend": NUM_FRONTENDS}
        if any(len(self.pids(place)) != num for place, num in wanted.items()):
            return False
        try:
            return read_metrics(self.metrics_port).get("albireo_frontends") == NUM_FRONTENDS
        except OSError:
            return False


@contextlib.asynccontextmanager
async def start_cluster(run_dir: Path, model: Path, tp: int) -> AsyncIterator[Cluster]:
    ports = fixed_ports(3 + NUM_FRONTENDS)
    pool_gib = NUM_BLOCKS * 32 * (8 // tp) * 8 / 2**30
    with worker_service(
        run_dir / "g", model, engine="stub", tp=tp, kv_cache_gib=pool_gib, max_num_seqs=32, stub_step_ms=5
    ) as group:
        async with PlanProxy(f"unix:{run_dir}/proxy.sock", group.address) as proxy:
            flags = {"frontends": NUM_FRONTENDS, "depth": 2, "metrics_port": ports + 1}
            # In a thread: the proxy must answer meanwhile.
            scheduler = scheduler_service(run_dir / "s", model, f"unix:{run_dir}/proxy.sock", port=ports, **flags)
            service = await asyncio.to_thread(scheduler.__enter__)
            try:
                yield Cluster(tp, group, service, proxy, ports + 1)
            finally:
                await asyncio.to_thread(scheduler.__exit__, None, None, None)


@dataclass
class Injector:
    """Injects faults and measures how long it takes until a client is served again."""

    cluster: Cluster
    load: Load
    rng: random.Random
    recoveries_s: dict[str, list[float]] = field(default_factory=lambda: collections.defaultdict(list))
    whole_s: list[float] = field(default_factory=list)

    async def strike(self, fault: Fault, after_s: float = 0.0) -> None:
        """Injects a fault; a new request is answered, and all processes are there again."""
        await asyncio.sleep(after_s)
        with self.load.frontend_outage() if fault.place == "frontend" else contextlib.nullcontext():
            injected_at, victim = await self._inject(fault)
            try:
                await self.load.canary()
            except TimeoutError:
                raise AssertionError(f"{fault}: no request was answered after it") from None
            recovery_s = time.monotonic() - injected_at
            if victim is not None:
                await wait_until(lambda: victim not in self.cluster.pids(fault.place), f"{fault} removes {victim}")
            await wait_until(self.cluster.is_whole, f"all is there after {fault}")
            self.recoveries_s[str(fault)].append(recovery_s)
            self.whole_s.append(time.monotonic() - injected_at)

    async def _inject(self, fault: Fault) -> tuple[float, int | None]:
        """When, and the process that was hit."""
        if fault.action in _SIGNALS:
            return await self._signal(fault)
        delay_s = 0.05 * 60 ** self.rng.random()  # to 3 s, short ones as often as long ones
        async with asyncio.timeout(MESSAGE_TIMEOUT_S):
            await self.cluster.proxy.inject(fault.action, fault.place, delay_s)
        return time.monotonic(), None

    async def _signal(self, fault: Fault) -> tuple[float, int]:
        # A fault before this one may have taken the process away for now.
        await wait_until(lambda: bool(self.cluster.pids(fault.place)), f"there is a {fault.place}")
        victim = self.rng.choice(self.cluster.pids(fault.place))
        self.cluster.service(fault.place).send_signal(victim, _SIGNALS[fault.action])
        return time.monotonic(), victim

    def report(self) -> dict[str, object]:
        every = [one for several in self.recoveries_s.values() for one in several]
        p50, p99 = (round(float(np.percentile(every, q)), 3) for q in (50, 99))
        return {
            "faults": len(every),
            "recovery_p50_s": p50,
            "recovery_p99_s": p99,
            "recovery_max_s": round(max(every), 3),
            "whole_again_max_s": round(max(self.whole_s), 3),
            "kinds": {
                kind: {"count": len(several), "max_s": round(max(several), 3)}
                for kind, several in sorted(self.recoveries_s.items())
            },
            **self.load.report(),
        }


def in_groups(faults: list[Fault], rng: random.Random) -> Iterator[list[tuple[Fault, float]]]:
    """Faults with the time of each after the first of its group: mostly alone, now and then two at once, or one while
    the services recover from another."""
    waiting = list(faults)
    for number in itertools.count():
        if not waiting:
            return
        group = [(waiting.pop(), 0.0)]
        if number % 3 == 2 and waiting:
            group.append((waiting.pop(), 0.0 if number % 2 else rng.uniform(0.2, 4.0)))
        yield group


async def time_canaries(load: Load, num: int) -> float:
    """How long a new request takes when nothing is wrong: the median, seconds."""
    times_s = []
    for _ in range(num):
        start = time.monotonic()
        await load.canary()
        times_s.append(time.monotonic() - start)
    return round(statistics.median(times_s), 3)


async def run_faults(run_dir: Path, model: Path, tp: int, faults: list[Fault], seed: str) -> dict[str, object]:
    """Injects the faults one after another; afterwards nothing is left behind. Returns the report."""
    rng = random.Random(seed)
    async with start_cluster(run_dir, model, tp) as cluster:
        async with Load(cluster.scheduler.address, seed, NUM_STREAMS, cases=CasePool(seed, longest=400)) as load:
            injector = Injector(cluster, load, rng)
            baseline_s = await time_canaries(load, 5)
            for group in in_groups(faults, rng):
                await asyncio.sleep(rng.uniform(0.1, 0.8))
                async with asyncio.TaskGroup() as tasks:
                    for fault, after_s in group:
                        tasks.create_task(injector.strike(fault, after_s))
                load.check()
            await load.finish()
            await load.canary()
        await wait_for_metrics(cluster.metrics_port, {**EMPTY, "albireo_frontends": NUM_FRONTENDS})
        metrics = read_metrics(cluster.metrics_port)
        report = {"test": "faults", "tp": tp, "seed": seed, "without_faults_s": baseline_s, **injector.report()}
        of_last = {name: metrics[f"albireo_{name}_total"] for name in ("recoveries", "preemptions")}
        report["of_the_last_planner"] = of_last
    write_report(report)
    return report


@pytest.mark.parametrize("tp", QUICK_STOPS)
async def test_clients_see_only_pauses(tmp_path: Path, stub_model: Path, tp: int):
    faults = quick_faults(tp, random.Random(tp))
    report = await run_faults(tmp_path, stub_model, tp, faults, f"quick-{tp}")
    assert report["faults"] == len(faults)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("tp", [1, 2, 4])
async def test_a_thousand_faults(tmp_path: Path, stub_model: Path, tp: int):
    """334 at each TP degree, 1002 in all."""
    report = await run_faults(tmp_path, stub_model, tp, many_faults(tp, random.Random(tp), 334), f"soak-{tp}")
    assert report["faults"] == 334
    assert report["recovery_p99_s"] < RECOVERY_P99_S


# The real engine.


def make_cases(oracle: Oracle, rng: random.Random, num: int) -> list[Case]:
    cases = []
    for _ in range(num):
        prompt = [rng.randrange(3, oracle.vocab_size) for _ in range(rng.randrange(1, 60))]
        max_tokens = rng.randrange(40, 65)
        cases.append(Case(prompt, max_tokens, oracle.generate(prompt, max_tokens)))
    return cases


async def test_real_tokens_are_right_when_a_rank_dies(tmp_path: Path):
    """32 streams of a transformer at TP 2: a rank is killed in the middle, all streams complete as if it were not."""
    torch.set_num_threads(2)
    model = make_checkpoint(tmp_path / "model", "llama")
    oracle = Oracle(model)
    cases = make_cases(oracle, random.Random(7), 32)
    flags = {"tp": 2, "dtype": "float32", "device": "cpu", "max_num_seqs": 32, "max_num_batched_tokens": 96}
    num_received = num_running = 0
    is_midway = asyncio.Event()

    async def generate(stub: rpc.GenerationStub, case: Case) -> list[int]:
        nonlocal num_received, num_running
        params = pb.SamplingParams(temperature=0, max_tokens=case.max_tokens)
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=case.prompt), sampling_params=params)
        tokens: list[int] = []
        num_running += 1
        async for response in stub.Generate(request, timeout=240):
            tokens += response.token_ids
            num_received += len(response.token_ids)
            if num_received > sum(len(case.expected) for case in cases) // 3:
                is_midway.set()
        num_running -= 1
        return tokens

    with (
        worker_service(tmp_path / "g", model, **flags) as group,
        scheduler_service(tmp_path / "s", model, group.address, recovery_timeout=120) as scheduler,
    ):
        async with make_channel(scheduler.address) as channel:
            stub = rpc.GenerationStub(channel)
            running = asyncio.gather(*(generate(stub, case) for case in cases))
            await asyncio.wait({running, asyncio.create_task(is_midway.wait())}, return_when=asyncio.FIRST_COMPLETED)
            assert num_running > 28, "few are left to be hit"
            (victim,) = group.pids("--rank", "1")
            group.send_signal(victim, signal.SIGKILL)
            answers = await running
            # What the ranks had computed by then may be all that was left.
            await wait_until(lambda: group.pids("--rank", "1") not in ([], [victim]), "the rank is replaced")
    for case, got in zip(cases, answers, strict=True):
        oracle.assert_equal(case, got)
