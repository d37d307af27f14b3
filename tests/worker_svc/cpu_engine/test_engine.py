"""What the compiled engine does as others do not: it queues steps, shares cores, is aborted, quantises. What it
computes is tested with the eager engine, in ../test_engines.py and ../test_engine_models.py."""

import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_story import MAX_MODEL_LEN, MAX_NUM_SEQS, Story, engine_config, tell

from albireo.errors import ConfigError, GroupError
from albireo.plan import NewSequence, Rows, StepPlan
from albireo.v1 import plan_pb2
from albireo_kernels.cpu import Dtype, Isa, Library, detect_isa, load_library
from checkpoints import make_checkpoint
from worker_svc.batch import BatchState, InputBatch
from worker_svc.cpu_engine.engine import CpuEngine, cores_of_rank
from worker_svc.engine import BLOCK_SIZE, PendingStep

PROMPT = np.arange(5, 55, dtype=np.int32)
NUM_BLOCKS = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "qwen3")


@pytest.fixture
def engines(library: Library, checkpoint: Path, tmp_path: Path) -> Iterator[list[CpuEngine]]:
    """Two ranks, loaded, in one process."""
    ranks = [CpuEngine(engine_config(checkpoint, tmp_path, rank, 2), library) for rank in range(2)]
    for rank in ranks:
        rank.load(lambda _stage, _progress: None)
    yield ranks
    for rank in ranks:
        rank.close()


def meet(engines: list[CpuEngine], meeting: int) -> None:
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda engine: engine.join(meeting), engines))
    for engine in engines:
        engine.allocate(NUM_BLOCKS)


def batches(num_steps: int) -> list[InputBatch]:
    """All of PROMPT, then decode steps; made by one rank's batch state, as all ranks make the same."""
    state = BatchState(MAX_NUM_SEQS, MAX_MODEL_LEN, BLOCK_SIZE, NUM_BLOCKS, 1003, 128)
    new = NewSequence(2, PROMPT, len(PROMPT), 0, np.array([3, 1, 6], np.int32), plan_pb2.Sampling(top_p=1))
    rows = Rows(np.array([2], np.int32), np.array([len(PROMPT)], np.int32), np.ones(1, dtype=bool))
    plans = [StepPlan(1, 0, rows, new_sequences=(new,)), *(StepPlan(1, step, None) for step in range(1, num_steps))]
    return [state.apply(plan) for plan in plans]


def tokens_of(steps: list[PendingStep]) -> list[int]:
    return [int(step.resolve().token_ids[0]) for step in steps]


def run_steps(engines: list[CpuEngine], num_steps: int) -> list[int]:
    """Tokens of steps that are all queued before the first is waited for; the same on all ranks."""
    launched = [[engine.launch(batch) for batch in batches(num_steps)] for engine in engines]
    by_rank = [tokens_of(steps) for steps in launched]
    assert by_rank == by_rank[:1] * len(engines)
    return by_rank[0]


def test_steps_are_queued_and_run_one_after_the_other(library: Library, checkpoint: Path, tmp_path: Path) -> None:
    """A step reads the token that the one before it has sampled, and their times do not overlap."""
    engine = CpuEngine(engine_config(checkpoint, tmp_path), library)
    engine.load(lambda _stage, _progress: None)
    engine.join(1)
    engine.allocate(NUM_BLOCKS)
    one_by_one = [int(engine.launch(batch).resolve().token_ids[0]) for batch in batches(12)]
    steps = [engine.launch(batch) for batch in batches(12)]
    outputs = [step.resolve() for step in steps]
    assert [int(output.token_ids[0]) for output in outputs] == one_by_one
    for output, following in itertools.pairwise(outputs):
        assert output.times.start_at_ns < output.times.end_at_ns <= following.times.start_at_ns
    for output in outputs:
        times = output.times
        assert times.end_at_ns - times.start_at_ns == times.forward_ns + times.sample_ns
        assert times.forward_ns > 0 < times.sample_ns
    engine.close()


def test_logits_of_a_step_that_samples_nothing(library: Library, checkpoint: Path, tmp_path: Path) -> None:
    engine = CpuEngine(engine_config(checkpoint, tmp_path), library)
    engine.load(lambda _stage, _progress: None)
    engine.join(1)
    engine.allocate(NUM_BLOCKS)
    for batch in batches(4):
        logits = engine.logits(batch)
        assert logits.shape == (1, 1003)
        assert int(engine.launch(batch).resolve().token_ids[0]) == logits[0].argmax()
    engine.close()


def test_the_cache_is_kept_for_the_next_group_if_it_fits(engines: list[CpuEngine]) -> None:
    meet(engines, 1)
    tokens, cache = run_steps(engines, 5), engines[0]._kv[0]
    for meeting in (2, 3):
        for engine in engines:
            engine.leave()
        meet(engines, meeting)
        assert engines[0]._kv[0] is cache
        assert run_steps(engines, 5) == tokens
    engines[0].allocate(NUM_BLOCKS + 1)
    assert engines[0]._kv[0] is not cache


def test_time_in_collectives_is_told(engines: list[CpuEngine]) -> None:
    meet(engines, 1)
    first = engines[0].launch(batches(1)[0])
    time.sleep(0.5)
    engines[1].launch(batches(1)[0]).resolve()
    times = first.resolve().times
    assert 0.05e9 < times.collective_ns <= times.forward_ns + times.sample_ns


