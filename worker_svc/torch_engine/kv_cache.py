"""The paged KV cache of one rank."""

from dataclasses import dataclass

import torch
from torch import Tensor

from albireo.model_spec import ModelSpec
from worker_svc.engine import BLOCK_SIZE
from worker_svc.sharding import ModelShard


@dataclass(frozen=True, slots=True)
class KvCache:
    """Keys and values, each [layers, num_blocks, block_size, KV heads of the rank, head_dim]."""

    keys: Tensor
    values: Tensor


def allocate_kv_cache(
    spec: ModelSpec, shard: ModelShard, num_blocks: int, dtype: torch.dtype, device: torch.device
) -> KvCache:
    shape = (spec.num_layers, num_blocks, BLOCK_SIZE, len(shard.kv_heads), spec.head_dim)
    # Zeros, not empty: masked positions are multiplied by 0, and stale memory may hold NaN.
    return KvCache(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))


def block_bytes(spec: ModelSpec, shard: ModelShard, dtype: torch.dtype) -> int:
    """Bytes of one block on one rank: keys and values of all layers."""
    return 2 * spec.num_layers * BLOCK_SIZE * len(shard.kv_heads) * spec.head_dim * dtype.itemsize
