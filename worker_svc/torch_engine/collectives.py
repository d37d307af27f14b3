"""What the ranks of a group do together, and the ways to do it: alone, or through torch.distributed."""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from albireo.errors import GroupError

# Bound every wait for a peer: until it comes, and in each collective.
_MEETING_TIMEOUT_S = 60.0
_STEP_TIMEOUT = timedelta(seconds=10)
_POLL_S = 0.01


class Collectives(Protocol):
    """Operations that every rank of a group calls in the same order. They raise GroupError when a peer is gone."""

    rank: int
    size: int
    elapsed_ns: int
    """Spent in them so far, waiting for peers included; on GPUs, where they only queue work, not counted."""

    def all_reduce(self, tensor: Tensor) -> None:
        """Sums ``tensor`` over the ranks, in place."""

    def all_gather(self, shard: Tensor, widths: Sequence[int]) -> Tensor:
        """Joins the ranks' shards along the last dimension, in rank order.

        Args:
            shard: [..., widths[rank]]; all other dimensions are the same on every rank.
            widths: of every rank's shard; 0 is legal.
        Returns:
            [..., sum(widths)]; the shard itself when there is one rank.
        """

    def all_to_all(self, sent: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]) -> Tensor:
        """Exchanges a part of ``sent`` with every rank.

        Args:
            sent: [sum(send_sizes)], the parts for each rank in rank order; empty ones are legal.
            send_sizes, receive_sizes: of the parts that go to and come from each rank.
        Returns:
            [sum(receive_sizes)], the parts from each rank in rank order; ``sent`` itself when there is one rank.
        """

    def barrier(self) -> None:
        """Returns once every rank has called."""


class SingleRank:
    """The group of one."""

    rank = 0
    size = 1
    elapsed_ns = 0

    def all_reduce(self, tensor: Tensor) -> None:
        pass

    def all_gather(self, shard: Tensor, widths: Sequence[int]) -> Tensor:
        return shard

    def all_to_all(self, sent: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]) -> Tensor:
        return sent

    def barrier(self) -> None:
        pass


class TorchCollectives:
    """torch.distributed's process group of this process: gloo between CPUs, NCCL between GPUs."""

    def __init__(self, rank: int, size: int, store: Store, device: torch.device) -> None:
        """Raises GroupError when the others, who hold the same store, do not do the same in time."""
        self.rank = rank
        self.size = size
        self.elapsed_ns = 0
        self._device = device
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        try:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=store,
                rank=rank,
                world_size=size,
                timeout=_STEP_TIMEOUT,
                device_id=device if device.type == "cuda" else None,
            )
        except (RuntimeError, ValueError) as error:
            raise GroupError(f"rank {rank} of {size} did not meet the others: {error}") from error
        self.barrier()

    def all_reduce(self, tensor: Tensor) -> None:
        if not tensor.numel():
            return
        with self._collective("all-reduce"):
            dist.all_reduce(tensor)

    def all_gather(self, shard: Tensor, widths: Sequence[int]) -> Tensor:
        # Shards travel padded to the widest: neither back end gathers unequal ones in one operation.
        padded = F.pad(shard, (0, max(widths) - widths[self.rank])).contiguous()
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        with self._collective("all-gather"):
            dist.all_gather(gathered, padded)
        return torch.cat([part[..., :width] for part, width in zip(gathered, widths, strict=True)], dim=-1)

    def all_to_all(self, sent: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]) -> Tensor:
        received = sent.new_empty(sum(receive_sizes))
        with self._collective("all-to-all"):
            dist.all_to_all_single(received, sent.contiguous(), list(receive_sizes), list(send_sizes))
        return received

    def barrier(self) -> None:
        # A sum rather than dist.barrier, which on NCCL guesses the device.
        self.all_reduce(torch.zeros(1, device=self._device))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @contextmanager
    def _collective(self, name: str) -> Iterator[None]:
        start_ns = time.perf_counter_ns()
        try:
            yield
        except RuntimeError as error:
            raise GroupError(f"rank {self.rank}: {name} failed: {error}") from error
        if self._device.type == "cpu":
            self.elapsed_ns += time.perf_counter_ns() - start_ns


class Rendezvous:
    """Where the ranks meet: files in ``run_dir``, one for each meeting. A rank is in one group at a time."""

    def __init__(self, rank: int, size: int, run_dir: Path, device: torch.device) -> None:
        self._rank = rank
        self._size = size
        self._run_dir = run_dir
        self._device = device
        self._is_aborted = threading.Event()

    def join(self, meeting: int) -> Collectives:
        """The collectives of the group that meets under this number. GroupError: not all ranks came."""
        if self._size == 1:
            return SingleRank()
        file = self._run_dir.resolve() / f"torch-meeting-{meeting:016x}"
        if self._rank == 0:
            for leftover in file.parent.glob("torch-meeting-*"):
                if leftover != file:
                    leftover.unlink(missing_ok=True)
        store: Store = dist.FileStore(str(file), self._size)  # type: ignore[attr-defined]  # torch's stubs lack it
        store.set_timeout(_STEP_TIMEOUT)
        self._wait_for_all(store)
        return TorchCollectives(self._rank, self._size, store, self._device)

    def abort(self) -> None:
        """From any thread: ends waiting for peers, now or later, until `leave`.

        Between CPUs that concerns the meeting only: gloo's collectives cannot be aborted, and need not be, because they
        fail when the connection to a peer ends.
        """
        self._is_aborted.set()
        # NCCL notices nothing of the kind. Its group has been able to abort from another thread since torch 2.7.
        if self._device.type == "cuda" and dist.is_initialized():
            abort = getattr(dist.group.WORLD, "abort", None)
            if abort is not None:
                abort()

    def leave(self) -> None:
        """Leaves the group, if there is one; peers that still wait for this rank fail."""
        if dist.is_initialized():
            dist.destroy_process_group()
        self._is_aborted.clear()

    def _wait_for_all(self, store: Store) -> None:
        """Returns when all ranks are here. torch could wait for them as well, but nobody could end its wait."""
        store.set(f"here-{self._rank}", "")
        others = [f"here-{rank}" for rank in range(self._size)]
        deadline = time.monotonic() + _MEETING_TIMEOUT_S
        while not store.check(others):
            if self._is_aborted.is_set():
                raise GroupError("the meeting is aborted")
            if time.monotonic() > deadline:
                raise GroupError(f"rank {self._rank}: {self._size} ranks did not meet in {_MEETING_TIMEOUT_S:.0f} s")
            time.sleep(_POLL_S)
