"""Samplers as a function from seeds and positions to tokens: the same rows drawn again and again.

A batch has rows of one case of `distribution`, or such rows among others of all kinds.
"""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch_engine.sampler_ranks import CPU, SharedMemory, ThreadGroup, vocab_shard

from albireo.model_spec import shard_vocab
from albireo_kernels import cpu
from albireo_kernels.cpu import CANDIDATES, UNPINNED, Device, GroupMemory, Program, RankSampling, SharedSampling
from albireo_kernels.noise import row_keys
from cpu_kernels import Array, step_of
from distribution import NARROW, WIDE, Case
from sampling_rows import Row, make_batch, random_logits, random_row
from worker_svc.batch import History, InputBatch
from worker_svc.cpu_engine.sampling import SamplingMaker
from worker_svc.cpu_engine.step import CpuStep
from worker_svc.row_sampling import SlotSampling
from worker_svc.torch_engine.sampler import Sampler
from worker_svc.torch_engine.sampling.edits import needy_rows

NUM_ROWS = 512
NUM_OTHERS = 32  # rows of other kinds in a mixed batch
NUM_SLOTS = NUM_ROWS + NUM_OTHERS
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Template:
    """A step that is sampled again and again, with other seeds and positions.

    Attributes:
        logits: [NUM_ROWS, vocab_size].
        rows: which of them are the case's.
    """

    batch: InputBatch
    sampling: cpu.Sampling
    logits: Tensor
    rows: Array


Engine = Callable[[Template, Array, Array], Array]  # of seeds [NUM_ROWS] and positions [NUM_ROWS]: tokens


@cache
def other_rows(vocab_size: int) -> tuple[list[Row], Tensor]:
    generator = np.random.default_rng(3)
    rows = [random_row(generator, vocab_size) for _ in range(NUM_OTHERS)]
    return rows, random_logits(generator, NUM_OTHERS, vocab_size, "normal")


@cache
def template(case: Case, is_mixed: bool) -> Template:
    sampling, histories = sequences(case)
    slots, logits = np.arange(NUM_SLOTS)[::-1][-NUM_ROWS:], case.logits.repeat(NUM_ROWS, 1)
    others = np.zeros(0, np.int64)
    if is_mixed:
        others = np.random.default_rng(4).permutation(NUM_ROWS)[:NUM_OTHERS]
        slots[others] = np.arange(NUM_ROWS, NUM_SLOTS)
        logits[others] = other_rows(case.vocab_size)[1]
    begun = [histories[slot] for slot in slots.tolist() if slot in histories]
    batch = make_batch(slots.tolist(), sampling, np.full(NUM_ROWS, case.first_position), begun)
    return Template(batch, SamplingMaker().of_step(batch), logits, np.setdiff1d(np.arange(NUM_ROWS), others))


@cache
def sequences(case: Case) -> tuple[SlotSampling, dict[int, History]]:
    """The case's in the first slots, others in the last, with their histories where they need one."""
    sampling, histories = SlotSampling(NUM_SLOTS, case.vocab_size), {}
    others = [(row.params, row.message) for row in other_rows(case.vocab_size)[0]]
    for slot, (params, message) in enumerate([(case.params, case.message)] * NUM_ROWS + others):
        if sampling.set(slot, message):
            tokens = np.array([*params.prompt, *params.output], np.int32)
            histories[slot] = History(slot, tokens, len(params.prompt))
    return sampling, histories


load_library = cache(cpu.load_library)  # one for all, though somebody may edit its source meanwhile


class Compiled:
    """The compiled sampler of a group in one process."""

    def __init__(self, scheme: str, size: int, stack: ExitStack) -> None:
        library = load_library()
        memory = GroupMemory.create(library.group_bytes())
        self._devices = [stack.enter_context(Device(library, [UNPINNED])) for _ in range(size)]
        with ThreadPoolExecutor(size) as pool:
            shared = memory.array if size > 1 else None
            list(pool.map(lambda rank: self._devices[rank].join(shared, rank, size, TIMEOUT_S), range(size)))
        self._library, self._scheme, self._memory = library, scheme, memory
        self._programs = {vocab_size: self._programs_of(vocab_size) for vocab_size in (NARROW, WIDE)}

    def _programs_of(self, vocab_size: int) -> tuple[SharedSampling, list[Program]]:
        size = len(self._devices)
        logits = cpu.allocate((NUM_ROWS, -(-vocab_size // 16) * 16), np.float32)[:, :vocab_size]
        shared = replace(SharedSampling.alone(logits), candidates=[np.zeros(NUM_ROWS, CANDIDATES) for _ in range(size)])
        scratch_bytes = -(-self._library.sample_scratch_bytes(vocab_size) // 64) * 64
        programs = []
        for rank in range(size):
            tokens, scratch = cpu.SlotTokens(NUM_SLOTS, vocab_size), cpu.allocate((1, scratch_bytes), np.uint8)
            own = RankSampling(rank, shard_vocab(vocab_size, rank, size), tokens, scratch)
            programs.append(Program(cpu.sampling_ops(self._scheme, shared, own)))
        return shared, programs

    def __call__(self, of: Template, seeds: Array, positions: Array) -> Array:
        shared, programs = self._programs[of.logits.shape[1]]
        shared.logits[:] = of.logits.numpy()
        sampling = replace(of.sampling, noise_keys=row_keys(seeds, positions))
        steps = []
        for device, program in zip(self._devices, programs, strict=True):
            step = step_of(
                [1] * NUM_ROWS,
                sampled=range(NUM_ROWS),
                sample_slots=of.batch.sample_slots,
                sampling=sampling,
                last_tokens=np.zeros(NUM_SLOTS, np.int32),
            )
            device.submit(Program(), program, step)
            steps.append(CpuStep(device, step))
        tokens = [step.resolve().token_ids for step in steps]
        assert all((other == tokens[0]).all() for other in tokens)
        return tokens[0]


class Eager:
    """The eager sampler, its ranks threads."""

    def __init__(self, scheme: str, size: int) -> None:
        self._scheme, self._size = scheme, size
        self._begun: tuple[Template, list[Sampler]] | None = None

    def __call__(self, of: Template, seeds: Array, positions: Array) -> Array:
        """Torch takes 0.2 ms to begin a sequence with a history, so that is done once, and copied."""
        if self._begun is None or self._begun[0] is not of:
            self._begun = of, [self._begin(of, rank) for rank in range(self._size)]
        memory, samplers = SharedMemory(self._size), copy.deepcopy(self._begun[1])
        sampling = replace(of.batch.sampling, seed=seeds)
        batch = replace(of.batch, sampling=sampling, output_positions=positions, histories=())

        def sample(rank: int) -> Array:
            torch.set_num_threads(1)
            ids = shard_vocab(of.logits.shape[1], rank, self._size)
            with torch.inference_mode():
                shard = of.logits[:, ids.start : ids.stop].clone()
                return samplers[rank].sample(shard, batch, ThreadGroup(rank, memory)).tokens.numpy()

        with ThreadPoolExecutor(self._size) as pool:
            tokens = list(pool.map(sample, range(self._size)))
        assert all((other == tokens[0]).all() for other in tokens)
        return tokens[0]

    def _begin(self, of: Template, rank: int) -> Sampler:
        sampler = Sampler(self._scheme, NUM_SLOTS, vocab_shard(rank, self._size, of.logits.shape[1]), CPU)
        penalised, with_words = needy_rows(of.batch.sampling)
        slots = of.batch.sample_slots
        sampler._state.expect(of.batch.histories)
        sampler._state.begin(slots[penalised], slots[with_words])
        return sampler
