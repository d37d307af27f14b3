"""What the machine can do: its read bandwidth, and its rate of multiplication."""

import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from albireo.errors import ConfigError
from albireo_kernels.bench.limits import Rate, Rates
from albireo_kernels.cpu import Dtype, Isa, Library, address, allocate, detect_isa, load_library

WEIGHT_DTYPES = (Dtype.FLOAT32, Dtype.BFLOAT16, Dtype.INT8)

_PART_ALIGNMENT = 2 << 20
_CACHE_REGION = 128 << 10  # past every first-level cache, within every second-level one
_CACHE_CALLS = 1000
_SIZES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Machine:
    """A thread on each core, and memory far larger than the caches, of which each thread has its part."""

    def __init__(self, library: Library, cores: Sequence[int], num_bytes: int) -> None:
        self._c = library.c
        self.num_threads = len(cores)
        self._pools = [ThreadPoolExecutor(1, initializer=os.sched_setaffinity, initargs=(0, {core})) for core in cores]
        part_bytes = -(-num_bytes // self.num_threads // _PART_ALIGNMENT) * _PART_ALIGNMENT
        self._memory = allocate(part_bytes * self.num_threads, np.uint8)
        self._parts = np.split(self._memory, self.num_threads)
        for pool, part in zip(self._pools, self._parts, strict=True):
            pool.submit(part.fill, 1).result()  # pages lie where they are first written from

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in self._pools:
            pool.shutdown()

    def rates(self, num_threads: int, reps: int, multiply_s: float) -> Rates:
        """Of the first so many threads together.

        Args:
            reps: of every measurement.
            multiply_s: how long a measurement of multiplications takes.
        """
        # Of one thread, many times: a call is too short for threads of Python to be at it together.
        cache = tuple(num_threads * rate for rate in self._cache_rates(reps))
        return Rates(
            memory=Rate(tuple(self._read(num_threads) for _ in range(reps))),
            cache=Rate(cache),
            multiply={dtype: self._multiply_rate(dtype, num_threads, reps, multiply_s) for dtype in WEIGHT_DTYPES},
        )

    def evict(self) -> None:
        """Leaves nothing of use in any cache."""
        self._read(self.num_threads)

    def _read(self, num_threads: int) -> float:
        """Bytes per second."""
        parts = self._parts if num_threads > 1 else [self._memory]
        spans = [(address(part), part.nbytes) for part in parts[:num_threads]]
        seconds = self._at_once([partial(self._c.albireo_read_memory, *span) for span in spans])
        return sum(size for _, size in spans) / seconds

    def _cache_rates(self, reps: int) -> list[float]:
        """Bytes per second of one thread; what the calls themselves take is left out."""
        begin = address(self._memory)

        def calls(num_bytes: int) -> None:
            for _ in range(_CACHE_CALLS):
                self._c.albireo_read_memory(begin, num_bytes)

        calls(_CACHE_REGION)
        calls_s = min(self._at_once([partial(calls, 0)]) for _ in range(reps))
        seconds = [self._at_once([partial(calls, _CACHE_REGION)]) for _ in range(reps)]
        return [_CACHE_CALLS * _CACHE_REGION / max(each - calls_s, each / 2) for each in seconds]

    def _multiply_rate(self, dtype: Dtype, num_threads: int, reps: int, wanted_s: float) -> Rate:
        def seconds(num_rounds: int) -> float:
            return self._at_once([partial(self._c.albireo_multiply_in_cache, dtype, num_rounds)] * num_threads)

        num_rounds = 16
        while min(seconds(num_rounds) for _ in range(3)) < wanted_s / 2:  # a disturbed one must not end the search
            num_rounds *= 2
        # Each of them also adds.
        num_flops = 2 * num_threads * self._c.albireo_multiply_in_cache(dtype, 1) * num_rounds
        return Rate(tuple(num_flops / seconds(num_rounds) for _ in range(reps)))

    def _at_once(self, calls: Sequence[Callable[[], object]]) -> float:
        """Makes each call in its thread; seconds from the first one's begin to the last one's end."""
        gate = threading.Barrier(len(calls))

        def timed(call: Callable[[], object]) -> tuple[float, float]:
            gate.wait()
            begin = time.perf_counter()
            call()
            return begin, time.perf_counter()

        futures = [pool.submit(timed, call) for pool, call in zip(self._pools, calls, strict=False)]
        times = [future.result() for future in futures]
        return max(end for _, end in times) - min(begin for begin, _ in times)


def open_library(isa_name: str | None) -> Library:
    """The kernels of ``--isa``, by default of the machine's highest; says on stderr when they must be compiled.

    Raises ConfigError where the machine has no such instructions.
    """
    best = detect_isa()
    isa = best if isa_name is None else Isa[isa_name.upper()]
    if isa > best:
        raise ConfigError(f"--isa {isa_name}: this machine has {best.name.lower()} at most")

    def report(what: str, fraction: float) -> None:
        if fraction == 0:
            sys.stderr.write(f"{what} ...\n")

    return load_library(isa, report=report)


def last_level_bytes() -> int:
    """Of all last-level caches together; 0 where the system does not tell."""
    found: dict[tuple[int, str], int] = {}
    for cache in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level, size, shared_by = (
                (cache / name).read_text().strip() for name in ("level", "size", "shared_cpu_list")
            )
            found[int(level), shared_by] = int(size[:-1]) * _SIZES[size[-1]]
        except (OSError, ValueError, KeyError):
            continue
    last = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == last)


def describe() -> dict[str, Any]:
    """The machine's name, and what else figures depend on."""
    return {
        "cpu": _cpu_name(),
        "num_cpus": os.cpu_count(),
        "num_usable_cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "last_level_cache_mib": round(last_level_bytes() / 2**20, 1),
        "python": platform.python_version(),
        "load_average_before": os.getloadavg()[0],
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
