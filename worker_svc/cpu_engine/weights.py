"""Reads one rank's weights and packs them for the kernels, a part of a tensor at a time."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401  # numpy reads bfloat16 with it
import numpy as np

from albireo.arrays import Float32Array
from albireo.model_spec import ModelSpec
from albireo_kernels.cpu import PANEL, Dtype, Library, Matrix
from worker_svc.checkpoint import EMBEDDING, FINAL_NORM, LM_HEAD, Checkpoint, LinearSlices, layer_slices
from worker_svc.engine import Progress
from worker_svc.sharding import ModelShard


@dataclass(frozen=True, slots=True)
class Linear:
    """weight [out, in], packed; bias [out], in the order of the packed outputs."""

    weight: Matrix
    bias: Float32Array | None = None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's weights on one rank; H and KVH count the rank's heads, I its MLP columns.

    Attributes:
        attention_norm, mlp_norm: [hidden].
        qkv: [(H + 2 KVH) * head_dim, hidden], queries, keys, values.
        q_norm, k_norm: [head_dim], where the model has them.
        output: [hidden, H * head_dim].
        gate_up: [2 * I, hidden], each I filled up to whole panels; panels of gate and up alternate.
        down: [hidden, I].
    """

    attention_norm: Float32Array
    qkv: Linear
    q_norm: Float32Array | None
    k_norm: Float32Array | None
    output: Linear
    mlp_norm: Float32Array
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """``embedding`` and ``lm_head`` [ids of the shard, hidden] are one matrix when the model ties them and both are of
    one type.

    Attributes:
        linear_dtype: of all linear layers' weights, ``lm_head`` included.
    """

    embedding: Matrix
    layers: tuple[LayerWeights, ...]
    final_norm: Float32Array
    lm_head: Linear
    linear_dtype: Dtype


def load_weights(
    spec: ModelSpec, shard: ModelShard, library: Library, dtype: Dtype, linear_dtype: Dtype, report: Progress
) -> ModelWeights:
    """Loads the weights of one rank; raises ConfigError as `Checkpoint` does.

    Args:
        dtype: of the embedding.
        linear_dtype: the same, or INT8: linear layers are quantised by output.
    """
    packer = _Packer(Checkpoint(spec, "np", report), library, linear_dtype)
    embedding = packer.matrix(EMBEDDING, shard.vocab, dtype)
    layers = tuple(_load_layer(packer, spec, shard, index) for index in range(spec.num_layers))
    final_norm = packer.vector(FINAL_NORM)
    if spec.tie_word_embeddings and linear_dtype is dtype:
        lm_head = embedding
    else:
        name = EMBEDDING if spec.tie_word_embeddings else LM_HEAD
        lm_head = packer.matrix(name, shard.vocab, linear_dtype)
    return ModelWeights(embedding, layers, final_norm, Linear(lm_head), linear_dtype)


def _load_layer(packer: "_Packer", spec: ModelSpec, shard: ModelShard, index: int) -> LayerWeights:
    slices = layer_slices(spec, shard, index)
    return LayerWeights(
        attention_norm=packer.vector(slices.prefix + "input_layernorm.weight"),
        qkv=packer.stacked(slices.qkv),
        q_norm=packer.vector(slices.prefix + "self_attn.q_norm.weight") if spec.qk_norm else None,
        k_norm=packer.vector(slices.prefix + "self_attn.k_norm.weight") if spec.qk_norm else None,
        output=packer.stacked(slices.output),
        mlp_norm=packer.vector(slices.prefix + "post_attention_layernorm.weight"),
        gate_up=packer.interleaved(slices.gate_up),
        down=packer.stacked(slices.down),
    )


class _Packer:
    """Packs slices of a checkpoint's tensors, in memory bounded by what `Checkpoint.read` gives at once."""

    def __init__(self, checkpoint: Checkpoint, library: Library, linear_dtype: Dtype) -> None:
        self._checkpoint = checkpoint
        self._library = library
        self._linear_dtype = linear_dtype

    def vector(self, name: str, rows: range | None = None) -> Float32Array:
        parts = [np.asarray(part, dtype=np.float32) for _, part in self._checkpoint.read(name, rows)]
        return np.concatenate(parts)

    def matrix(self, name: str, rows: range, dtype: Dtype) -> Matrix:
        """Some rows of a tensor."""
        target = Matrix(self._library, dtype, len(rows), self._checkpoint.shape(name)[1])
        _pack(target, self._parts(name, rows))
        return target

    def stacked(self, slices: LinearSlices) -> Linear:
        """A layer's parts as outputs one after the other."""
        weight = Matrix(self._library, self._linear_dtype, slices.num_outputs, len(slices.columns))
        _pack(
            weight,
            (part for name, rows in slices.parts for part in self._parts(name + ".weight", rows, slices.columns)),
        )
        if not slices.has_bias:
            return Linear(weight)
        return Linear(weight, np.concatenate([self.vector(name + ".bias", rows) for name, rows in slices.parts]))

    def interleaved(self, slices: LinearSlices) -> Linear:
        """A layer's parts, which are of one size, as panels by turns."""
        num_parts = len(slices.parts)
        num_panels = -(-slices.num_outputs // num_parts // PANEL)
        num_outputs = num_parts * num_panels * PANEL
        weight = Matrix(self._library, self._linear_dtype, num_outputs, len(slices.columns))
        biases = np.zeros((num_parts, num_panels * PANEL), dtype=np.float32)
        for index, (name, rows) in enumerate(slices.parts):
            _pack(weight, self._parts(name + ".weight", rows, slices.columns), index, num_parts)
            if slices.has_bias:
                biases[index, : len(rows)] = self.vector(name + ".bias", rows)
        if not slices.has_bias:
            return Linear(weight)
        by_panel = biases.reshape(num_parts, num_panels, PANEL).transpose(1, 0, 2)
        return Linear(weight, np.ascontiguousarray(by_panel).reshape(num_outputs))

    def _parts(self, name: str, rows: range, columns: range | None = None) -> Iterator[Any]:
        return (part for _, part in self._checkpoint.read(name, rows, columns))


def _pack(target: Matrix, parts: Iterable[Any], first_panel: int = 0, panel_step: int = 1) -> None:
    """Packs rows that come in parts of any size. A panel is packed as a whole, so rows may have to wait for more."""
    waiting = None
    for part in parts:
        rows = part if waiting is None else np.concatenate((waiting, part))
        num_whole = len(rows) // PANEL * PANEL
        if num_whole:
            target.pack_into(rows[:num_whole], first_panel, panel_step)
            first_panel += num_whole // PANEL * panel_step
        waiting = rows[num_whole:].copy() if num_whole < len(rows) else None
    if waiting is not None:
        target.pack_into(waiting, first_panel, panel_step)
