"""What is wrong with a checkpoint is named, and its tensors are read slice by slice in either framework."""

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes  # noqa: F401  # numpy reads bfloat16 with it
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from albireo.errors import ConfigError
from albireo.model_spec import load_model_spec
from checkpoints import make_checkpoint
from worker_svc import checkpoint as checkpoint_files
from worker_svc.checkpoint import Checkpoint, Framework

LAYER = "model.layers.1."


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of its own for a test that damages it."""
    return make_checkpoint(tmp_path, "qwen3")


def load(path: Path, framework: Framework = "np") -> Checkpoint:
    return Checkpoint(load_model_spec(path), framework, lambda _stage, _progress: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("framework", ["pt", "np"])
def test_parts_make_up_the_slice(
    framework: Framework, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_files, "_MAX_ELEMENTS_AT_ONCE", 200)
    tensors = load_file(make_checkpoint(tmp_path, "qwen3", dtype=dtype) / "model.safetensors")
    reader, name = load(tmp_path, framework), LAYER + "mlp.down_proj.weight"
    assert reader.shape(name) == (64, 96)
    for rows, columns in ((None, None), (range(7, 50), None), (None, range(3, 40)), (range(5, 5), None)):
        parts = list(reader.read(name, rows, columns))
        expected = tensors[name][slice(None) if rows is None else slice(rows.start, rows.stop)]
        expected = expected[:, slice(None) if columns is None else slice(columns.start, columns.stop)].float().numpy()
        starts = [start for start, _ in parts]
        assert starts == np.cumsum([0, *(len(part) for _, part in parts)])[:-1].tolist()
        arrays = [part.float().numpy() if isinstance(part, Tensor) else part.astype(np.float32) for _, part in parts]
        np.testing.assert_array_equal(np.concatenate([expected[:0], *arrays]), expected)
        assert len(parts) != 1


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_old_rope_tables_are_ignored(checkpoint: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(checkpoint, lambda tensors: tensors.update({name: torch.ones(8)}))
    load(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(LAYER + "mlp.up_proj.weight"), r"up_proj\.weight is in none of the model's safetensors files"),
        (
            lambda t: t.update({LAYER + "mlp.up_proj.weight": torch.zeros(96, 63)}),
            r"model\.safetensors: tensor model\.layers\.1\.mlp\.up_proj\.weight has shape \[96, 63\].* \[96, 64\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int64)}),
            r"model\.safetensors: tensor model\.norm\.weight is of type I64",
        ),
        (
            lambda t: t.update({LAYER + "self_attn.q_proj.bias": torch.zeros(128)}),
            r"model\.safetensors: tensor .*q_proj\.bias has no place",
        ),
    ],
)
def test_wrong_tensors_are_named(change: Callable[[dict[str, Tensor]], object], message: str, checkpoint: Path) -> None:
    rewrite(checkpoint, change)
    with pytest.raises(ConfigError, match=message):
        load(checkpoint)


def test_no_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load(checkpoint)


def test_a_damaged_file(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ConfigError, match=r"model\.safetensors: cannot be opened"):
        load(checkpoint)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("no json", "not an index"),
        ("[]", "not an index"),
        ('{"weight_map": {"a": 3}}', "not an index"),
        (json.dumps({"weight_map": {"a": "../b.safetensors"}}), "not a file of the model's directory"),
        (json.dumps({"weight_map": {"a": "absent.safetensors"}}), r"absent\.safetensors: cannot be opened"),
        (json.dumps({"weight_map": {"a": "model.safetensors"}}), "tensor a is missing, though the index"),
    ],
)
def test_a_wrong_index(index: str, message: str, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load(checkpoint)
