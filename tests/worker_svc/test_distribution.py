"""Sampling draws from the distribution that parameters describe: chi-square tests against transformers' processors.

Seeds are fixed, so a result is the same every time. Each case is drawn with consecutive seeds at one position and with
one seed at consecutive positions, in batches of its own and in batches with rows of other kinds.
"""

import copy
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_engine.sampler_ranks import CPU, SharedMemory, ThreadGroup, vocab_shard

from albireo.model_spec import shard_vocab
from albireo_kernels import cpu, reference
from albireo_kernels.cpu import CANDIDATES, UNPINNED, Device, GroupMemory, Program, RankSampling, SharedSampling
from albireo_kernels.noise import row_keys
from albireo_kernels.reference import Params
from cpu_kernels import Array, step_of
from distribution import CASES, NARROW, WIDE, Case, Fit, fit_of, probabilities
from sampling_rows import Row, as_float32, make_batch, random_logits, random_row
from worker_svc.batch import History, InputBatch
from worker_svc.cpu_engine.sampling import step_sampling
from worker_svc.cpu_engine.step import CpuStep
from worker_svc.row_sampling import SlotSampling
from worker_svc.torch_engine.sampler import Sampler
from worker_svc.torch_engine.sampling.edits import needy_rows

NUM_ROWS = 1024
NUM_OTHERS = 48  # rows of other kinds in a mixed batch
NUM_SLOTS = NUM_ROWS + NUM_OTHERS
QUICK, FULL = 20_000, 100_000
# Torch takes 60 us and more for a draw: without patience it shows one case of each of its routes.
QUICK_EAGER = 8_000
EAGER_CASES = ("temperature 1", "top-k", "top-p", "all filters", "everything")
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
    return Template(batch, step_sampling(batch), logits, np.setdiff1d(np.arange(NUM_ROWS), others))


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


class Compiled:
    """The compiled sampler of a group in one process."""

    def __init__(self, scheme: str, size: int, stack: ExitStack) -> None:
        library = cpu.load_library()
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


Way = tuple[str, str, int]
Engines = Callable[[str, str, int], Engine]
Record = Callable[[str, object], None]
QUICK_WAYS = [("compiled", "merge", 1), ("compiled", "merge", 2)]
# One rank alone does the same in every scheme.
FULL_WAYS = [
    ("compiled", "merge", 1),
    *(("compiled", scheme, size) for size in (2, 4) for scheme in cpu.SCHEMES),
    ("eager", "merge", 2),
]


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    with ExitStack() as stack:
        yield cache(
            lambda kind, scheme, size: Compiled(scheme, size, stack) if kind == "compiled" else Eager(scheme, size)
        )


def draw(engine: Engine, case: Case, num_draws: int, vary: str, is_mixed: bool) -> Array:
    """[num_draws] tokens in order of what varies, ``seed`` or ``position``; other cases get other seeds."""
    of, name = template(case, is_mixed), zlib.crc32(case.name.encode())
    seeds, positions = np.full(NUM_ROWS, name, np.uint64), np.full(NUM_ROWS, case.first_position, np.int64)
    tokens = []
    for start in range(0, num_draws, len(of.rows)):
        index = np.arange(start, start + len(of.rows))
        if vary == "seed":
            seeds[of.rows] = name + (is_mixed << 33) + index.astype(np.uint64)
        else:
            seeds[of.rows] = (name << 32) + is_mixed
            positions[of.rows] = case.first_position + index
        tokens.append(engine(of, seeds, positions)[of.rows])
    return np.concatenate(tokens)[:num_draws]


