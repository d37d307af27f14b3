"""Samplers in processes of their own, over gloo."""

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from sampler_ranks import Ranks, vocab_shard

from albireo.logprobs import Logprobs
from albireo_kernels.reference import Params
from sampling_rows import NUM_SLOTS, SCHEMES, Row, make_batch, random_logits
from worker_svc.batch import History, InputBatch
from worker_svc.row_sampling import SlotSampling
from worker_svc.torch_engine.collectives import Rendezvous
from worker_svc.torch_engine.sampler import Sampler
from worker_svc.torch_engine.sampling.logprobs import unpack

CPU = torch.device("cpu")
VOCAB_SIZE, NUM_STEPS = 1003, 4
PENALISED = Params(frequency_penalty=1.3, repetition_penalty=1.2, bad_words=[[1, 2]], temperature=0.4, prompt=[3, 4, 5])
ROWS = [
    Row(Params(temperature=0.0), 0),
    Row(Params(seed=1), 0, 3),
    Row(Params(seed=2, top_k=30, top_p=0.9), 0),
    Row(Params(seed=3, top_p=0.8), 0),
    Row(PENALISED, 0, 0),
    Row(Params(seed=5, min_p=0.1, allowed=range(0, VOCAB_SIZE, 3)), 0, 5),
    Row(Params(seed=6, top_k=500, biases={7: -np.inf, 1000: 4.0}), 0),
]


def batches() -> list[InputBatch]:
    """One without a row comes first, as chunks of prompts do."""
    sampling, histories = SlotSampling(NUM_SLOTS, VOCAB_SIZE), []
    for slot, row in enumerate(ROWS):
        if sampling.set(slot, row.message):
            histories.append(History(slot, np.array(row.params.prompt, np.int32), len(row.params.prompt)))
    nothing = make_batch([], sampling, np.zeros(0, np.int64), histories)
    slots = range(len(ROWS))
    return [nothing, *(make_batch(slots, sampling, np.full(len(ROWS), step)) for step in range(NUM_STEPS))]


def logits_of(step: int, batch: InputBatch) -> torch.Tensor:
    return random_logits(np.random.default_rng(step), len(batch.sample_slots), VOCAB_SIZE, "normal")


def as_json(tokens: list[int], logprobs: Logprobs | None) -> object:
    return [tokens, None if logprobs is None else [array.tobytes().hex() for array in logprobs]]


def _run_rank(rank: int, run_dir: Path) -> None:
    torch.set_num_threads(1)
    rendezvous, shard = Rendezvous(rank, 2, run_dir, CPU), vocab_shard(rank, 2, VOCAB_SIZE)
    outcome = {}
    with torch.inference_mode():
        group = rendezvous.join(1)
        for scheme in SCHEMES:
            sampler, outcome[scheme] = Sampler(scheme, NUM_SLOTS, shard, CPU), []
            for step, batch in enumerate(batches()):
                logits = logits_of(step, batch)[:, shard.vocab.start : shard.vocab.stop].clone()
                sampled = sampler.sample(logits, batch, group)
                logprobs = None if sampled.logprobs is None else unpack(sampled.logprobs.numpy(), batch.sampling)
                outcome[scheme].append(as_json(sampled.tokens.tolist(), logprobs))
        assert group.elapsed_ns > 0
        rendezvous.leave()
    (run_dir / f"{rank}.json").write_text(json.dumps(outcome))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What two ranks sampled, by rank and scheme."""
    run_dir = tmp_path_factory.mktemp("run")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_run_rank, args=(rank, run_dir)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
    return [json.loads((run_dir / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_two_processes_sample_what_one_rank_does(scheme: str, outcomes: list[dict]) -> None:
    alone = Ranks("merge", 1, VOCAB_SIZE)
    expected = [as_json(*alone.sample(logits_of(step, batch), batch)) for step, batch in enumerate(batches())]
    assert [of_rank[scheme] for of_rank in outcomes] == [expected] * 2
