"""How many KV blocks a rank gets."""

import os

from albireo.errors import ConfigError
from worker_svc.engine import BLOCK_SIZE

_GIB = 2**30
_CPU_SHARE = 0.25  # of the machine's memory, for all ranks together; pages count once they are used
_CUDA_SHARE = 0.9  # of what is free beside the weights; the rest is for activations


def choose_num_blocks(
    bytes_per_block: int,
    max_num_seqs: int,
    max_model_len: int,
    kv_cache_gib: float,
    free_gpu_bytes: int | None = None,
    tp_size: int = 1,
) -> int:
    """How many blocks a rank gets.

    Args:
        kv_cache_gib: 0 means: on a CPU what all slots need at full length, within this rank's part of a quarter of the
            machine's memory; on a GPU nine tenths of the memory that is free.
        free_gpu_bytes: None on a CPU.
    Raises:
        ConfigError: one sequence of ``max_model_len`` would not fit.
    """
    blocks_per_seq = -(-max_model_len // BLOCK_SIZE)
    if kv_cache_gib:
        limit_bytes = int(kv_cache_gib * _GIB)
    elif free_gpu_bytes is not None:
        limit_bytes = int(free_gpu_bytes * _CUDA_SHARE)
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