def fits_of(engine: Engine, case: Case, num_draws: int) -> dict[str, Fit]:
    """Of each way to draw, a quarter of the draws, and of all together."""
    probability, counts = probabilities(case), {}
    for vary in ("seed", "position"):
        for is_mixed in (False, True):
            tokens = draw(engine, case, num_draws // 4, vary, is_mixed)
            counts[f"{vary}, {'mixed' if is_mixed else 'alone'}"] = np.bincount(tokens, minlength=case.vocab_size)
    counts["all"] = np.sum(list(counts.values()), axis=0)
    return {name: fit_of(each, probability) for name, each in counts.items()}


def assert_draws(engine: Engine, case: Case, num_draws: int, record: Record) -> None:
    fits = fits_of(engine, case, num_draws)
    record("p_values", [fit.p_value for fit in fits.values()])
    assert not any(fit.is_rejected for fit in fits.values()), fits


def ids(cases: Sequence[Case]) -> list[str]:
    return [case.name.replace(",", "").replace(" ", "-") for case in cases]


by_case = pytest.mark.parametrize("case", CASES, ids=ids(CASES))
FEW = [case for case in CASES if case.name in EAGER_CASES]


@by_case
@pytest.mark.parametrize("way", QUICK_WAYS, ids=str)
def test_compiled_draws_have_their_distribution(
    engines: Engines, way: Way, case: Case, record_property: Record
) -> None:
    assert_draws(engines(*way), case, QUICK, record_property)


@pytest.mark.parametrize("case", FEW, ids=ids(FEW))
def test_eager_draws_have_their_distribution(engines: Engines, case: Case, record_property: Record) -> None:
    assert_draws(engines("eager", "merge", 1), case, QUICK_EAGER, record_property)


@pytest.mark.soak
@by_case
@pytest.mark.parametrize("way", FULL_WAYS, ids=str)
def test_many_draws_have_their_distribution(engines: Engines, way: Way, case: Case, record_property: Record) -> None:
    assert_draws(engines(*way), case, FULL, record_property)


# A case, and what is a little off where it is drawn.
OFF = [
    ("temperature 1", {"temperature": 1.08}),
    ("temperature, top-k", {"temperature": 0.74}),
    ("top-k", {"top_k": 21}),
    ("top-k", {"top_k": 19}),
    ("top-p", {"top_p": 0.92}),
    ("top-p", {"top_p": 0.88}),
    ("min-p", {"min_p": 0.06}),
    ("min-p", {"min_p": 0.04}),
    ("repetition", {"repetition_penalty": 1.3}),
    ("presence", {"presence_penalty": 0.9}),
    ("frequency", {"frequency_penalty": 0.4}),
    ("all penalties, all filters", {"temperature": 1.12}),
]


@pytest.mark.parametrize(("name", "off"), OFF, ids=str)
def test_a_little_off_is_rejected(engines: Engines, name: str, off: dict[str, float]) -> None:
    """With as many draws as the quick form has, in the sum of them all."""
    case = next(case for case in CASES if case.name == name)
    wrong = replace(case, params=replace(case.params, **off))
    tokens = draw(engines("compiled", "merge", 1), wrong, QUICK, "seed", False)
    counts = np.bincount(tokens, minlength=case.vocab_size)
    assert fit_of(counts, probabilities(case)).is_rejected
    assert not fit_of(counts, probabilities(wrong)).is_rejected


@pytest.mark.parametrize("vary", ["seed", "position"])
def test_neighbours_are_independent(engines: Engines, vary: str) -> None:
    """Draws with seeds or positions that follow each other: all pairs of classes of tokens are as frequent as they are
    when the draws know nothing of each other."""
    case, num_classes = CASES[0], 12
    probability = probabilities(case)
    order = probability.argsort()[::-1]
    of_token = np.zeros(case.vocab_size, np.int64)
    of_token[order] = np.arange(case.vocab_size) % num_classes
    classes = of_token[draw(engines("compiled", "merge", 1), case, QUICK, vary, False)]
    share = np.bincount(of_token, weights=probability)
    for lag in (1, 2, 3):
        # Pairs that do not overlap, of draws ``lag`` apart.
        first = np.arange(len(classes) - lag)[np.arange(len(classes) - lag) // lag % 2 == 0]
        pairs = np.bincount(classes[first] * num_classes + classes[first + lag], minlength=num_classes**2)
        assert not fit_of(pairs, np.outer(share, share).ravel()).is_rejected


@by_case
def test_definitions_agree_and_cuts_are_clear(case: Case) -> None:
    """What transformers makes of a case is what the oracle does, also when filters are moved by what rounding could."""
    params = as_float32(case.params)
    if case.first_position < case.min_tokens:
        params = replace(params, bad_words=[*params.bad_words, *([token] for token in case.suppressed)])
    scaled = reference.edit(case.logits, params) / params.temperature
    expected = probabilities(case)
    for nudge in (1 - 1e-5, 1, 1 + 1e-5):
        top_p = min(params.top_p * nudge, 1.0) if params.top_p < 1 else 1.0
        kept = reference.survivors(scaled, params.top_k, top_p, params.min_p * nudge)
        possible = kept[scaled[kept] > -torch.inf]
        probability = np.zeros(case.vocab_size)
        probability[possible] = scaled[possible].double().softmax(dim=0)
        assert ((probability > 0) == (expected > 0)).all()
        np.testing.assert_allclose(probability, expected, rtol=1e-5)
    gaps = scaled[possible].sort().values.diff()
    assert (gaps > 0).all() or not params.top_k


@by_case
def test_every_parameter_of_a_case_matters(case: Case) -> None:
    """Without it another distribution comes out, by at least a hundredth of all draws. Min-p and top-k are tried
    together: of two cuts of the same order only one can be felt."""
    none = Params()
    assert_matters(case, replace(case.params, top_k=none.top_k, min_p=none.min_p))
    others = ("temperature", "top_p", "biases", "allowed", "bad_words")
    for name in (*others, "repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert_matters(case, replace(case.params, **{name: getattr(none, name)}))


def assert_matters(case: Case, other: Params) -> None:
    if other != case.params:
        difference = np.abs(probabilities(case) - probabilities(replace(case, params=other))).sum() / 2
        assert difference > 0.01, other
