"""Devices: teams of threads that replay programs; and the memory that the devices of a group share."""

import mmap
import os
from collections.abc import Sequence
from ctypes import byref, c_int32
from types import TracebackType
from typing import Self

import numpy as np

from albireo.errors import AlbireoError, GroupError
from albireo_kernels.cpu.buffers import Bytes, address
from albireo_kernels.cpu.library import Library
from albireo_kernels.cpu.program import Program
from albireo_kernels.cpu.step import StepData
from albireo_kernels.cpu.structs import Status

UNPINNED = -1  # a core that pins nothing

_NOTHING = Program()
_NS_PER_S = 1_000_000_000


class Device:
    """A team of threads, each pinned to its core, which replays steps in the order of their submission."""

    def __init__(self, library: Library, cores: Sequence[int]) -> None:
        """Starts the threads.

        Args:
            cores: one for each thread; negative ones pin nothing.
        Raises:
            AlbireoError: the threads cannot start.
        """
        self.library, self.num_threads = library, len(cores)
        self._c = library.c
        self._handle: int | None = self._c.albireo_device_open((c_int32 * len(cores))(*cores), len(cores))
        self._submitted: dict[int, tuple[Program, Program, StepData]] = {}
        self._memory: Bytes | None = None
        if self._handle is None:
            raise AlbireoError(f"cannot start {len(cores)} kernel threads on cores {list(cores)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def join(self, memory: Bytes | None, rank: int, size: int, timeout_s: float) -> None:
        """Becomes rank ``rank`` of ``size``, once all of them have come. The device must be idle.

        Args:
            memory: at least `Library.group_bytes` bytes that the ranks share, zero before the first of them comes;
                None when alone.
        Raises:
            GroupError: not all came in time, or one aborted.
        """
        self._memory = memory
        shared = None if memory is None else address(memory)
        status = Status(self._c.albireo_join(self._handle, shared, rank, size, int(timeout_s * _NS_PER_S)))
        if status is not Status.OK:
            raise GroupError(f"rank {rank} of {size} did not meet the others within {timeout_s} s")

    def leave(self) -> None:
        """Leaves the group; steps that still wait are aborted. Returns when the device is idle."""
        if self._handle is not None:
            self._c.albireo_leave(self._handle)
            self._submitted.clear()

    def submit(self, forward: Program, sample: Program, step: StepData) -> None:
        """Queues a step; never waits. The device holds on to what the step needs until a `wait` has seen its end."""
        self._submitted[id(step)] = (forward, sample, step)
        self._c.albireo_submit(self._handle, byref(forward.c), byref(sample.c), byref(step.c))

    def wait(self, step: StepData, timeout_s: float) -> Status:
        """Waits until a submitted step is complete.

        Returns:
            OK, or PENDING when it is not complete in time.
        Raises:
            GroupError: the step was aborted.
        """
        status = Status(self._c.albireo_wait(self._handle, byref(step.c), int(timeout_s * _NS_PER_S)))
        if status is Status.PENDING:
            return status
        self._submitted.pop(id(step), None)
        if status is Status.ABORTED:
            raise GroupError("the step was aborted: a rank is gone")
        return status

    def run(self, program: Program, step: StepData, timeout_s: float = 60.0) -> None:
        """Runs a program alone and waits for it; for tests and benchmarks.

        Raises:
            GroupError: the step was aborted, or takes longer than ``timeout_s``.
        """
        self.submit(program, _NOTHING, step)
        if self.wait(step, timeout_s) is not Status.OK:
            raise GroupError(f"a step takes longer than {timeout_s} s")

    def abort(self) -> None:
        """Gets the device out of its waits for other ranks, now and later, until `leave`. Any thread may call."""
        if self._handle is not None:
            self._c.albireo_abort(self._handle)

    def close(self) -> None:
        """Ends the threads, after the step that runs. Not while another thread is in one of the other calls."""
        if self._handle is not None:
            self._c.albireo_device_close(self._handle)
            self._handle = None
            self._submitted.clear()


class GroupMemory:
    """Memory that the ranks of a group share. It has no name in the file system: nothing of it is ever left over.

    Attributes:
        array: its bytes, zero at first, aligned to pages.
        path: by which other processes open it, as long as the one that made it lives and has not closed it.
    """

    def __init__(self, file: int, size: int) -> None:
        self._file = file
        self.array: Bytes = np.frombuffer(mmap.mmap(file, size), dtype=np.uint8)
        self.path = f"/proc/{os.getpid()}/fd/{file}"

    @classmethod
    def create(cls, size: int) -> Self:
        """Raises OSError where the system has no room."""
        file = os.memfd_create("albireo-group")
        os.ftruncate(file, size)
        return cls(file, size)

    @classmethod
    def open(cls, path: str, size: int) -> Self:
        """Memory that another process has made. Raises OSError when it is gone, ValueError when it is smaller."""
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            return cls(file, size)
        except BaseException:
            os.close(file)
            raise

    def close(self) -> None:
        """Gives up the file; the memory stays until its last array is gone."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
