"""The ranks find the memory that they share, or find out in time that it is not there."""

import itertools
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from albireo.errors import GroupError
from albireo_kernels.cpu import Library, address
from worker_svc.cpu_engine import shared
from worker_svc.cpu_engine.shared import GroupSizes, Rendezvous

SIZES = GroupSizes(tp_size=3, max_num_batched_tokens=7, max_num_seqs=4, hidden_size=5, vocab_size=33)


def test_all_ranks_find_the_same_memory(library: Library, tmp_path: Path) -> None:
    """A new one for each meeting, which nobody else finds once they have met."""
    ranks = [Rendezvous(rank, tmp_path, library) for rank in range(3)]
    (tmp_path / "compiled-meeting-0000000000000001").write_text("/nowhere", encoding="ascii")
    for meeting in (7, 8):
        with ThreadPoolExecutor() as pool:
            # Rank 0 is the last to come.
            late = [pool.submit(rank.find, meeting, SIZES) for rank in ranks[1:]]
            time.sleep(0.1)
            buffers = [ranks[0].find(meeting, SIZES), *(future.result(10) for future in late)]
        assert [path.name for path in tmp_path.iterdir()] == [f"compiled-meeting-{meeting:016x}"]
        for rank in ranks:
            rank.has_met()
        assert not list(tmp_path.iterdir())
        for rank, mine in enumerate(buffers):
            assert mine.sampling.logits.shape == (4, 33)
            assert not mine.sampling.logits.any()
            mine.partials[0][rank][:] = rank + 1
            mine.partials[1][rank][:] = -rank
        for theirs in buffers:
            assert [partial.max() for partial in theirs.partials[0]] == [1, 2, 3]
            assert [partial.min() for partial in theirs.partials[1]] == [0, -1, -2]
            assert {partial.shape for partial in (*theirs.partials[0], *theirs.partials[1])} == {(7, 5)}
            assert not theirs.sampling.tokens.any()
        buffers[0].sampling.tokens[:] = 9
        assert (buffers[2].sampling.tokens == 9).all()
        for rank in ranks:
            rank.leave()


def test_buffers_do_not_overlap(library: Library, tmp_path: Path) -> None:
    rank = Rendezvous(0, tmp_path, library)
    found = rank.find(1, SIZES)
    assert found.meeting is not None
    start = address(found.meeting)
    sampling = found.sampling
    arrays = [*found.partials[0], *found.partials[1], *sampling.candidates]
    arrays += [sampling.logits, sampling.raw, sampling.tokens, sampling.logprobs]
    spans = sorted((address(array), address(array) + array.strides[0] * len(array)) for array in arrays)
    assert spans[0][0] >= start + library.group_bytes()
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert spans[-1][1] <= start + found.meeting.nbytes
    assert all(begin % 64 == 0 for begin, _ in spans)
    rank.leave()


def test_a_rank_alone_shares_nothing(library: Library, tmp_path: Path) -> None:
    found = Rendezvous(0, tmp_path, library).find(1, GroupSizes(1, 7, 4, 5, 33))
    assert found.meeting is None
    assert found.partials == ((), ())
    assert (found.sampling.logits.shape, found.sampling.tokens.dtype) == ((4, 33), np.int32)
    assert not list(tmp_path.iterdir())


def test_a_rank_does_not_wait_for_ever(library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "_MEETING_TIMEOUT_S", 0.2)
    with pytest.raises(GroupError, match="rank 1: rank 0 did not come within"):
        Rendezvous(1, tmp_path, library).find(1, SIZES)


def test_another_thread_ends_the_wait_for_rank_0(library: Library, tmp_path: Path) -> None:
    """And until the group is left, there is no waiting at all."""
    rank = Rendezvous(1, tmp_path, library)
    threading.Timer(0.2, rank.abort).start()
    for _ in range(2):
        with pytest.raises(GroupError, match="aborted"):
            rank.find(1, SIZES)
    rank.leave()
    assert not rank._is_aborted.is_set()


@pytest.mark.parametrize("path", ["/proc/{pid}/fd/999999", "/dev/null"])
def test_memory_that_is_gone(path: str, library: Library, tmp_path: Path) -> None:
    """Rank 0 died between telling where the memory is and the others' coming."""
    file = tmp_path / "compiled-meeting-0000000000000001"
    file.write_text(path.format(pid=os.getpid()), encoding="ascii")
    with pytest.raises(GroupError, match="rank 1 has no memory to share"):
        Rendezvous(1, tmp_path, library).find(1, SIZES)
