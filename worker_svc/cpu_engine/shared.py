"""Memory that the ranks of a group share, and how they find it."""

import math
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from albireo.arrays import Float32Array
from albireo.errors import GroupError
from albireo_kernels.cpu import CANDIDATES, TOKEN_LOGPROBS, GroupMemory, Library, SharedSampling, allocate

_MEETING_TIMEOUT_S = 60.0
_POLL_S = 0.01
_ALIGNMENT = 4096  # nothing that two ranks write lies in one page
_FILES = "compiled-meeting-"

_Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class GroupSizes:
    """What the size of the memory depends on."""

    tp_size: int
    max_num_batched_tokens: int
    max_num_seqs: int
    hidden_size: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class GroupBuffers:
    """What all ranks of a group read.

    Attributes:
        meeting: where their devices meet; None for a rank alone.
        partials: two by turns, each of every rank: [max_num_batched_tokens, hidden], its part of a sum. Two, because a
            rank may be one meeting ahead of those that still add up the last. None of a rank alone.
        sampling: of max_num_seqs rows.
    """

    meeting: _Bytes | None
    partials: tuple[tuple[Float32Array, ...], tuple[Float32Array, ...]]
    sampling: SharedSampling


class Rendezvous:
    """Where the ranks meet: rank 0 makes the memory, and a file in ``run_dir``, one for each meeting, tells where."""

    def __init__(self, rank: int, run_dir: Path, library: Library) -> None:
        self._rank = rank
        self._run_dir = run_dir
        self._library = library
        self._is_aborted = threading.Event()
        self._memory: GroupMemory | None = None
        self._file: Path | None = None

    def find(self, meeting: int, sizes: GroupSizes) -> GroupBuffers:
        """The memory of the group that meets under this number. GroupError: rank 0 did not make it in time."""
        if sizes.tp_size == 1:
            return _buffers(None, sizes, 0)
        num_meeting_bytes = self._library.group_bytes()
        num_bytes = num_meeting_bytes + sum(_num_bytes(shape) for shape in _shapes(sizes))
        file = self._run_dir.resolve() / f"{_FILES}{meeting:016x}"
        try:
            if self._rank == 0:
                self._memory = GroupMemory.create(num_bytes)
                self._tell(file)
            else:
                self._memory = GroupMemory.open(self._wait_for(file), num_bytes)
        except (OSError, ValueError) as error:
            raise GroupError(f"rank {self._rank} has no memory to share with the others: {error}") from error
        return _buffers(self._memory.array, sizes, num_meeting_bytes)

    def has_met(self) -> None:
        """All ranks have found the memory: nobody else shall."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        if self._file is not None:
            self._file.unlink(missing_ok=True)
            self._file = None

    def abort(self) -> None:
        """From any thread: ends `find`, now or later, until `leave`."""
        self._is_aborted.set()

    def leave(self) -> None:
        self.has_met()
        self._is_aborted.clear()

    def _tell(self, file: Path) -> None:
        assert self._memory is not None
        for leftover in file.parent.glob(f"{_FILES}*"):
            leftover.unlink(missing_ok=True)
        self._file = file
        unfinished = file.with_suffix(".new")
        unfinished.write_text(self._memory.path, encoding="ascii")
        unfinished.rename(file)

    def _wait_for(self, file: Path) -> str:
        deadline = time.monotonic() + _MEETING_TIMEOUT_S
        while True:
            try:
                return file.read_text(encoding="ascii")
            except FileNotFoundError:
                pass
            if self._is_aborted.is_set():
                raise GroupError("the meeting is aborted")
            if time.monotonic() > deadline:
                raise GroupError(f"rank {self._rank}: rank 0 did not come within {_MEETING_TIMEOUT_S:.0f} s")
            time.sleep(_POLL_S)


def _shapes(sizes: GroupSizes) -> list[tuple[int, ...]]:
    """Of the arrays, all of 4-byte elements, in the order in which they lie in the memory."""
    num_partials = 2 * sizes.tp_size if sizes.tp_size > 1 else 0
    logits = (sizes.max_num_seqs, -(-sizes.vocab_size // 16) * 16)  # rows begin at 64 bytes
    return [
        *[(sizes.max_num_batched_tokens, sizes.hidden_size)] * num_partials,
        *[(sizes.max_num_seqs, CANDIDATES.itemsize // 4)] * sizes.tp_size,
        *[logits] * 2,
        (sizes.max_num_seqs,),
        (sizes.max_num_seqs, TOKEN_LOGPROBS.itemsize // 4),
    ]


def _num_bytes(shape: tuple[int, ...]) -> int:
    return -(-4 * math.prod(shape) // _ALIGNMENT) * _ALIGNMENT


def _buffers(memory: _Bytes | None, sizes: GroupSizes, start: int) -> GroupBuffers:
    """Arrays in the memory, from ``start`` on; without one, in memory of their own."""
    arrays: list[Float32Array] = []
    for shape in _shapes(sizes):
        num_used = 4 * math.prod(shape)
        if memory is None:
            arrays.append(allocate(shape, np.float32))
        else:
            arrays.append(memory[start : start + num_used].view(np.float32).reshape(shape))
        start += _num_bytes(shape)
    *others, logits, raw, tokens, logprobs = arrays
    partials, candidates = others[: -sizes.tp_size], others[-sizes.tp_size :]
    by_turns = tuple(partials[: sizes.tp_size]), tuple(partials[sizes.tp_size :])
    sampling = SharedSampling(
        logits=logits[:, : sizes.vocab_size],
        raw=raw[:, : sizes.vocab_size],
        candidates=[array.view(CANDIDATES)[:, 0] for array in candidates],
        tokens=tokens.view(np.int32),
        logprobs=logprobs.view(TOKEN_LOGPROBS)[:, 0],
    )
    return GroupBuffers(memory, by_turns, sampling)
