"""Who is served first: priorities, fair shares between tenants. Time is counted in steps of the simulated device."""

import random
from collections.abc import Callable

import numpy as np
import pytest

from scheduler_svc.planner.tenants import Tenants
from simulation import Simulation

NUM_STEPS = 800


class Service:
    """A simulated group under load; every step brings its tokens before the next one ends."""

    def __init__(self, **limits: int) -> None:
        defaults = {
            "block_size": 8,
            "num_blocks": 400,
            "max_num_seqs": 16,
            "max_model_len": 256,
            "max_num_batched_tokens": 128,
            "vocab_size": 1009,
        }
        self.simulation = Simulation(**{**defaults, **limits})
        self.rng = random.Random(5)
        self.now = 0
        self.submitted: dict[tuple[int, int], tuple[str, int]] = {}
        self.first_token: dict[tuple[int, int], int] = {}
        self._waiting: set[tuple[int, int]] = set()

    def submit(self, tenant: str, num_prompt: int, num_output: int, priority: int = 0) -> tuple[int, int]:
        prompt = [self.rng.randrange(3, 1009) for _ in range(num_prompt)]
        key = self.simulation.submit(prompt, num_output, tenant=tenant, priority=priority, ignore_eos=True)
        self.submitted[key] = (tenant, self.now)
        self._waiting.add(key)
        return key

    def step(self) -> None:
        while self.simulation.plan():
            pass
        self.simulation.run_device()
        self.simulation.commit()
        self.now += 1
        for key in [key for key in self._waiting if self.simulation.expected[key].got]:
            self.first_token[key] = self.now
            self._waiting.remove(key)

    def num_unstarted(self, tenant: str) -> int:
        return sum(self.submitted[key][0] == tenant for key in self._waiting)

    def ttft_p99(self, tenant: str) -> float:
        """In steps; a request that has not begun counts with what it has waited."""
        waits = [
            self.first_token.get(key, self.now) - at for key, (owner, at) in self.submitted.items() if owner == tenant
        ]
        assert len(waits) > 50
        return float(np.percentile(waits, 99))


def steady(service: Service, tenant: str, every: int, num_prompt: int, num_output: int) -> None:
    if service.now % every == 0:
        service.submit(tenant, num_prompt, num_output)


def flooding(service: Service, tenant: str, num_prompt: int, num_output: int) -> None:
    """Hundreds of requests wait at all times."""
    while service.num_unstarted(tenant) < 200:
        service.submit(tenant, num_prompt, num_output)


def run(service: Service, *loads: Callable[[], None]) -> Service:
    for _ in range(NUM_STEPS):
        for load in loads:
            load()
        service.step()
    return service


@pytest.mark.parametrize(
    ("every", "num_prompt", "num_output", "limits"),
    [
        (10, 24, 20, {}),  # slots are short: each tenant needs 2 of 16, the flood takes what it gets
        (4, 24, 30, {}),  # each tenant needs about all of its half of the slots
        (15, 100, 30, {"num_blocks": 120}),  # blocks are short
        (12, 120, 10, {"max_num_batched_tokens": 32}),  # prompts take several steps each
    ],
    ids=["slots", "half the slots", "blocks", "long prompts"],
)
def test_a_flood_does_not_push_another_tenant_beyond_twice_its_wait(
    every: int, num_prompt: int, num_output: int, limits: dict[str, int]
) -> None:
    """p99 of the time to first token, against the one beside a tenant with the same load."""
    equal, flooded = Service(**limits), Service(**limits)
    run(
        equal,
        lambda: steady(equal, "quiet", every, num_prompt, num_output),
        lambda: steady(equal, "other", every, num_prompt, num_output),
    )
    run(
        flooded,
        lambda: steady(flooded, "quiet", every, num_prompt, num_output),
        lambda: flooding(flooded, "other", num_prompt, num_output),
    )
    assert flooded.ttft_p99("other") > 3 * flooded.ttft_p99("quiet"), "this is no flood"
    assert flooded.ttft_p99("quiet") <= 2 * equal.ttft_p99("quiet")
    flooded.simulation.check_pool()


def test_a_flood_gets_what_the_others_leave() -> None:
    """Fairness wastes nothing: alone, a tenant has all the slots."""
    service = Service()
    for _ in range(40):
        service.submit("only", 8, 20)
    for _ in range(10):
        service.step()
    assert service.simulation.state.table.num_running == 16


def test_two_floods_are_served_alike() -> None:
    service = run(service := Service(), lambda: flooding(service, "a", 24, 20), lambda: flooding(service, "b", 24, 20))
    served = dict.fromkeys("ab", 0)
    for key in service.first_token:
        served[service.submitted[key][0]] += 1
    assert min(served.values()) > 0.9 * max(served.values())


def test_a_tenant_with_long_answers_gets_as_many_tokens_as_one_with_short_ones() -> None:
    """Shares are of tokens, not of requests."""
    service = run(service := Service(), lambda: flooding(service, "a", 8, 100), lambda: flooding(service, "b", 8, 10))
    tokens = dict.fromkeys("ab", 0)
    for key, (tenant, _) in service.submitted.items():
        tokens[tenant] += len(service.simulation.expected[key].got)
    assert min(tokens.values()) > 0.75 * max(tokens.values())


def test_priorities_order_what_waits_whoever_it_is_of() -> None:
    service = Service(max_num_seqs=1)
    service.submit("a", 8, 5)
    service.step()
    low = [service.submit("a", 8, 5, priority=-1) for _ in range(3)]
    middle = [service.submit("b", 8, 5) for _ in range(3)]
    high = [service.submit("a", 8, 5, priority=7) for _ in range(3)]
    while len(service.first_token) < 10:
        service.step()
    order = sorted([*low, *middle, *high], key=service.first_token.__getitem__)
    assert order == [*high, *middle, *low]


def test_no_tenant_makes_one_of_a_higher_priority_give_way() -> None:
    service = Service(max_num_seqs=4)
    for _ in range(8):
        service.submit("a", 8, 60, priority=1)
    for _ in range(5):
        service.step()
    key = service.submit("b", 8, 5)
    for _ in range(40):
        service.step()
    assert key not in service.first_token
    assert service.simulation.num_preemptions == 0


def test_the_newest_of_the_lowest_priority_is_preempted_first() -> None:
    service = Service(num_blocks=64, max_num_seqs=4, block_size=4)
    first = service.submit("", 60, 120)
    urgent = service.submit("", 60, 120, priority=1)
    newest = service.submit("", 60, 120)
    preempted: list[tuple[int, int]] = []
    while not preempted:
        service.step()
        preempted = [key for key, each in service.simulation.state.sequences.items() if each.num_preemptions]
    assert preempted == [newest]
    while service.simulation.expected[urgent].reason is None:
        service.step()
    assert service.simulation.expected[first].reason is None
    service.simulation.finish()


def test_idling_saves_nothing_up() -> None:
    tenants = Tenants()
    idler = tenants.enter("idler")
    tenants.leave(idler)
    busy = tenants.enter("busy")
    tenants.charge(busy, 1000)
    assert tenants.enter("idler") == idler
    assert tenants.served(idler) == tenants.served(busy) == 1000


def test_thousands_of_tenants_are_not_kept_for_ever() -> None:
    tenants = Tenants()
    for i in range(10_000):
        tenants.leave(tenants.enter(f"tenant {i}"))
    assert len(tenants._indices) <= 1024
    assert len(tenants._names) <= 1025
    assert tenants.num_active == 0
