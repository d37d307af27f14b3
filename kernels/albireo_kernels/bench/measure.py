"""Measures kernels as a step runs them: weights come from memory, activations lie in the cache."""

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from albireo.errors import GroupError
from albireo_kernels.bench.limits import Cost, Rates, limit_of
from albireo_kernels.bench.machine import Machine
from albireo_kernels.bench.settings import Settings
from albireo_kernels.bench.steps import RowInputs, step_of
from albireo_kernels.cpu import Device, GroupMemory, Library, Op, Program, Status, StepData

_NOTHING = Program()
_TIMEOUT_S = 120.0


def _no_preparation() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel on one shape.

    Attributes:
        shape: for people.
        cost: of one operation, on all ranks together.
        ops: of each rank: the same operation on one copy of its weights after another.
        num_parts: that an operation consists of, in ``ops``.
        steps: of each rank.
        prepare: is called before a program runs.
        in_torch: does the same in torch, on the copy of this index.
    """

    kernel: str
    shape: str
    cost: Cost
    ops: Sequence[Sequence[Op]]
    steps: Sequence[StepData]
    num_parts: int = 1
    prepare: Callable[[], None] = _no_preparation
    in_torch: Callable[[int], object] | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """What became of a case; seconds are those of one operation."""

    kernel: str
    shape: str
    cost: Cost
    seconds: float
    torch_seconds: float | None

    def to_json(self, rates: Rates) -> dict[str, Any]:
        """Times are in microseconds."""
        limit, torch_s = limit_of(self.cost, rates), self.torch_seconds
        return {
            "kernel": self.kernel,
            "shape": self.shape,
            "num_bytes": self.cost.num_bytes,
            "num_cached_bytes": self.cost.num_cached_bytes,
            "num_flops": self.cost.num_flops,
            "bound": limit.bound,
            "time_us": self.seconds * 1e6,
            "limit_us": limit.seconds * 1e6,
            "share": limit.seconds / self.seconds,
            "torch_us": None if torch_s is None else torch_s * 1e6,
            "torch_ratio": None if torch_s is None else torch_s / self.seconds,
        }


def join_all(devices: Sequence[Device]) -> None:
    """The devices, of one process, become the ranks of a group."""
    if len(devices) == 1:
        devices[0].join(None, 0, 1, _TIMEOUT_S)
        return
    memory = GroupMemory.create(devices[0].library.group_bytes())
    with ThreadPoolExecutor(len(devices)) as pool:
        joined = [
            pool.submit(device.join, memory.array, rank, len(devices), _TIMEOUT_S)
            for rank, device in enumerate(devices)
        ]
        for each in joined:
            each.result()
    memory.close()


class Bench:
    """Every rank's device has its share of the cores."""

    def __init__(
        self, library: Library, machine: Machine, cores: Sequence[int], rates: Rates, settings: Settings
    ) -> None:
        self._library, self._machine, self._cores = library, machine, cores
        self._rates, self._settings = rates, settings

    def measure(self, case: Case) -> Measurement:
        limit = limit_of(case.cost, self._rates)
        num_ops = min(len(case.ops[0]) // case.num_parts, max(1, round(self._settings.program_s / limit.seconds)))
        seconds = self._on_devices(case, num_ops) / num_ops
        torch_s = None if case.in_torch is None else self._in_torch(case, case.in_torch, num_ops) / num_ops
        return Measurement(case.kernel, case.shape, case.cost, seconds, torch_s)

    def _on_devices(self, case: Case, num_ops: int) -> float:
        size = len(case.ops)
        programs = [Program(ops[: num_ops * case.num_parts]) for ops in case.ops]
        with ExitStack() as stack:
            shares = [self._share(rank, size) for rank in range(size)]
            devices = [stack.enter_context(Device(self._library, cores)) for cores in shares]
            join_all(devices)
            first_steps = [step_of(RowInputs.of(1)) for _ in devices]  # so that the threads are awake

            def run() -> float:
                for device, step in zip(devices, first_steps, strict=True):
                    device.submit(_NOTHING, _NOTHING, step)
                for device, program, step in zip(devices, programs, case.steps, strict=True):
                    device.submit(program, _NOTHING, step)
                for device, step in zip(devices, case.steps, strict=True):
                    if device.wait(step, _TIMEOUT_S) is not Status.OK:
                        raise GroupError(f"{case.kernel} {case.shape} takes longer than {_TIMEOUT_S:g} s")
                # The rank that began last has waited for nobody to begin.
                return min(step.forward_ns for step in case.steps) / 1e9

            return self._median(run, case.prepare)

    def _share(self, rank: int, size: int) -> Sequence[int]:
        num_cores = len(self._cores)
        return self._cores[rank * num_cores // size : (rank + 1) * num_cores // size]

    def _in_torch(self, case: Case, in_torch: Callable[[int], object], num_ops: int) -> float:
        def run() -> float:
            begin = time.perf_counter()
            for index in range(num_ops):
                in_torch(index)
            return time.perf_counter() - begin

        return self._median(run, case.prepare)

    def _median(self, run: Callable[[], float], prepare: Callable[[], None]) -> float:
        settings = self._settings
        prepare()
        run()
        seconds: list[float] = []
        begin = time.perf_counter()
        while len(seconds) < settings.min_reps or (
            len(seconds) < settings.max_reps and time.perf_counter() - begin < settings.budget_s
        ):
            prepare()
            self._machine.evict()
            seconds.append(run())
        return statistics.median(seconds)
