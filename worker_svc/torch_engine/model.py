"""The decoder: weights of one rank in frozen dataclasses, and its forward pass as functions of them.

Llama 2 and 3, Mistral, Qwen2 / Qwen2.5 and Qwen3 are one architecture with switches (`ModelSpec`). Attention heads, MLP
columns and the vocabulary are split over the ranks: each layer ends its two halves with an all-reduce.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from albireo.model_spec import ModelSpec
from albireo_kernels import reference as kernels
from worker_svc.sharding import ModelShard
from worker_svc.torch_engine.collectives import Collectives
from worker_svc.torch_engine.inputs import StepInputs
from worker_svc.torch_engine.kv_cache import KvCache


@dataclass(frozen=True, slots=True)
class Linear:
    """weight [out, in] and bias [out]. Layers whose sums are all-reduced have their bias on rank 0 only."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's weights on one rank; H and KVH count the rank's heads, I its MLP columns.

    Attributes:
        attention_norm, mlp_norm: [hidden].
        qkv: [(H + 2 KVH) * head_dim, hidden], queries, keys, values.
        q_norm, k_norm: [head_dim], where the model has them.
        output: [hidden, H * head_dim].
        gate_up: [2 * I, hidden], gate first.
        down: [hidden, I].
    """

    attention_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """``embedding`` and ``lm_head`` [ids of the shard, hidden] are one tensor when the model ties them."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    lm_head: Linear


@dataclass(frozen=True, slots=True)
class Decoder:
    """All that the forward pass of one rank needs beside its inputs; rope tables [max_model_len, head_dim / 2]."""

    spec: ModelSpec
    shard: ModelShard
    weights: ModelWeights
    rope_cos: Tensor
    rope_sin: Tensor
    group: Collectives


def forward(decoder: Decoder, inputs: StepInputs, kv_cache: KvCache) -> Tensor:
    """Runs one step: writes the KV of its N tokens and returns the logits of its S sampling rows.

    Returns:
        [S, ids of the shard] float32.
    Collective: 1 + 2 * num_layers all-reduces of [N, hidden].
    """
    spec, weights = decoder.spec, decoder.weights
    cos, sin = decoder.rope_cos[inputs.positions], decoder.rope_sin[inputs.positions]
    hidden = embed(decoder, inputs.token_ids)
    for index, layer in enumerate(weights.layers):
        normed = kernels.rms_norm(hidden, layer.attention_norm, spec.rms_norm_eps)
        hidden = hidden + _attention(
            decoder, layer, normed, cos, sin, inputs, kv_cache.keys[index], kv_cache.values[index]
        )
        normed = kernels.rms_norm(hidden, layer.mlp_norm, spec.rms_norm_eps)
        hidden = hidden + _mlp(decoder, layer, normed)
    sampling = kernels.rms_norm(hidden[inputs.sample_tokens], weights.final_norm, spec.rms_norm_eps)
    return weights.lm_head(sampling).float()


def embed(decoder: Decoder, token_ids: Tensor) -> Tensor:
    """[N] token ids -> [N, hidden]; each rank looks up its ids and the all-reduce joins them."""
    embedding, ids = decoder.weights.embedding, decoder.shard.vocab
    if decoder.group.size == 1:
        return F.embedding(token_ids, embedding)
    local = token_ids - ids.start
    is_local = (local >= 0) & (local < len(ids))
    if len(ids):
        hidden = F.embedding(torch.where(is_local, local, 0), embedding) * is_local[:, None]
    else:
        hidden = embedding.new_zeros((len(token_ids), embedding.shape[1]))
    decoder.group.all_reduce(hidden)
    return hidden


def _attention(
    decoder: Decoder,
    layer: LayerWeights,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    inputs: StepInputs,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """[N, hidden] -> [N, hidden], summed over the ranks."""
    spec, num_heads, num_kv_heads = decoder.spec, len(decoder.shard.heads), len(decoder.shard.kv_heads)
    heads = layer.qkv(x).view(len(x), -1, spec.head_dim)
    q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    if layer.q_norm is not None and layer.k_norm is not None:
        q = kernels.rms_norm(q, layer.q_norm, spec.rms_norm_eps)
        k = kernels.rms_norm(k, layer.k_norm, spec.rms_norm_eps)
    q, k = kernels.apply_rope(q, cos, sin), kernels.apply_rope(k, cos, sin)
    kernels.write_kv(k, v, k_cache, v_cache, inputs.slot_mapping)
    attended = kernels.attend_groups(q, k_cache, v_cache, inputs.attention_groups)
    summed = layer.output(attended.flatten(1))
    decoder.group.all_reduce(summed)
    return summed


def _mlp(decoder: Decoder, layer: LayerWeights, x: Tensor) -> Tensor:
    """[N, hidden] -> [N, hidden], summed over the ranks."""
    summed = layer.down(kernels.silu_mul(layer.gate_up(x)))
    decoder.group.all_reduce(summed)
    return summed
