"""How many KV blocks a rank gets."""

import pytest

from albireo.errors import ConfigError
from worker_svc import kv_budget
from worker_svc.kv_budget import choose_num_blocks

MIB = 2**20


def test_a_cpu_gets_what_all_slots_need_within_a_quarter_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_budget, "_memory_bytes", lambda: 4096 * MIB)
    assert choose_num_blocks(MIB, max_num_seqs=3, max_model_len=100, kv_cache_gib=0) == 12
    assert choose_num_blocks(MIB, max_num_seqs=300, max_model_len=100, kv_cache_gib=0) == 1024
    assert choose_num_blocks(MIB, 300, 100, 0, tp_size=4) == 256


def test_a_gpu_gets_nine_tenths_of_what_is_free() -> None:
    assert choose_num_blocks(MIB, 1, 100, 0, free_gpu_bytes=100 * MIB) == 90


def test_a_stated_size_is_kept() -> None:
    assert choose_num_blocks(3 * MIB, 1, 100, 0.5) == 170


@pytest.mark.parametrize("kv_cache_gib", [0.0, 0.001])
def test_one_sequence_must_fit_and_the_message_says_how_much_it_needs(monkeypatch, kv_cache_gib: float) -> None:
    monkeypatch.setattr(kv_budget, "_memory_bytes", lambda: 4096 * MIB)
    bytes_per_block = 7 * MIB
    with pytest.raises(ConfigError, match=r"sequence of 10000 tokens needs 2\.140 GiB") as caught:
        choose_num_blocks(bytes_per_block, 4, 10000, kv_cache_gib)
    needed = float(str(caught.value).split(" needs ")[1].split()[0])
    assert choose_num_blocks(bytes_per_block, 4, 10000, needed) == 313