@pytest.mark.parametrize("alone", [0, 1])
def test_an_aborted_step_raises_and_the_next_group_is_unharmed(alone: int, engines: list[CpuEngine]) -> None:
    """The other rank never begins its step; of the aborted one, two more wait in the queue."""
    meet(engines, 1)
    tokens = run_steps(engines, 5)
    waiting = [engines[alone].launch(batch) for batch in batches(3)]
    threading.Timer(0.2, engines[alone].abort).start()
    start = time.monotonic()
    for step in waiting:
        with pytest.raises(GroupError):
            step.resolve()
    assert 0.1 < time.monotonic() - start < 3
    for engine in engines:
        engine.leave()
    meet(engines, 2)
    assert run_steps(engines, 5) == tokens


def test_another_thread_ends_the_wait_in_a_meeting(engines: list[CpuEngine]) -> None:
    """Rank 0 waits for the other's device, rank 1 for the memory that they are to share."""
    for engine in engines:
        threading.Timer(0.2, engine.abort).start()
        start = time.monotonic()
        with pytest.raises(GroupError):
            engine.join(1)
        assert time.monotonic() - start < 3
        engine.leave()
    meet(engines, 2)
    assert run_steps(engines, 3)


def errors_of(exact: Story, *others: Story) -> list[float]:
    """How far the logits of each story are from the exact ones, as parts of their spread: after equal tokens, and once
    more."""
    errors: list[list[float]] = []
    for slot, sequence in exact.sequences.items():
        told = [sequence, *(story.sequences[slot] for story in others)]
        outputs = zip(*(each.output for each in told), strict=False)
        num_equal = sum(1 for _ in itertools.takewhile(lambda tokens: len(set(tokens)) == 1, outputs))
        for true, *theirs in zip(*(each.logits[: num_equal + 1] for each in told), strict=False):
            errors.append([float(np.std(logits - true) / np.std(true)) for logits in theirs])
    assert len(errors) >= 3
    return [float(error) for error in np.sqrt(np.mean(np.square(errors), axis=0))]


def levels() -> list[tuple[Isa, bool]]:
    """Instruction sets, and whether they are emulated."""
    emulated = [(isa, True) for isa in (Isa.AVX512, Isa.AMX) if isa > detect_isa()]
    return [*((isa, False) for isa in Isa if isa <= detect_isa()), *emulated]


@pytest.mark.parametrize("level", levels(), ids=lambda level: level[0].name.lower())
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_rounded_models_stay_near_float32(name: str, level: tuple[Isa, bool], tmp_path: Path) -> None:
    """In bfloat16, engines round at different places: the compiled one less often, so it is not farther from float32.
    In W8A8 the error is a few hundredths."""
    library = load_library(level[0], emulate=level[1])
    sizes = {"num_heads": 8, "num_kv_heads": 4, "hidden_size": 128, "intermediate_size": 200, "tie": True}
    make_checkpoint(tmp_path, name, dtype=torch.bfloat16, **sizes)  # type: ignore[arg-type]
    exact = tell("eager", engine_config(tmp_path, tmp_path, dtype="float32"))
    eager = tell("eager", engine_config(tmp_path, tmp_path))
    compiled = tell("compiled", engine_config(tmp_path, tmp_path), library)
    quantized = tell("compiled", engine_config(tmp_path, tmp_path, quantize="w8a8"), library)
    error_of_eager, error_of_compiled = errors_of(exact, eager, compiled)
    assert 0.001 < error_of_compiled < 1.1 * error_of_eager < 0.02
    (error_of_quantized,) = errors_of(exact, quantized)
    assert 0.001 < error_of_quantized < 0.06


def test_w8a8_ranks_agree(library: Library, checkpoint: Path, tmp_path: Path) -> None:
    configs = [engine_config(checkpoint, tmp_path, rank, 2, quantize="w8a8") for rank in range(2)]
    ranks = [CpuEngine(config, library) for config in configs]
    for rank in ranks:
        rank.load(lambda _stage, _progress: None)
        assert rank._model.weights.lm_head.weight.dtype is Dtype.INT8
        assert rank._model.weights.embedding.dtype is Dtype.FLOAT32
    meet(ranks, 1)
    assert len(run_steps(ranks, 6)) == 6
    for rank in ranks:
        rank.close()


def test_unknown_models_end_the_start(library: Library, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        CpuEngine(engine_config(tmp_path, tmp_path), library).load(lambda _stage, _progress: None)


def test_heads_that_the_kernels_have_no_room_for_end_the_start(
    library: Library, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker_svc.cpu_engine.engine.MAX_HEAD_DIM", 8)
    engine = CpuEngine(engine_config(checkpoint, tmp_path), library)
    with pytest.raises(ConfigError, match="room for 32 of 8: use --eager"):
        engine.load(lambda _stage, _progress: None)
    engine.close()


def test_ranks_share_the_cores() -> None:
    assert [cores_of_rank([0, 1], rank, 2) for rank in range(2)] == [[0], [1]]
    assert cores_of_rank([3, 5, 9], 0, 1) == [3, 5, 9]
    assert [cores_of_rank([3, 5, 9], rank, 2) for rank in range(2)] == [[3], [5, 9]]
    assert [cores_of_rank([0, 1], rank, 4) for rank in range(4)] == [[-1]] * 4


def test_no_torch(tmp_path: Path) -> None:
    """A rank that runs compiled kernels imports none of it, from its start to its steps."""
    code = f"""
import sys
sys.modules["torch"] = None
sys.path += {[str(path) for path in (Path(__file__).parent.parent, Path(__file__).parent.parent.parent)]!r}
from pathlib import Path
import numpy as np
from engine_story import engine_config
from worker_svc.config import WorkerConfig
from worker_svc.rank import make_engine
config, engine = make_engine(WorkerConfig(tp=1, rank=0, device="cpu"), Path({str(tmp_path)!r}), print)
engine.load(lambda stage, progress: None)
engine.join(1)
engine.allocate(4)
engine.close()
assert engine.name == "compiled"
assert not any(name.split(".")[0] in ("torch", "transformers") and module for name, module in sys.modules.items())
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
