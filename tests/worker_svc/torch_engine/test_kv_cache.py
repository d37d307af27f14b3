"""The size of the KV cache."""

from pathlib import Path

import pytest
import torch

from albireo.model_spec import load_model_spec
from checkpoints import make_checkpoint
from worker_svc.sharding import shard_model
from worker_svc.torch_engine.kv_cache import allocate_kv_cache, block_bytes

CPU = torch.device("cpu")


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_block_bytes_are_those_allocated(tp_size: int, tmp_path: Path) -> None:
    spec = load_model_spec(make_checkpoint(tmp_path, "qwen3"))
    shard = shard_model(spec, tp_size - 1, tp_size)
    cache = allocate_kv_cache(spec, shard, 5, torch.bfloat16, CPU)
    assert cache.keys[0].shape == (5, 32, 2 if tp_size == 1 else 1, 16)
    tensors = (*cache.keys, *cache.values)
    assert sum(tensor.nbytes for tensor in tensors) == 5 * block_bytes(spec, shard, torch.bfloat16)
    assert not any(tensor.any() for tensor in tensors)
