"""The compiled sampler draws what the oracle draws, whatever scheme and number of ranks, and remembers its tokens."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo.logprobs import Logprobs
from albireo.model_spec import shard_vocab
from albireo_kernels.cpu import (
    CANDIDATES,
    NUM_RECENT,
    SCHEMES,
    UNPINNED,
    Device,
    GroupMemory,
    Library,
    Program,
    RankSampling,
    SharedSampling,
    SlotTokens,
    allocate,
    sampling_ops,
)
from albireo_kernels.reference import Params
from cpu_kernels import Array, step_of
from sampling_rows import (
    KINDS,
    NUM_SLOTS,
    Row,
    assert_logprobs,
    assert_same_logprobs,
    batch_of,
    expected_token,
    make_batch,
    margin_of,
    random_logits,
    random_row,
    random_scored,
)
from worker_svc.batch import History, InputBatch
from worker_svc.cpu_engine.sampling import SamplingMaker
from worker_svc.cpu_engine.step import CpuStep
from worker_svc.row_sampling import SlotSampling

MAX_ROWS = 64
NUM_SCORED = 5  # of them
# Where the oracle's own decision is as close as this, rounding may turn it.
NARROW = 1e-5
TIMEOUT_S = 60.0
NOTHING = Program()

Sampled = tuple[list[int], Logprobs | None]


class Ranks:
    """The devices of a group, with memory for any scheme."""

    def __init__(self, library: Library, devices: Sequence[Device], vocab_size: int) -> None:
        self._devices = devices
        size = len(devices)
        alone = SharedSampling.alone(allocate((MAX_ROWS, -(-vocab_size // 16) * 16), np.float32)[:, :vocab_size])
        candidates = [np.zeros(MAX_ROWS, CANDIDATES) for _ in devices]
        self._shared = replace(alone, candidates=candidates)
        scratch_bytes = -(-library.sample_scratch_bytes(vocab_size) // 64) * 64
        self._own = [
            RankSampling(
                rank,
                shard_vocab(vocab_size, rank, size),
                SlotTokens(NUM_SLOTS, vocab_size),
                allocate((device.num_threads, scratch_bytes), np.uint8),
            )
            for rank, device in enumerate(devices)
        ]

    def programs(self, scheme: str) -> list[Program]:
        return [Program(sampling_ops(scheme, self._shared, own)) for own in self._own]

    def sample(
        self, programs: Sequence[Program], logits: Array, batch: InputBatch
    ) -> tuple[list[int], Logprobs | None]:
        """Of one step, identical on all ranks."""
        self._shared.logits[: len(logits)] = logits
        count, pending = len(batch.sample_tokens), []
        for device, program in zip(self._devices, programs, strict=True):
            last_tokens = np.full(NUM_SLOTS, -1, dtype=np.int32)
            slots = batch.sample_slots
            step = step_of(
                [1] * count,
                sampled=range(count),
                sample_slots=slots,
                scored_token_ids=batch.scored_token_ids,
                sampling=SamplingMaker().of_step(batch),
                last_tokens=last_tokens,
            )
            device.submit(NOTHING, program, step)
            pending.append((CpuStep(device, step), last_tokens))
        outputs = [step.resolve() for step, _ in pending]
        for output, (_, last_tokens) in zip(outputs, pending, strict=True):
            assert output.token_ids.tolist() == outputs[0].token_ids.tolist()
            assert last_tokens[batch.sample_slots].tolist() == output.token_ids[: len(batch.sample_slots)].tolist()
            assert (last_tokens >= 0).sum() == len(batch.sample_slots)
            assert_same_logprobs(output.logprobs, outputs[0].logprobs)
        return outputs[0].token_ids.tolist(), outputs[0].logprobs


@contextmanager
def devices_of(library: Library, size: int, num_threads: int = 1) -> Iterator[list[Device]]:
    memory = GroupMemory.create(library.group_bytes())
    with ExitStack() as stack, ThreadPoolExecutor(size) as pool:
        devices = [stack.enter_context(Device(library, [UNPINNED] * num_threads)) for _ in range(size)]
        shared = memory.array if size > 1 else None
        list(pool.map(lambda rank: devices[rank].join(shared, rank, size, TIMEOUT_S), range(size)))
        yield devices


@pytest.fixture(scope="module")
def groups(library: Library) -> Iterator[dict[int, list[Device]]]:
    with ExitStack() as stack:
        yield {size: stack.enter_context(devices_of(library, size, 2 if size == 2 else 1)) for size in (1, 2, 4, 8)}


@settings(max_examples=48, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    vocab_size=st.sampled_from([1003, 1003, 9001, 601, 130, 37, 3, 1]),
    kind=st.sampled_from(KINDS),
)
def test_every_scheme_and_number_of_ranks_draws_what_the_oracle_draws(
    library: Library, groups: dict[int, list[Device]], seed: int, vocab_size: int, kind: str
) -> None:
    """Tokens and logprobs of 64 rows a time, every parameter at random; some of them score; the same bits in all twelve
    ways."""
    generator = np.random.default_rng(seed)
    rows = [random_row(generator, vocab_size) for _ in range(MAX_ROWS - NUM_SCORED)]
    scored = random_scored(generator, NUM_SCORED, vocab_size)
    logits, batch = random_logits(generator, MAX_ROWS, vocab_size, kind), batch_of(rows, vocab_size, scored)
    results = {}
    for size, devices in groups.items():
        ranks = Ranks(library, devices, vocab_size)
        for scheme in SCHEMES:
            results[scheme, size] = ranks.sample(ranks.programs(scheme), logits.numpy(), batch)
    tokens, logprobs = results["merge", 1]
    for way, (other_tokens, other_logprobs) in results.items():
        assert other_tokens == tokens, way
        assert_same_logprobs(other_logprobs, logprobs)
    for row, of_row, token in zip(rows, logits, tokens, strict=False):
        assert token == expected_token(of_row, row) or margin_of(of_row, row) < NARROW, row
    assert tokens[-NUM_SCORED:] == [row.token for row in scored]
    assert_logprobs(logprobs, logits, [*rows, *scored], tokens)


VOCAB_SIZE = 203
PROMPT = [5, 6, 7, 5]
PENALISED = Params(temperature=0.0, repetition_penalty=1.5, presence_penalty=0.4, frequency_penalty=0.9)
WORDS = Params(temperature=0.0, bad_words=[[3, 4], [4, 5, 6]])


class Slots:
    """A group that samples step after step; logits of step i are made from i."""

    def __init__(self, library: Library, scheme: str, devices: Sequence[Device]) -> None:
        self._ranks = Ranks(library, devices, VOCAB_SIZE)
        self._programs = self._ranks.programs(scheme)
        self._sampling = SlotSampling(NUM_SLOTS, VOCAB_SIZE)

    def start(self, slot: int, params: Params) -> list[History]:
        tokens = np.array([*params.prompt, *params.output], np.int32)
        needs = self._sampling.set(slot, Row(params, 0).message)
        return [History(slot, tokens, len(params.prompt))] if needs else []

    def step(self, slots: Sequence[int], position: int, histories: Sequence[History] = ()) -> list[int]:
        batch = make_batch(slots, self._sampling, np.full(len(slots), position), histories)
        logits = np.repeat(logits_of_step(position)[None], len(slots), axis=0)
        return self._ranks.sample(self._programs, logits, batch)[0]


def logits_of_step(step: int) -> Array:
    logits: Array = random_logits(np.random.default_rng(step), 1, VOCAB_SIZE, "ties").numpy()[0]
    return logits


def oracle_output(params: Params, num_tokens: int) -> list[int]:
    output = list(params.output)
    for position in range(len(output), num_tokens):
        row = Row(replace(params, prompt=PROMPT, output=output), position)
        output.append(expected_token(torch.from_numpy(logits_of_step(position)), row))
    return output


WAYS = [("merge", 1), ("merge", 2), ("merge", 8), ("batch-sharded", 4), ("gather", 2)]


@pytest.mark.parametrize(("scheme", "size"), WAYS)
def test_sampling_depends_on_tokens_that_the_host_has_not_seen(
    library: Library, groups: dict[int, list[Device]], scheme: str, size: int
) -> None:
    """Three sequences with penalties, bad words and neither; one is preempted and goes on in another slot, where
    another had been, and more tokens are sampled than a device keeps in order."""
    num_tokens, preempted_at = NUM_RECENT + 20, NUM_RECENT + 7
    slots = Slots(library, scheme, groups[size])
    expected = {slot: oracle_output(params, num_tokens) for slot, params in ((9, PENALISED), (4, WORDS), (7, Params()))}
    given = {9: PENALISED, 4: WORDS, 7: Params()}
    histories = [
        history for slot, params in given.items() for history in slots.start(slot, replace(params, prompt=PROMPT))
    ]
    outputs: dict[int, list[int]] = {slot: [] for slot in given}
    places = {9: 9, 4: 4, 7: 7}  # sequence -> slot
    for position in range(num_tokens):
        if position == preempted_at:
            places = {9: 4, 4: 9, 7: 7}
            histories = []
            for sequence, slot in ((9, 4), (4, 9)):
                histories += slots.start(slot, replace(given[sequence], prompt=PROMPT, output=outputs[sequence]))
        tokens = slots.step([places[sequence] for sequence in given], position, histories)
        histories = []
        for sequence, token in zip(given, tokens, strict=True):
            outputs[sequence].append(token)
    assert outputs == expected
