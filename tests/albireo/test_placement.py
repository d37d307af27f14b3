"""On what a model runs when nobody says."""

import json
import os
from pathlib import Path

import pytest

from albireo import placement
from albireo.placement import choose_tp, may_have_gpu


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Two cores, and a directory in which a driver may appear."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3, 5})
    monkeypatch.setattr(placement, "_NVIDIA_DRIVER", (tmp_path / "nvidiactl",))
    return tmp_path


def test_a_cpu_has_two_ranks_where_cores_and_model_allow_it(
    machine: Path, stub_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_tp("demo", "torch", "auto") == choose_tp("demo", "torch", "cpu") == 2
    assert choose_tp("demo", "stub", "cpu") == 1
    config = json.loads((stub_model / "config.json").read_text())
    (machine / "config.json").write_text(json.dumps(config | {"num_attention_heads": 9, "hidden_size": 63}))
    assert choose_tp(str(machine), "torch", "cpu") == 1
    assert choose_tp("/nowhere", "torch", "cpu") == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3})
    assert choose_tp("demo", "torch", "cpu") == 1


def test_a_gpu_has_one(machine: Path) -> None:
    assert not may_have_gpu()
    (machine / "nvidiactl").touch()
    assert may_have_gpu()
    assert choose_tp("demo", "torch", "auto") == choose_tp("demo", "torch", "cuda") == 1
    assert choose_tp("demo", "torch", "cpu") == 2
