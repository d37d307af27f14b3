"""A short story of plans that an engine runs: chunked prefill mixed with decodes, in scattered blocks.

Imports no transformers, and torch for the eager engine only, so that rank processes start quickly.
"""

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, Protocol

import numpy as np

from albireo.arrays import Float32Array, pack_int32
from albireo.plan import NewSequence, Rows, StepPlan
from albireo.v1 import plan_pb2
from albireo_kernels.cpu import Library, load_library
from worker_svc.batch import BatchState
from worker_svc.engine import BLOCK_SIZE, Engine, EngineConfig, EngineInfo, StepTimes

Kind = Literal["eager", "compiled"]

MAX_NUM_SEQS = 6
MAX_MODEL_LEN = 128
NUM_DECODE_STEPS = 6
_meetings = itertools.count(100)  # all rank processes tell the same stories
GREEDY = plan_pb2.Sampling(temperature=0.0, top_p=1.0)


def engine_config(
    model_path: Path,
    run_dir: Path,
    rank: int = 0,
    tp_size: int = 1,
    dtype: str = "auto",
    max_model_len: int = MAX_MODEL_LEN,
    kv_cache_gib: float = 0.0,
    quantize: str = "none",
) -> EngineConfig:
    return EngineConfig(
        model_path=model_path,
        rank=rank,
        tp_size=tp_size,
        run_dir=run_dir,
        device="cpu",
        dtype=dtype,
        max_num_seqs=MAX_NUM_SEQS,
        max_model_len=max_model_len,
        max_num_batched_tokens=128,
        kv_cache_gib=kv_cache_gib,
        quantize=quantize,
    )


class RecordingEngine(Engine, Protocol):
    """Keeps the whole vocabulary's logits of every sampling row."""

    recorded: list[Float32Array]  # by step, [S, vocab_size]


def make_engine(kind: Kind, config: EngineConfig) -> Engine:
    if kind == "eager":
        from worker_svc.torch_engine.engine import TorchEngine

        return TorchEngine(config)
    from worker_svc.cpu_engine.engine import CpuEngine

    return CpuEngine(config, load_library())


def make_recording_engine(kind: Kind, config: EngineConfig, library: Library | None) -> RecordingEngine:
    if kind == "eager":
        from eager_recorder import RecordingTorchEngine

        return RecordingTorchEngine(config)
    from compiled_recorder import RecordingCpuEngine

    return RecordingCpuEngine(config, library or load_library())


@dataclass
class Sequence:
    """A sequence of the story, and what came of it."""

    slot: int
    prompt: list[int]
    blocks: list[int]
    sampling: plan_pb2.Sampling
    output: list[int] = field(default_factory=list)
    logits: list[Float32Array] = field(default_factory=list)  # of each output token, [vocab_size]


class Story:
    """Drives one engine through plans, as the planner would."""

    untold: ClassVar[list["Story"]] = []  # whose engines may not be closed

    def __init__(self, kind: Kind, config: EngineConfig, library: Library | None = None) -> None:
        self.engine = make_recording_engine(kind, config, library)
        Story.untold.append(self)
        self.info: EngineInfo = self.engine.load(lambda _stage, _progress: None)
        self.engine.join(next(_meetings))
        self.engine.allocate(32)
        self.state = BatchState(MAX_NUM_SEQS, MAX_MODEL_LEN, BLOCK_SIZE, 32, self.info.vocab_size, 128)
        self.sequences: dict[int, Sequence] = {}
        self._generator = np.random.default_rng(7)
        self._free_blocks = self._generator.permutation(32).tolist()
        self._step_id = 0

    def new_sequence(self, slot: int, prompt_len: int, sampling: plan_pb2.Sampling = GREEDY) -> NewSequence:
        prompt = self._generator.integers(3, self.info.vocab_size, prompt_len).tolist()
        blocks = [self._free_blocks.pop() for _ in range(-(-prompt_len // BLOCK_SIZE))]
        self.sequences[slot] = Sequence(slot, prompt, blocks, sampling)
        return NewSequence(slot, np.array(prompt, np.int32), prompt_len, 0, np.array(blocks, np.int32), sampling)

    def step(self, rows: list[tuple[int, int, bool]] | None = None, new: tuple[NewSequence, ...] = ()) -> StepTimes:
        """Runs a step of rows (slot, tokens, whether it samples); None: the last step's rows decode."""
        planned = None
        if rows is not None:
            slots, counts, samples = zip(*rows, strict=True) if rows else ((), (), ())
            planned = Rows(np.array(slots, np.int32), np.array(counts, np.int32), np.array(samples, np.bool_))
        append_slots = [slot for slot, sequence in self.sequences.items() if sequence.output and self._is_full(slot)]
        append_blocks = [self._free_blocks.pop() for _ in append_slots]
        arrays = np.array(append_slots, np.int32), np.array(append_blocks, np.int32)
        plan = StepPlan(0, self._step_id, planned, np.zeros(0, np.int32), new, *arrays)
        self._step_id += 1
        batch = self.state.apply(plan)
        output = self.engine.launch(batch).resolve()
        assert output.token_ids.dtype == np.int32
        for slot, token, logits in zip(batch.sample_slots, output.token_ids, self.engine.recorded[-1], strict=True):
            self.sequences[int(slot)].output.append(int(token))
            self.sequences[int(slot)].logits.append(logits)
        return output.times

    def _is_full(self, slot: int) -> bool:
        """Whether the next token of a decoding sequence needs one more block."""
        return int(self.state.num_computed_tokens[slot]) == int(self.state.num_blocks[slot]) * BLOCK_SIZE


def tell(kind: Kind, config: EngineConfig, library: Library | None = None) -> Story:
    """Three sequences: one prefilled in chunks while others decode, one sampled at a temperature. Closes the engine.

    Args:
        library: other kernels for the compiled engine than the machine's best.
    """
    story = Story(kind, config, library)
    sampled = plan_pb2.Sampling(
        temperature=0.8, top_p=0.95, top_k=40, seed=11, min_tokens=3, suppressed_token_ids=pack_int32([2])
    )
    long, short = story.new_sequence(3, 70), story.new_sequence(0, 61)
    story.step([(3, 40, False), (0, 61, True)], (long, short))
    story.step([(0, 1, True), (3, 30, True), (5, 3, False)], (story.new_sequence(5, 5, sampled),))
    story.step([(5, 2, True), (3, 1, True), (0, 1, True)])
    for _ in range(NUM_DECODE_STEPS):
        story.step()
    story.engine.close()
    return story
