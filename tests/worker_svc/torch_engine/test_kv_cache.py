"""How many KV blocks a rank gets."""

from pathlib import Path

import pytest
import torch

from albireo.errors import ConfigError
from albireo.model_spec import load_model_spec
from checkpoints import make_checkpoint
from worker_svc.torch_engine import kv_cache
from worker_svc.torch_engine.kv_cache import allocate_kv_cache, block_bytes, choose_num_blocks
from worker_svc.torch_engine.sharding import shard_model

CPU = torch.device("cpu")
MIB = 2**20


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_block_bytes_are_those_allocated(tp_size: int, tmp_path: Path) -> None:
    spec = load_model_spec(make_checkpoint(tmp_path, "qwen3"))
    shard = shard_model(spec, tp_size - 1, tp_size)
    cache = allocate_kv_cache(spec, shard, 5, torch.bfloat16, CPU)
    assert cache.keys[0].shape == (5, 32, 2 if tp_size == 1 else 1, 16)
    tensors = (*cache.keys, *cache.values)
    assert sum(tensor.nbytes for tensor in tensors) == 5 * block_bytes(spec, shard, torch.bfloat16)
    assert not any(tensor.any() for tensor in tensors)


def test_a_cpu_gets_what_all_slots_need_within_a_quarter_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "_memory_bytes", lambda: 4096 * MIB)
    assert choose_num_blocks(MIB, max_num_seqs=3, max_model_len=100, kv_cache_gib=0, device=CPU) == 12
    assert choose_num_blocks(MIB, max_num_seqs=300, max_model_len=100, kv_cache_gib=0, device=CPU) == 1024
    assert choose_num_blocks(MIB, 300, 100, 0, CPU, tp_size=4) == 256


def test_a_gpu_gets_nine_tenths_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (100 * MIB, 500 * MIB))
    assert choose_num_blocks(MIB, 1, 100, 0, torch.device("cuda", 0)) == 90


def test_a_stated_size_is_kept() -> None:
    assert choose_num_blocks(3 * MIB, 1, 100, 0.5, CPU) == 170


@pytest.mark.parametrize("kv_cache_gib", [0.0, 0.001])
def test_one_sequence_must_fit_and_the_message_says_how_much_it_needs(monkeypatch, kv_cache_gib: float) -> None:
    monkeypatch.setattr(kv_cache, "_memory_bytes", lambda: 4096 * MIB)
    bytes_per_block = 7 * MIB
    with pytest.raises(ConfigError, match=r"sequence of 10000 tokens needs 2\.140 GiB") as caught:
        choose_num_blocks(bytes_per_block, 4, 10000, kv_cache_gib, CPU)
    needed = float(str(caught.value).split(" needs ")[1].split()[0])
    assert choose_num_blocks(bytes_per_block, 4, 10000, needed, CPU) == 313
