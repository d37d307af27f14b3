"""The paged KV cache of one rank, and how many blocks it gets."""

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from albireo.errors import ConfigError
from albireo.model_spec import ModelSpec
from worker_svc.engine import BLOCK_SIZE
from worker_svc.torch_engine.sharding import ModelShard

_GIB = 2**30
_CPU_SHARE = 0.25  # of the machine's memory, for all ranks together; pages count once they are used
_CUDA_SHARE = 0.9  # of what is free beside the weights; the rest is for activations


@dataclass(frozen=True, slots=True)
class KvCache:
    """Keys and values by layer, each [num_blocks, block_size, KV heads of the rank, head_dim]."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


def allocate_kv_cache(
    spec: ModelSpec, shard: ModelShard, num_blocks: int, dtype: torch.dtype, device: torch.device
) -> KvCache:
    shape = (num_blocks, BLOCK_SIZE, len(shard.kv_heads), spec.head_dim)

    def by_layer() -> tuple[Tensor, ...]:
        # Zeros, not empty: masked positions are multiplied by 0, and stale memory may hold NaN.
        return tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.num_layers))

    return KvCache(by_layer(), by_layer())


def block_bytes(spec: ModelSpec, shard: ModelShard, dtype: torch.dtype) -> int:
    """Bytes of one block on one rank: keys and values of all layers."""
    return 2 * spec.num_layers * BLOCK_SIZE * len(shard.kv_heads) * spec.head_dim * dtype.itemsize


def choose_num_blocks(
    bytes_per_block: int,
    max_num_seqs: int,
    max_model_len: int,
    kv_cache_gib: float,
    device: torch.device,
    tp_size: int = 1,
) -> int:
    """How many blocks a rank gets.

    Args:
        kv_cache_gib: 0 means: on a CPU what all slots need at full length, within this rank's part of a quarter of the
            machine's memory; on a GPU nine tenths of the memory that is free.
    Raises:
        ConfigError: one sequence of ``max_model_len`` would not fit.
    """
    blocks_per_seq = -(-max_model_len // BLOCK_SIZE)
    if kv_cache_gib:
        limit_bytes = int(kv_cache_gib * _GIB)
    elif device.type == "cuda":
        limit_bytes = int(torch.cuda.mem_get_info(device)[0] * _CUDA_SHARE)
    else:
        share_bytes = int(_memory_bytes() * _CPU_SHARE) // tp_size
        limit_bytes = min(max_num_seqs * blocks_per_seq * bytes_per_block, share_bytes)
    num_blocks = limit_bytes // bytes_per_block
    if num_blocks < blocks_per_seq:
        raise ConfigError(
            f"one sequence of {max_model_len} tokens needs {_gib(blocks_per_seq * bytes_per_block)} GiB of KV cache on "
            f"each rank, and there are {_gib(limit_bytes)}: set --kv-cache-gib higher or --max-model-len lower"
        )
    return num_blocks


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _gib(count: int) -> str:
    # Rounded up, so that the figure can be passed as it stands.
    return f"{-(-count * 1000 // _GIB) / 1000:.3f}"
