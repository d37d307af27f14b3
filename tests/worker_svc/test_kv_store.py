"""What a model's blocks are called in a KV store."""

import dataclasses
from pathlib import Path

import pytest

from checkpoints import make_checkpoint
from worker_svc.engine import EngineConfig, EngineInfo
from worker_svc.kv_parts import cut_blocks
from worker_svc.kv_store import fingerprint, model_digest

INFO = EngineInfo("cpu", "float32", 100, (2,), 128, 8, cut_blocks("rows 1", 2, 2, 4096, range(2), writes=True))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path, "qwen3")


def config(path: Path, rank: int = 0, tp_size: int = 1) -> EngineConfig:
    return EngineConfig(path, rank, tp_size, path, "cpu", "auto", 4, 128, 128, 0.0)


def test_the_tp_degree_is_no_part_of_it(checkpoint: Path):
    parted = dataclasses.replace(INFO, kv=cut_blocks("rows 1", 2, 2, 4096, range(1, 2), writes=True))
    assert fingerprint(config(checkpoint), INFO) == fingerprint(config(checkpoint, 1, 2), parted)


def test_all_that_blocks_depend_on_is(checkpoint: Path):
    other_layout = dataclasses.replace(INFO, kv=dataclasses.replace(INFO.kv, layout="rows 2"))
    names = {
        fingerprint(config(checkpoint), INFO),
        fingerprint(config(checkpoint), dataclasses.replace(INFO, dtype="bfloat16")),
        fingerprint(dataclasses.replace(config(checkpoint), quantize="w8a8"), INFO),
        fingerprint(config(checkpoint), other_layout),
    }
    assert len(names) == 4


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_one_byte_of_the_model_makes_another_digest(file: str, checkpoint: Path):
    before = model_digest(checkpoint)
    assert before == model_digest(checkpoint)
    data = bytearray((checkpoint / file).read_bytes())
    data[-2] ^= 1
    (checkpoint / file).write_bytes(data)
    assert model_digest(checkpoint) != before
