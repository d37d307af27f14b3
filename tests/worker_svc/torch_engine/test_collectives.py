"""Meeting the other ranks, and a group of one. What ranks do together is tested with whole groups in test_model.py."""

import multiprocessing
import os
import signal
import threading
import time
from datetime import timedelta
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch

from albireo.errors import GroupError
from worker_svc.torch_engine import collectives
from worker_svc.torch_engine.collectives import Rendezvous, SingleRank

CPU = torch.device("cpu")


def test_a_group_of_one_changes_nothing(tmp_path: Path) -> None:
    rendezvous = Rendezvous(0, 1, tmp_path, CPU)
    group = rendezvous.join(1)
    assert isinstance(group, SingleRank)
    tensor = torch.arange(6.0).view(2, 3)
    group.all_reduce(tensor)
    assert group.all_gather(tensor, [3]) is tensor
    group.barrier()
    rendezvous.leave()
    assert tensor.equal(torch.arange(6.0).view(2, 3))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_does_not_wait_for_ever(rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "_MEETING_TIMEOUT_S", 0.5)
    start = time.monotonic()
    with pytest.raises(GroupError, match=f"rank {rank}: 2 ranks did not meet"):
        Rendezvous(rank, 2, tmp_path, CPU).join(1)
    assert time.monotonic() - start < 5


def test_another_thread_ends_the_wait_for_a_rank_that_does_not_come(tmp_path: Path) -> None:
    """And until the group is left, there is no waiting at all."""
    rendezvous = Rendezvous(0, 2, tmp_path, CPU)
    threading.Timer(0.3, rendezvous.abort).start()
    for _ in range(2):
        with pytest.raises(GroupError, match="aborted"):
            rendezvous.join(1)
    rendezvous.leave()
    assert not rendezvous._is_aborted.is_set()


def _meet_twice_and_freeze(run_dir: Path, has_met: Event) -> None:
    """Rank 1."""
    rendezvous = Rendezvous(1, 2, run_dir, CPU)
    for meeting in (1, 2):
        rendezvous.join(meeting).all_reduce(torch.ones(2))
        if meeting == 1:
            rendezvous.leave()
    has_met.set()
    os.kill(os.getpid(), signal.SIGSTOP)


def test_ranks_meet_again_and_a_frozen_peer_ends_a_collective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "_STEP_TIMEOUT", timedelta(seconds=2))
    context = multiprocessing.get_context("spawn")
    has_met = context.Event()
    peer = context.Process(target=_meet_twice_and_freeze, args=(tmp_path, has_met))
    peer.start()
    try:
        rendezvous = Rendezvous(0, 2, tmp_path, CPU)
        for meeting in (1, 2):
            group, total = rendezvous.join(meeting), torch.ones(2)
            group.all_reduce(total)
            assert total.tolist() == [2, 2]
            if meeting == 1:
                rendezvous.leave()
        assert has_met.wait(10)
        start = time.monotonic()
        with pytest.raises(GroupError, match="all-reduce failed"):
            group.all_reduce(total)
        assert 1 < time.monotonic() - start < 5
        rendezvous.leave()
    finally:
        peer.kill()
        peer.join()
