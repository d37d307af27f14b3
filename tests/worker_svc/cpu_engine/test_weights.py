"""Each rank packs its slices, together they are the model, and memory is bounded."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from albireo.model_spec import load_model_spec
from albireo_kernels.cpu import PANEL, Dtype, Library
from checkpoints import make_checkpoint
from worker_svc import checkpoint as checkpoint_files
from worker_svc.cpu_engine.weights import Linear, ModelWeights, load_weights
from worker_svc.sharding import shard_model

Array = NDArray[np.float32]
HEAD_DIM, NUM_HEADS, NUM_KV_HEADS = 16, 8, 2
LAYER = "model.layers.1."
BIASED = {"attention_bias": True, "mlp_bias": True, "hidden_size": 72, "intermediate_size": 88}


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("biased"), "llama", **BIASED)


def load(
    library: Library,
    path: Path,
    rank: int = 0,
    tp_size: int = 1,
    dtype: Dtype = Dtype.FLOAT32,
    linear_dtype: Dtype | None = None,
) -> ModelWeights:
    spec = load_model_spec(path)
    shard = shard_model(spec, rank, tp_size)
    return load_weights(
        spec, shard, library, dtype, dtype if linear_dtype is None else linear_dtype, lambda _stage, _progress: None
    )


def tensors_of(path: Path) -> dict[str, Array]:
    return {name: tensor.float().numpy() for name, tensor in load_file(path / "model.safetensors").items()}


def heads_of(rank: int, tp_size: int, count: int) -> slice:
    """The rows of a rank's part of ``count`` heads; with more ranks than heads, of the head that it shares."""
    first = rank * count // tp_size
    return slice(first * HEAD_DIM, (first + max(1, count // tp_size)) * HEAD_DIM)


def halves(array: Array, size: int) -> tuple[Array, Array]:
    """Gate and up, [I, ...] each, of packed outputs; what fills up their panels is zero."""
    by_panel = array.reshape(-1, 2, PANEL, *array.shape[1:])
    gate, up = (by_panel[:, half].reshape(-1, *array.shape[1:]) for half in range(2))
    assert not gate[size:].any()
    assert not up[size:].any()
    return gate[:size], up[:size]


def bias_of(linear: Linear) -> Array:
    assert linear.bias is not None
    return linear.bias


@pytest.mark.parametrize("max_elements", [2**24, 400])
@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_shards_are_the_whole(
    tp_size: int, max_elements: int, library: Library, biased: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Concatenated, the ranks' shards are the checkpoint, also where its parts come in a few rows at a time."""
    monkeypatch.setattr(checkpoint_files, "_MAX_ELEMENTS_AT_ONCE", max_elements)
    whole = tensors_of(biased)
    ranks = [load(library, biased, rank, tp_size) for rank in range(tp_size)]
    layers = [rank.layers[1] for rank in ranks]

    def assert_whole(name: str, parts: list[Array], axis: int = 0) -> None:
        np.testing.assert_array_equal(np.concatenate(parts, axis), whole[name])

    assert_whole("model.embed_tokens.weight", [rank.embedding.unpack() for rank in ranks])
    assert_whole("lm_head.weight", [rank.lm_head.weight.unpack() for rank in ranks])
    assert_whole(LAYER + "self_attn.o_proj.weight", [layer.output.weight.unpack() for layer in layers], 1)
    assert_whole(LAYER + "mlp.down_proj.weight", [layer.down.weight.unpack() for layer in layers], 1)
    for kind in ("weight", "bias"):
        pairs = [
            halves(layer.gate_up.weight.unpack() if kind == "weight" else bias_of(layer.gate_up), 88 // tp_size)
            for layer in layers
        ]
        assert_whole(LAYER + f"mlp.gate_proj.{kind}", [gate for gate, _ in pairs])
        assert_whole(LAYER + f"mlp.up_proj.{kind}", [up for _, up in pairs])
        q, k, v = (whole[LAYER + f"self_attn.{name}_proj.{kind}"] for name in "qkv")
        for rank, layer in enumerate(layers):
            heads, kv_heads = heads_of(rank, tp_size, NUM_HEADS), heads_of(rank, tp_size, NUM_KV_HEADS)
            packed = layer.qkv.weight.unpack() if kind == "weight" else bias_of(layer.qkv)
            np.testing.assert_array_equal(packed, np.concatenate((q[heads], k[kv_heads], v[kv_heads])))
    np.testing.assert_array_equal(ranks[-1].final_norm, whole["model.norm.weight"])
    np.testing.assert_array_equal(layers[-1].mlp_norm, whole[LAYER + "post_attention_layernorm.weight"])


def test_heads_that_fill_no_panels(library: Library, tmp_path: Path) -> None:
    """Queries, keys and values then begin in the middle of one."""
    make_checkpoint(tmp_path, "qwen3", num_heads=3, num_kv_heads=1, head_dim=12)
    whole, layer = tensors_of(tmp_path), load(library, tmp_path).layers[1]
    stacked = np.concatenate([whole[LAYER + f"self_attn.{name}_proj.weight"] for name in "qkv"])
    assert stacked.shape == (60, 64)
    np.testing.assert_array_equal(layer.qkv.weight.unpack(), stacked)
    np.testing.assert_array_equal(layer.q_norm, whole[LAYER + "self_attn.q_norm.weight"])


def test_biases_of_sums_are_on_rank_0_only(library: Library, biased: Path) -> None:
    first, second = (load(library, biased, rank, 2).layers[0] for rank in range(2))
    np.testing.assert_array_equal(first.output.bias, tensors_of(biased)["model.layers.0.self_attn.o_proj.bias"])
    assert first.down.bias is not None
    assert second.output.bias is None
    assert second.down.bias is None


def test_a_rank_without_ids(library: Library, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", vocab_size=268, num_heads=16, num_kv_heads=16)
    weights = load(library, tmp_path, 15, 16)
    assert weights.embedding.num_out == weights.lm_head.weight.num_out == 0


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.BFLOAT16])
def test_weights_are_converted(stored: torch.dtype, dtype: Dtype, library: Library, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3", dtype=stored)
    exact, weight = tensors_of(tmp_path), load(library, tmp_path, dtype=dtype).layers[1].down.weight
    expected = torch.from_numpy(exact[LAYER + "mlp.down_proj.weight"])
    assert weight.dtype is dtype
    if dtype is Dtype.BFLOAT16:
        expected = expected.bfloat16().float()
    np.testing.assert_array_equal(weight.unpack(), expected.numpy())


def test_tied_embeddings_are_one_matrix_unless_one_is_quantized(library: Library, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3", tie=True)
    weights = load(library, tmp_path)
    assert weights.lm_head.weight is weights.embedding
    weights = load(library, tmp_path, linear_dtype=Dtype.INT8)
    assert (weights.embedding.dtype, weights.lm_head.weight.dtype) == (Dtype.FLOAT32, Dtype.INT8)
    exact = weights.embedding.unpack()
    steps = np.abs(exact).max(axis=1, keepdims=True) / 127
    assert (np.abs(weights.lm_head.weight.unpack() - exact) <= 0.501 * steps).all()


def test_quantized_layers(library: Library, biased: Path) -> None:
    exact, quantized = (load(library, biased, linear_dtype=dtype).layers[0] for dtype in (Dtype.FLOAT32, Dtype.INT8))
    for name in ("qkv", "output", "gate_up", "down"):
        was, became = getattr(exact, name), getattr(quantized, name)
        steps = np.abs(was.weight.unpack()).max(axis=1, keepdims=True) / 127
        assert (np.abs(became.weight.unpack() - was.weight.unpack()) <= 0.501 * steps).all()
        np.testing.assert_array_equal(became.bias, was.bias)


@pytest.mark.parametrize("linear_dtype", [Dtype.BFLOAT16, Dtype.INT8])
def test_progress_grows_to_one(linear_dtype: Dtype, library: Library, tmp_path: Path) -> None:
    spec = load_model_spec(make_checkpoint(tmp_path, "qwen3", tie=True))
    for rank in range(2):
        reports: list[tuple[str, float]] = []
        load_weights(
            spec,
            shard_model(spec, rank, 2),
            library,
            Dtype.BFLOAT16,
            linear_dtype,
            lambda *report: reports.append(report),  # noqa: B023
        )
        fractions = [fraction for _, fraction in reports]
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1.0
