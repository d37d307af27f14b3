"""Each rank reads its slices, and together they are the model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from albireo.model_spec import ModelSpec, load_model_spec
from checkpoints import make_checkpoint
from worker_svc import checkpoint as checkpoint_files
from worker_svc.sharding import shard_model
from worker_svc.torch_engine.loader import load_weights
from worker_svc.torch_engine.model import ModelWeights

CPU = torch.device("cpu")
HEAD_DIM = 16
NUM_HEADS, NUM_KV_HEADS = 8, 2
LAYER = "model.layers.1."


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("biased"), "llama", attention_bias=True, mlp_bias=True)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of its own for a test that damages it."""
    return make_checkpoint(tmp_path, "qwen3")


def load(path: Path, rank: int = 0, tp_size: int = 1, dtype: torch.dtype = torch.float32) -> ModelWeights:
    spec = load_model_spec(path)
    return load_weights(spec, shard_model(spec, rank, tp_size), dtype, CPU, lambda _stage, _progress: None)


def heads_of(rank: int, tp_size: int, count: int) -> slice:
    """The rows of a rank's part of ``count`` heads; with more ranks than heads, of the head that it shares."""
    first = rank * count // tp_size
    return slice(first * HEAD_DIM, (first + max(1, count // tp_size)) * HEAD_DIM)


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_shards_are_the_whole(tp_size: int, biased: Path) -> None:
    """Concatenated, the ranks' shards are the checkpoint; past the number of KV heads, ranks share them."""
    whole = load_file(biased / "model.safetensors")
    ranks = [load(biased, rank, tp_size) for rank in range(tp_size)]
    assert torch.cat([rank.embedding for rank in ranks]).equal(whole["model.embed_tokens.weight"])
    assert torch.cat([rank.lm_head.weight for rank in ranks]).equal(whole["lm_head.weight"])
    layers = [rank.layers[1] for rank in ranks]
    assert torch.cat([layer.output.weight for layer in layers], 1).equal(whole[LAYER + "self_attn.o_proj.weight"])
    assert torch.cat([layer.down.weight for layer in layers], 1).equal(whole[LAYER + "mlp.down_proj.weight"])
    for kind in ("weight", "bias"):
        gate_up = [getattr(layer.gate_up, kind).chunk(2) for layer in layers]
        assert torch.cat([gate for gate, _ in gate_up]).equal(whole[LAYER + f"mlp.gate_proj.{kind}"])
        assert torch.cat([up for _, up in gate_up]).equal(whole[LAYER + f"mlp.up_proj.{kind}"])
        q, k, v = (whole[LAYER + f"self_attn.{name}_proj.{kind}"] for name in "qkv")
        for rank, layer in enumerate(layers):
            heads, kv_heads = heads_of(rank, tp_size, NUM_HEADS), heads_of(rank, tp_size, NUM_KV_HEADS)
            assert getattr(layer.qkv, kind).equal(torch.cat((q[heads], k[kv_heads], v[kv_heads])))


def test_biases_after_an_all_reduce_are_on_rank_0_only(biased: Path) -> None:
    first, second = (load(biased, rank, 2).layers[0] for rank in range(2))
    assert first.output.bias is not None
    assert first.down.bias is not None
    assert second.output.bias is None
    assert second.down.bias is None


def test_a_rank_reads_only_its_slices(biased: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_read = 0

    class RecordingSlice:
        def __init__(self, slices: Any) -> None:
            self.slices = slices

        def __getattr__(self, name: str) -> Any:
            return getattr(self.slices, name)

        def __getitem__(self, where: Any) -> Tensor:
            nonlocal num_read
            part: Tensor = self.slices[where]
            num_read += part.numel()
            return part

    open_file = checkpoint_files._open_file

    def open_recording(*args: Any) -> Iterator[tuple[str, Any]]:
        return ((name, RecordingSlice(slices)) for name, slices in open_file(*args))

    monkeypatch.setattr(checkpoint_files, "_open_file", open_recording)
    weights = load(biased, rank=3, tp_size=4)
    held = [weights.embedding, weights.lm_head.weight, weights.final_norm]
    for layer in weights.layers:
        held += [layer.attention_norm, layer.mlp_norm, layer.output.weight, layer.down.weight]
        for linear in (layer.qkv, layer.gate_up):
            assert linear.bias is not None
            held += [linear.weight, linear.bias]
    assert num_read == sum(tensor.numel() for tensor in held)


def test_an_empty_vocabulary_shard(tmp_path: Path) -> None:
    """268 ids in 67 tiles of four, five to a rank: the last two of 16 ranks have none."""
    make_checkpoint(tmp_path, "llama", vocab_size=268, num_heads=16, num_kv_heads=16)
    spec = load_model_spec(tmp_path)
    widths = shard_model(spec, 0, 16).vocab_widths
    assert widths[13:] == (8, 0, 0)
    for rank, width in enumerate(widths):
        assert load(tmp_path, rank, 16).embedding.shape == (width, 64)


def test_sharded_files_with_an_index(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "one", "qwen2", seed=9)
    make_checkpoint(tmp_path / "many", "qwen2", seed=9, max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = load(tmp_path / "one", 1, 2), load(tmp_path / "many", 1, 2)
    assert one.embedding.equal(many.embedding)
    for of_one, of_many in zip(one.layers, many.layers, strict=True):
        assert of_one.qkv.weight.equal(of_many.qkv.weight)
        assert of_one.down.weight.equal(of_many.down.weight)


def test_tied_embeddings_share_storage_even_when_the_file_has_both(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3", tie=True)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": torch.zeros(1, 2)}, file)
    weights = load(tmp_path)
    assert weights.lm_head.weight.data_ptr() == weights.embedding.data_ptr()


def test_weights_are_converted_to_the_dtype(checkpoint: Path) -> None:
    exact, rounded = load(checkpoint), load(checkpoint, dtype=torch.bfloat16)
    assert rounded.layers[0].down.weight.equal(exact.layers[0].down.weight.bfloat16())


def test_progress_grows_to_one(checkpoint: Path) -> None:
    reports: list[tuple[str, float]] = []
    spec: ModelSpec = load_model_spec(checkpoint)
    for rank in range(2):
        reports.clear()
        shard = shard_model(spec, rank, 2)
        load_weights(spec, shard, torch.float32, CPU, lambda *report: reports.append(report))
        fractions = [fraction for _, fraction in reports]
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1.0
