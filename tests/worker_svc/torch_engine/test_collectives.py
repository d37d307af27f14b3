"""Meeting the other ranks, and a group of one. What ranks do together is tested with whole groups in test_model.py."""

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from albireo.errors import ConfigError
from worker_svc.torch_engine import collectives
from worker_svc.torch_engine.collectives import SingleRank, join_group

CPU = torch.device("cpu")


def test_a_group_of_one_changes_nothing(tmp_path: Path) -> None:
    group = join_group(0, 1, tmp_path, CPU)
    assert isinstance(group, SingleRank)
    tensor = torch.arange(6.0).view(2, 3)
    group.all_reduce(tensor)
    assert group.all_gather(tensor, [3]) is tensor
    group.barrier()
    group.close()
    assert tensor.equal(torch.arange(6.0).view(2, 3))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_does_not_wait_for_ever(rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the first, nor one that finds the note of a group that died."""
    monkeypatch.setattr(collectives, "_TIMEOUT", timedelta(seconds=1))
    (tmp_path / "torch-meeting-place").write_text("torch-rendezvous-dead", encoding="utf-8")
    start = time.monotonic()
    with pytest.raises(ConfigError, match="rank"):
        join_group(rank, 2, tmp_path, CPU)
    assert time.monotonic() - start < 10
