"""The engines' logits are those of transformers, for every family, through chunks, decodes and ranks."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_story import Kind, Story, engine_config, tell
from torch import Tensor
from transformers import AutoModelForCausalLM

from checkpoints import make_checkpoint

# "biased" is a Llama with every bias it can have: those after all-reduces must be added once. Its sizes are no
# multiples of what kernels work on at once.
CHECKPOINTS = ("llama", "biased", "mistral", "qwen2", "qwen3")
BIASED = {"attention_bias": True, "mlp_bias": True, "hidden_size": 72, "intermediate_size": 88}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of checkpoints: Llama with llama3 rope, a sliding window below the prompts' lengths, tied and not."""
    root = tmp_path_factory.mktemp("checkpoints")
    make_checkpoint(root / "llama", "llama", seed=1)
    make_checkpoint(root / "biased", "llama", seed=2, **BIASED)
    make_checkpoint(root / "mistral", "mistral", seed=3)
    make_checkpoint(root / "qwen2", "qwen2", seed=4, tie=True)
    make_checkpoint(root / "qwen3", "qwen3", seed=5, tie=True)
    return root


@pytest.fixture(scope="module", params=["eager", "compiled"])
def kind(request: pytest.FixtureRequest) -> Kind:
    torch.set_num_threads(1)  # the tensors are tiny, and ranks share the machine
    found: Kind = request.param
    return found


@pytest.fixture(scope="module")
def stories(kind: Kind, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Story]:
    """Told by one rank, in this process."""
    run_dir = tmp_path_factory.mktemp("run")
    return {name: tell(kind, engine_config(checkpoints / name, run_dir)) for name in CHECKPOINTS}


@pytest.fixture(scope="module")
def expected_logits(checkpoints: Path, stories: dict[str, Story]) -> dict[str, dict[int, Tensor]]:
    """Of transformers, for the sequences that the single rank made: by checkpoint and slot, [outputs, vocab_size]."""
    expected = {}
    for name, story in stories.items():
        model = AutoModelForCausalLM.from_pretrained(checkpoints / name, attn_implementation="eager").eval()
        with torch.inference_mode():
            expected[name] = {
                slot: model(torch.tensor([sequence.prompt + sequence.output])).logits[0, len(sequence.prompt) - 1 : -1]
                for slot, sequence in story.sequences.items()
            }
    return expected


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_one_rank_agrees_with_transformers(
    name: str, stories: dict[str, Story], expected_logits: dict[str, dict[int, Tensor]]
) -> None:
    for slot, sequence in stories[name].sequences.items():
        assert len(sequence.output) >= 7
        actual = torch.from_numpy(np.stack(sequence.logits))
        assert actual.dtype == torch.float32
        assert 1.0 < actual.std() < 4.0
        torch.testing.assert_close(actual, expected_logits[name][slot], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_greedy_and_sampled_sequences(name: str, stories: dict[str, Story]) -> None:
    """Greedy ones take the best token; the sampled one obeys top-k, and no end before min_tokens."""
    for slot, sequence in stories[name].sequences.items():
        steps = zip(sequence.output, sequence.logits, strict=True)
        num_better = [int((logits > logits[token]).sum()) for token, logits in steps]
        assert max(num_better) < 41 if slot == 5 else max(num_better) == 0
    assert 2 not in stories[name].sequences[5].output[:3]


@pytest.fixture(scope="module")
def ranks_output(kind: Kind, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What groups of 4 and 2 processes wrote; left-overs of a group that died lie in their directories."""
    output = tmp_path_factory.mktemp("ranks")
    for size in (4, 2):
        (output / str(size)).mkdir()
        (output / str(size) / "torch-meeting-place").write_text("torch-rendezvous-dead", encoding="utf-8")
        (output / str(size) / "torch-rendezvous-dead").write_bytes(b"\0" * 100)
        (output / str(size) / "compiled-meeting-0000000000000001").write_text("/proc/1/fd/1000", encoding="ascii")
    command = [sys.executable, str(Path(__file__).with_name("rank_process.py"))]
    arguments = [str(output), *(str(checkpoints / name) for name in CHECKPOINTS)]
    processes = [subprocess.Popen([*command, kind, str(rank), *arguments], stderr=subprocess.PIPE) for rank in range(4)]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=200)
            assert process.returncode == 0, errors.decode()
            assert b"destroy_process_group" not in errors, "the group was not left"
    finally:
        for process in processes:
            process.kill()
    assert not list(output.rglob("compiled-meeting-*")) or kind == "eager"
    return output


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_agree_with_transformers_and_with_each_other(
    size: int, ranks_output: Path, stories: dict[str, Story], expected_logits: dict[str, dict[int, Tensor]]
) -> None:
    """The logits agree, and with them the tokens, greedy and sampled, of all ranks at every TP degree."""
    directory = ranks_output / str(size)
    for name in CHECKPOINTS:
        outputs = {str(slot): sequence.output for slot, sequence in stories[name].sequences.items()}
        by_rank = [json.loads((directory / f"{name}-{rank}.json").read_text()) for rank in range(size)]
        assert by_rank == [outputs] * size
        for slot, logits in np.load(directory / f"{name}.npz").items():
            torch.testing.assert_close(torch.from_numpy(logits), expected_logits[name][int(slot)], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["eager"], indirect=True, scope="module")  # the other's are operations of its programs
@pytest.mark.parametrize("size", [2, 4])
def test_collectives_sum_and_join_unequal_shards(size: int, ranks_output: Path) -> None:
    expected = {
        "total": [[sum(10.0**rank for rank in range(size))] * 3] * 2,
        "half": [[2.0**size - 1] * 3],
        "joined": [[float(rank) for rank, width in enumerate([2, 0, 1, 3][:size]) for _ in range(width)]] * 2,
    }
    for rank in range(size):
        result = json.loads((ranks_output / str(size) / f"collectives-{rank}.json").read_text())
        assert result == expected
