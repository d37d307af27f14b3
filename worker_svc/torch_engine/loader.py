"""Makes one rank's weights, as torch's tensors, of a checkpoint's slices."""

import torch
from torch import Tensor

from albireo.model_spec import ModelSpec
from worker_svc.checkpoint import EMBEDDING, FINAL_NORM, LM_HEAD, Checkpoint, LinearSlices, layer_slices
from worker_svc.engine import Progress
from worker_svc.sharding import ModelShard
from worker_svc.torch_engine.model import LayerWeights, Linear, ModelWeights


def load_weights(
    spec: ModelSpec, shard: ModelShard, dtype: torch.dtype, device: torch.device, report: Progress
) -> ModelWeights:
    """Loads the weights of one rank; raises ConfigError as `Checkpoint` does."""
    reader = _Reader(Checkpoint(spec, "pt", report), dtype, device)
    embedding = reader.read(EMBEDDING, shard.vocab)
    return ModelWeights(
        embedding=embedding,
        layers=tuple(_load_layer(reader, spec, shard, index) for index in range(spec.num_layers)),
        final_norm=reader.read(FINAL_NORM),
        lm_head=Linear(embedding if spec.tie_word_embeddings else reader.read(LM_HEAD, shard.vocab)),
    )


def _load_layer(reader: "_Reader", spec: ModelSpec, shard: ModelShard, index: int) -> LayerWeights:
    slices = layer_slices(spec, shard, index)
    return LayerWeights(
        attention_norm=reader.read(slices.prefix + "input_layernorm.weight"),
        qkv=reader.read_linear(slices.qkv),
        q_norm=reader.read(slices.prefix + "self_attn.q_norm.weight") if spec.qk_norm else None,
        k_norm=reader.read(slices.prefix + "self_attn.k_norm.weight") if spec.qk_norm else None,
        output=reader.read_linear(slices.output),
        mlp_norm=reader.read(slices.prefix + "post_attention_layernorm.weight"),
        gate_up=reader.read_linear(slices.gate_up),
        down=reader.read_linear(slices.down),
    )


class _Reader:
    """Copies slices of a checkpoint's tensors into memory of their own."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device

    def read(self, name: str, rows: range | None = None) -> Tensor:
        """All of a tensor, or some of its rows."""
        num_rows, *columns = self._checkpoint.shape(name)
        target = self._empty(num_rows if rows is None else len(rows), *columns)
        self._copy(target, name, rows)
        return target

    def read_linear(self, slices: LinearSlices) -> Linear:
        weight = self._empty(slices.num_outputs, len(slices.columns))
        bias = self._empty(slices.num_outputs) if slices.has_bias else None
        start = 0
        for name, rows in slices.parts:
            stop = start + len(rows)
            self._copy(weight[start:stop], name + ".weight", rows, slices.columns)
            if bias is not None:
                self._copy(bias[start:stop], name + ".bias", rows)
            start = stop
        return Linear(weight, bias)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device)

    def _copy(self, target: Tensor, name: str, rows: range | None, columns: range | None = None) -> None:
        for start, part in self._checkpoint.read(name, rows, columns):
            target[start : start + len(part)].copy_(part)
