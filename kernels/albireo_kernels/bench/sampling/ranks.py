"""Runs the schemes on the same logits, and sees to it that they draw the same tokens.

A step's forward program is a small product that writes the logits, so that they are fresh and lie in the caches as they
do after a model's last layer. Ranks are devices of this process with one thread each. Where there are fewer cores than
ranks, only rank 0 is there: its device meets nobody, what the others would have written lies there already, and its
time is labelled as modelled.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from albireo.arrays import Float32Array, Int32Array
from albireo.errors import GroupError
from albireo_kernels.bench.measure import join_all
from albireo_kernels.bench.sampling.payload import Shape
from albireo_kernels.bench.steps import RowInputs, Sampling, step_of
from albireo_kernels.cpu import (
    CANDIDATES,
    SCHEMES,
    TOKEN_LOGPROBS,
    Device,
    Dtype,
    Extent,
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
    StepData,
    allocate,
    gemm,
    sampling_ops,
)
from albireo_kernels.cpu.sampling_ops import exchange
from albireo_kernels.cpu.structs import RowsOf

NOT_DRAWN = -1

_HIDDEN = 16  # inputs of the product that makes the logits
_LOGITS_STD = 3.0
_FLOATS_PER_LINE = 16  # of a cache
_TIMEOUT_S = 120.0
_BEGIN_AND_END = ("forward_end_at_ns", "end_at_ns")  # of sampling, on the clock that all threads share

# Of each scheme, of each rank.
_Steps = Mapping[str, Sequence[StepData]]


@dataclass(frozen=True, slots=True)
class Effort:
    """A measurement repeats ``min_reps`` times, and goes on for ``budget_s`` seconds, up to ``max_reps``."""

    min_reps: int
    max_reps: int
    budget_s: float = 2.0

    def goes_on(self, num_done: int, begin_s: float) -> bool:
        """After so many repetitions since ``begin_s`` of `time.perf_counter`."""
        if num_done < self.min_reps:
            return True
        return num_done < self.max_reps and time.perf_counter() - begin_s < self.budget_s


class Ranks:
    """The ranks of one shape, each with a program for every scheme."""

    def __init__(self, library: Library, shape: Shape, cores: Sequence[int]) -> None:
        """On one core each; with fewer cores than ranks, rank 0 alone."""
        self.shape = shape
        self.is_modelled = shape.tp > len(cores)
        self._shared = _shared_sampling(shape)
        owns = [_own(library, shape, rank) for rank in range(shape.tp)]
        products = _products(library, shape, self._shared.logits)
        if self.is_modelled:
            # Its own columns are the last ones that are written, as they are where each rank writes its own.
            whole = [op for product in reversed(products) for op in product]
            selects = [sampling_ops("merge", self._shared, own)[0] for own in owns[1:]]
            self._prepare: Program | None = Program([*whole, *selects])
            self._forwards = [Program(whole)]
        else:
            # They meet first, as they do in every layer before: none starts ahead of the others.
            start = np.zeros((shape.batch, 1), dtype=np.float32)
            meet = exchange(start, start.copy(), RowsOf.OWN)
            self._prepare = None
            self._forwards = [Program([meet, *product]) for product in products]
        self._samples = {
            scheme: [Program(sampling_ops(scheme, self._shared, own)) for own in owns[: len(self._forwards)]]
            for scheme in SCHEMES
        }
        with ExitStack() as if_it_fails:
            used = cores[: len(self._forwards)]
            self._devices = [if_it_fails.enter_context(Device(library, [core])) for core in used]
            self._join()
            self._stack = if_it_fails.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def measure(self, sampling: Sampling, effort: Effort) -> dict[str, float]:
        """Seconds of each scheme, from when the last rank has its logits to when the last one has all tokens; medians.

        Raises:
            GroupError: two of them have not drawn the same tokens, or a step takes too long.
        """
        rows = RowInputs.of(self.shape.batch)
        steps = {scheme: [step_of(rows, sampling=sampling) for _ in self._devices] for scheme in SCHEMES}
        if self._prepare is not None:
            self._devices[0].run(self._prepare, step_of(rows, sampling=sampling))
        self._take_turns(SCHEMES, steps)
        seconds: dict[str, list[float]] = {scheme: [] for scheme in SCHEMES}
        begin_s = time.perf_counter()
        while effort.goes_on(len(seconds[SCHEMES[0]]), begin_s):
            first = len(seconds[SCHEMES[0]]) % len(SCHEMES)  # so that none always comes after the same one
            for scheme, each in self._take_turns(SCHEMES[first:] + SCHEMES[:first], steps).items():
                seconds[scheme].append(each)
        return {scheme: statistics.median(each) for scheme, each in seconds.items()}

    def _join(self) -> None:
        if self.is_modelled:
            # Of a group without memory to meet in: it takes its share of the rows and waits for nobody.
            self._devices[0].join(None, 0, self.shape.tp, _TIMEOUT_S)
        else:
            join_all(self._devices)

    def _take_turns(self, order: Sequence[str], steps: _Steps) -> dict[str, float]:
        seconds = {scheme: self._run(scheme, steps[scheme]) for scheme in order}
        num_own = self.shape.tp if self.is_modelled else 1
        check_tokens({scheme: [step.tokens for step in each] for scheme, each in steps.items()}, num_own)
        return seconds

    def _run(self, scheme: str, steps: Sequence[StepData]) -> float:
        self._shared.tokens[:] = NOT_DRAWN
        programs = self._samples[scheme]
        for device, forward, sample, step in zip(self._devices, self._forwards, programs, steps, strict=True):
            step.tokens[:] = NOT_DRAWN
            device.submit(forward, sample, step)
        for device, step in zip(self._devices, steps, strict=True):
            if device.wait(step, _TIMEOUT_S) is not Status.OK:
                raise GroupError(f"{scheme}: a step takes longer than {_TIMEOUT_S:g} s")
        begin_ns, end_ns = (max(int(getattr(step.c, name)) for step in steps) for name in _BEGIN_AND_END)
        return (end_ns - begin_ns) / 1e9


def check_tokens(tokens: Mapping[str, Sequence[Int32Array]], every: int) -> None:
    """Raises GroupError unless all ranks have the same tokens by every scheme.

    Args:
        tokens: [S] of each scheme and rank.
        every: of ranks that are alone, they are the first of so many ranks, which would have drawn the other rows where
            rows are shared out; 1: all are there.
    """
    expected = tokens["gather"][0]
    own_rows = np.full_like(expected, NOT_DRAWN)
    own_rows[::every] = expected[::every]
    for scheme, of_ranks in tokens.items():
        for rank, found in enumerate(of_ranks):
            wanted = expected if scheme == "gather" else own_rows
            for row in np.flatnonzero((found != wanted) | (expected == NOT_DRAWN)):
                raise GroupError(
                    f"{scheme}, rank {rank}, row {row}: token {found[row]}, where gather has {wanted[row]} on rank 0"
                )


def _shared_sampling(shape: Shape) -> SharedSampling:
    """Logits lie in memory of the kind that processes share, whose pages are small."""
    stride = -(-shape.vocab_size // _FLOATS_PER_LINE) * _FLOATS_PER_LINE
    memory = GroupMemory.create(4 * shape.batch * stride)
    logits = memory.array.view(np.float32).reshape(shape.batch, stride)
    memory.close()
    return SharedSampling(
        logits=logits[:, : shape.vocab_size],
        raw=allocate(logits.shape, np.float32)[:, : shape.vocab_size],
        candidates=[np.zeros(shape.batch, CANDIDATES) for _ in range(shape.tp)],
        tokens=np.zeros(shape.batch, dtype=np.int32),
        logprobs=np.zeros(shape.batch, TOKEN_LOGPROBS),
    )


def _own(library: Library, shape: Shape, rank: int) -> RankSampling:
    scratch_bytes = -(-library.sample_scratch_bytes(shape.vocab_size) // 64) * 64
    scratch = allocate((1, scratch_bytes), np.uint8)
    return RankSampling(rank, shape.ids(rank), SlotTokens(shape.batch, 1), scratch)


def _products(library: Library, shape: Shape, logits: Float32Array) -> list[list[Op]]:
    """Each rank's, which writes its columns; none where it has none. The logits are the same for every TP degree."""
    rng = np.random.default_rng(0)
    x = Rows(shape.batch, _HIDDEN, library.input_dtype(Dtype.FLOAT32))
    x.array[...] = rng.standard_normal((shape.batch, _HIDDEN))
    rows = rng.standard_normal((shape.vocab_size, _HIDDEN), dtype=np.float32)
    rows *= _LOGITS_STD / _HIDDEN**0.5
    products: list[list[Op]] = []
    for rank in range(shape.tp):
        ids = slice(shape.ids(rank).start, shape.ids(rank).stop)
        ops = []
        if shape.ids(rank):
            weight = Matrix.pack(library, rows[ids], Dtype.FLOAT32)
            ops.append(gemm(x, weight, Rows.of(logits[:, ids]), extent=Extent.EACH_SAMPLE))
        products.append(ops)
    return products
