"""Devices run steps in order, alone and in groups; nothing that a rank waits for can hold it for long."""

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from albireo.errors import AlbireoError, GroupError
from albireo_kernels.cpu import (
    CANDIDATES,
    UNPINNED,
    Device,
    Dtype,
    GroupMemory,
    Library,
    Matrix,
    Op,
    Program,
    RankSampling,
    Rows,
    SharedSampling,
    SlotTokens,
    Status,
    add_norm,
    allocate,
    embed,
    gemm,
    sampling_ops,
)
from cpu_kernels import Array, assert_rows_close, step_of

NOTHING = Program()
SIZE = 48
EPS = 1e-6


def random(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def on_all(devices: list[Device], call: Callable[[int, Device], None]) -> None:
    """Calls for each rank in a thread of its own; raises what one of them raises."""
    with ThreadPoolExecutor(len(devices)) as pool:
        for future in [pool.submit(call, rank, device) for rank, device in enumerate(devices)]:
            future.result(timeout=30)


def join_all(library: Library, devices: list[Device]) -> GroupMemory:
    memory = GroupMemory.create(library.group_bytes())
    size = len(devices)
    on_all(devices, lambda rank, device: device.join(memory.array, rank, size, timeout_s=10))
    return memory


@contextmanager
def group_of(library: Library, size: int, num_threads: int = 1) -> Iterator[list[Device]]:
    with ExitStack() as stack:
        devices = [stack.enter_context(Device(library, [UNPINNED] * num_threads)) for _ in range(size)]
        join_all(library, devices)
        yield devices


class Rank:
    """A rank whose program adds up what all ranks have in shared memory; twice, as a decoder layer does."""

    def __init__(self, partials: Array, rank: int) -> None:
        """partials: [2, ranks, rows, SIZE], shared."""
        num_rows = partials.shape[2]
        self.weight = np.ones(SIZE, dtype=np.float32)
        self.residual, self.out = Rows(num_rows, SIZE, Dtype.FLOAT32), Rows(num_rows, SIZE, Dtype.FLOAT32)
        self.ones = Rows(num_rows, 1, Dtype.FLOAT32)
        self.ones.array[...] = 1
        self.partials, self.rank = partials, rank

    def program(self, library: Library, weights: Array) -> Program:
        """The residual becomes the sum of weights [2, ranks, SIZE] over both phases and all ranks."""
        ops: list[Op] = []
        for phase in range(2):
            mine = Matrix.pack(library, weights[phase, self.rank][:, None], Dtype.FLOAT32)
            ops += [
                gemm(self.ones, mine, Rows.of(self.partials[phase, self.rank])),
                add_norm(
                    self.residual, list(self.partials[phase]), self.weight, self.out,
                    eps=EPS, sets_residual=phase == 0,
                ),
            ]  # fmt: skip
        return Program(ops)


@pytest.mark.parametrize(("size", "num_threads"), [(2, 1), (2, 2), (4, 1), (3, 2)])
def test_ranks_add_up_their_partial_sums(library: Library, size: int, num_threads: int) -> None:
    """Over and over, with several steps in flight: nobody reads what is of another step."""
    rng = np.random.default_rng(1)
    num_rows = 5
    partials = allocate((2, size, num_rows, SIZE), np.float32)
    ranks = [Rank(partials, rank) for rank in range(size)]
    weights = random(rng, 20, 2, size, SIZE)
    programs = [[rank.program(library, of_step) for of_step in weights] for rank in ranks]

    def run_all(rank: int, device: Device) -> None:
        for at_once in (1, 4):
            for first in range(0, len(weights), at_once):
                steps = [step_of([1] * num_rows) for _ in range(at_once)]
                for index, step in enumerate(steps):
                    device.submit(programs[rank][first + index], NOTHING, step)
                for step in steps:
                    assert device.wait(step, timeout_s=20) is Status.OK
                total = weights[first + at_once - 1].sum(axis=(0, 1))
                assert_rows_close(ranks[rank].residual.array, np.tile(total, (num_rows, 1)), 1e-5)

    with group_of(library, size, num_threads) as devices:
        on_all(devices, run_all)
    for rank in ranks[1:]:  # all ranks add in the same order, to the same bits
        np.testing.assert_array_equal(rank.residual.array, ranks[0].residual.array)


def test_a_step_s_times_are_in_order(native: Library) -> None:
    partials = allocate((2, 2, 1, SIZE), np.float32)
    programs = [Rank(partials, rank).program(native, np.ones((2, 2, SIZE), np.float32)) for rank in range(2)]

    def run(rank: int, device: Device) -> None:
        if rank == 1:
            time.sleep(0.1)
        step = step_of([1])
        device.run(programs[rank], step)
        assert step.c.start_at_ns <= step.c.forward_end_at_ns <= step.c.end_at_ns
        assert step.status is Status.OK
        if rank == 0:
            assert 90e6 < step.collective_ns <= step.forward_ns

    with group_of(native, 2) as devices:
        on_all(devices, run)


def test_what_a_step_worked_on_may_go_when_it_is_complete(native: Library) -> None:
    """Its programs' memory is used for other things at once, while the team's other thread is about to wait."""
    rows = Rows(1, SIZE, Dtype.FLOAT32)
    op = add_norm(rows, [], np.ones(SIZE, np.float32), Rows(1, SIZE, Dtype.FLOAT32), eps=1e-6)
    with Device(native, [UNPINNED] * 2) as device:
        device.join(None, 0, 1, timeout_s=1)
        for _ in range(500):
            programs, step = [Program([op]), Program([op])], step_of([1])
            device.submit(*programs, step)
            device.wait(step, timeout_s=20)
            for program in programs:
                ctypes.memset(ctypes.byref(program.c), 0xFF, ctypes.sizeof(program.c))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_rank_has_every_token_and_the_next_step_reads_them(library: Library, size: int) -> None:
    rng = np.random.default_rng(2)
    num_rows, vocab_size = 7, 500
    expected = rng.integers(0, vocab_size, num_rows).astype(np.int32)
    logits = random(rng, num_rows, vocab_size)
    logits[np.arange(num_rows), expected] = 100
    table = random(rng, vocab_size, SIZE)
    shared_logits = allocate((num_rows, 512), np.float32)[:, :vocab_size]
    shared_logits[:] = logits
    candidates = [np.zeros(num_rows, CANDIDATES) for _ in range(size)]
    shared = replace(SharedSampling.alone(shared_logits), candidates=candidates)

    def run(rank: int, device: Device) -> None:
        scratch = allocate((device.num_threads, library.sample_scratch_bytes(vocab_size)), np.uint8)
        ids = range(rank * vocab_size // size, (rank + 1) * vocab_size // size)
        own = RankSampling(rank, ids, SlotTokens(num_rows, 1), scratch)
        slots = rng.permutation(num_rows).astype(np.int32)
        last_tokens = np.zeros(num_rows, dtype=np.int32)
        first = step_of([1] * num_rows, sampled=range(num_rows), sample_slots=slots, last_tokens=last_tokens)
        device.submit(NOTHING, Program(sampling_ops("merge", shared, own)), first)
        all_from_last = np.ones(num_rows, dtype=np.bool_)
        second = step_of([1] * num_rows, from_last_token=all_from_last, token_slots=slots, last_tokens=last_tokens)
        out = Rows(num_rows, SIZE, Dtype.FLOAT32)
        device.submit(Program([embed(Matrix.pack(library, table, Dtype.FLOAT32), out)]), NOTHING, second)
        device.wait(first, timeout_s=20)
        np.testing.assert_array_equal(first.tokens, expected)
        device.wait(second, timeout_s=20)
        np.testing.assert_array_equal(last_tokens[slots], expected)
        np.testing.assert_array_equal(out.array, table[expected])

    if size == 1:
        with Device(library, [UNPINNED] * 2) as device:
            device.join(None, 0, 1, timeout_s=1)
            run(0, device)
    else:
        with group_of(library, size, num_threads=2) as devices:
            on_all(devices, run)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_an_abort_gets_a_device_out_of_its_wait_and_it_joins_again(library: Library, num_threads: int) -> None:
    partials = allocate((2, 2, 1, SIZE), np.float32)
    ranks = [Rank(partials, rank) for rank in range(2)]
    weights = np.ones((2, 2, SIZE), dtype=np.float32)
    programs = [rank.program(library, weights) for rank in ranks]
    with group_of(library, 2, num_threads) as devices:
        for _ in range(3):
            steps = [step_of([1]) for _ in range(3)]
            for step in steps:
                devices[0].submit(programs[0], NOTHING, step)  # rank 1 never comes
            assert devices[0].wait(steps[0], timeout_s=0.05) is Status.PENDING
            threading.Timer(0.05, devices[0].abort).start()
            start = time.monotonic()
            for step in steps:
                with pytest.raises(GroupError):
                    devices[0].wait(step, timeout_s=20)
                assert step.status is Status.ABORTED
            with pytest.raises(GroupError):  # nor does it wait again
                devices[0].run(programs[0], step_of([1]))
            assert time.monotonic() - start < 1
            for device in devices:
                device.leave()
            join_all(library, devices)
            on_all(devices, lambda rank, device: device.run(programs[rank], step_of([1])))
            np.testing.assert_array_equal(ranks[0].residual.array, 4)


def test_leaving_aborts_what_still_waits(library: Library) -> None:
    partials = allocate((2, 2, 1, SIZE), np.float32)
    program = Rank(partials, 0).program(library, np.ones((2, 2, SIZE), np.float32))
    with group_of(library, 2) as devices:
        step = step_of([1])
        devices[0].submit(program, NOTHING, step)
        start = time.monotonic()
        devices[0].leave()
        assert step.status is Status.ABORTED
        assert time.monotonic() - start < 1


def test_closing_ends_a_device_that_waits(library: Library) -> None:
    partials = allocate((2, 2, 1, SIZE), np.float32)
    program = Rank(partials, 0).program(library, np.ones((2, 2, SIZE), np.float32))
    step = step_of([1])
    start = time.monotonic()
    with group_of(library, 2, num_threads=2) as devices:
        devices[0].submit(program, NOTHING, step)
    assert time.monotonic() - start < 2
    devices[0].close()  # once more does no harm
    devices[0].abort()


def test_nobody_waits_for_ever_to_meet_the_others(native: Library) -> None:
    memory = GroupMemory.create(native.group_bytes())
    with Device(native, [UNPINNED]) as device:
        with pytest.raises(GroupError, match="rank 1 of 2"):
            device.join(memory.array, 1, 2, timeout_s=0.1)
        device.leave()
        device.join(None, 0, 1, timeout_s=0.1)
        device.run(NOTHING, step_of([1]))


def test_an_abort_gets_a_device_out_of_joining(native: Library) -> None:
    memory = GroupMemory.create(native.group_bytes())
    with Device(native, [UNPINNED]) as device:
        threading.Timer(0.1, device.abort).start()
        start = time.monotonic()
        with pytest.raises(GroupError):
            device.join(memory.array, 0, 2, timeout_s=20)
        assert time.monotonic() - start < 1


def test_steps_may_come_from_any_thread(native: Library) -> None:
    with Device(native, [UNPINNED] * 2) as device:
        device.join(None, 0, 1, timeout_s=1)

        def submit_many() -> None:
            for _ in range(200):
                step = step_of([1])
                device.submit(NOTHING, NOTHING, step)
                assert device.wait(step, timeout_s=10) is Status.OK

        threads = [threading.Thread(target=submit_many) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=20)
        start = time.monotonic()
        device.leave()
        assert time.monotonic() - start < 1


def test_threads_that_sleep_are_woken(native: Library) -> None:
    """They would look again by themselves, but only every 20 ms."""
    seconds = []
    with Device(native, [UNPINNED] * 3) as device:
        device.join(None, 0, 1, timeout_s=1)
        for index in range(40):
            time.sleep(0.003 + 0.0005 * index)
            start = time.monotonic()
            device.run(NOTHING, step_of([1]))
            seconds.append(time.monotonic() - start)
    assert sorted(seconds)[10] < 0.004


def test_threads_are_pinned_to_their_cores(native: Library) -> None:
    core = min(os.sched_getaffinity(0))

    def pinned() -> int:
        masks = [os.sched_getaffinity(int(task.name)) for task in Path("/proc/self/task").iterdir()]
        return sum(mask == {core} for mask in masks)

    before = pinned()
    with Device(native, [core, UNPINNED, core]):
        assert pinned() == before + (2 if len(os.sched_getaffinity(0)) > 1 else 3)


def test_a_device_that_cannot_open_says_so(native: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.c, "albireo_device_open", lambda _cores, _count: None)
    with pytest.raises(AlbireoError, match="cannot start 2 kernel threads"):
        Device(native, [0, 1])


def test_memory_is_shared_with_other_processes_that_need_no_torch() -> None:
    memory = GroupMemory.create(10_000)
    assert not memory.array.any()
    code = f"""
import sys
from albireo_kernels.cpu import GroupMemory
memory = GroupMemory.open({memory.path!r}, 10_000)
memory.array[9_999] = 7
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert memory.array[9_999] == 7
    memory.close()
    memory.close()
    with pytest.raises(OSError, match="No such file"):
        GroupMemory.open(memory.path, 10_000)
    assert memory.array[9_999] == 7
