"""What the ranks of a group do together, and the ways to do it: alone, or through torch.distributed."""

import fcntl
import os
import secrets
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

from albireo.errors import ConfigError, GroupError

# Bounds every wait for a peer: its start, and each of its collectives.
_TIMEOUT = timedelta(seconds=60)


class Collectives(Protocol):
    """Operations that every rank of a group calls in the same order. They raise GroupError when a peer is gone."""

    rank: int
    size: int

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

    def barrier(self) -> None:
        """Returns once every rank has called."""

    def close(self) -> None:
        """Leaves the group; peers that still wait for this rank fail."""


class SingleRank:
    """The group of one."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: Tensor) -> None:
        pass

    def all_gather(self, shard: Tensor, widths: Sequence[int]) -> Tensor:
        return shard

    def barrier(self) -> None:
        pass

    def close(self) -> None:
        pass


class TorchCollectives:
    """torch.distributed's process group of this process: gloo between CPUs, NCCL between GPUs."""

    def __init__(self, rank: int, size: int, run_dir: Path, device: torch.device) -> None:
        """Meets the other ranks through files in ``run_dir``.

        Raises ConfigError when they do not all come in time.
        """
        self.rank = rank
        self.size = size
        self._device = device
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        with _meeting_place(rank, run_dir) as file:
            try:
                dist.init_process_group(
                    "nccl" if device.type == "cuda" else "gloo",
                    init_method=f"file://{file}",
                    rank=rank,
                    world_size=size,
                    timeout=_TIMEOUT,
                    device_id=device if device.type == "cuda" else None,
                )
            except (RuntimeError, ValueError) as error:
                raise ConfigError(f"rank {rank} of {size} did not meet the others in {run_dir}: {error}") from error
            self.barrier()

    def all_reduce(self, tensor: Tensor) -> None:
        if not tensor.numel():
            return
        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:
            raise GroupError(f"rank {self.rank}: all-reduce failed: {error}") from error

    def all_gather(self, shard: Tensor, widths: Sequence[int]) -> Tensor:
        # Shards travel padded to the widest: neither back end gathers unequal ones in one operation.
        padded = F.pad(shard, (0, max(widths) - widths[self.rank])).contiguous()
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        try:
            dist.all_gather(gathered, padded)
        except RuntimeError as error:
            raise GroupError(f"rank {self.rank}: all-gather failed: {error}") from error
        return torch.cat([part[..., :width] for part, width in zip(gathered, widths, strict=True)], dim=-1)

    def barrier(self) -> None:
        # A sum rather than dist.barrier, which on NCCL guesses the device.
        self.all_reduce(torch.zeros(1, device=self._device))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def join_group(rank: int, size: int, run_dir: Path, device: torch.device) -> Collectives:
    """The collectives of ``rank``, once the group is complete."""
    return SingleRank() if size == 1 else TorchCollectives(rank, size, run_dir, device)


@contextmanager
def _meeting_place(rank: int, run_dir: Path) -> Iterator[Path]:
    """The file through which the ranks meet: a new one at each start, whatever a group that died has left behind.

    Rank 0 names the file in a note that it keeps locked until all have met. A note that is not locked is a dead one's.
    """
    note, prefix = run_dir.resolve() / "torch-meeting-place", "torch-rendezvous-"
    if rank > 0:
        yield note.with_name(_read_locked(note))
        return
    for leftover in run_dir.glob(prefix + "*"):
        leftover.unlink()
    name = prefix + secrets.token_hex(8)
    draft = note.with_suffix(".new")
    with draft.open("w", encoding="utf-8") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX | fcntl.LOCK_NB)
        writer.write(name)
        writer.flush()
        draft.replace(note)
        yield note.with_name(name)


def _read_locked(note: Path) -> str:
    deadline = time.monotonic() + _TIMEOUT.total_seconds()
    while time.monotonic() < deadline:
        try:
            reader = note.open(encoding="utf-8")
        except FileNotFoundError:
            time.sleep(0.02)
            continue
        with reader:
            try:
                fcntl.flock(reader, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return reader.read()
        time.sleep(0.02)
    raise ConfigError(f"rank 0 did not come to {note} within {_TIMEOUT.total_seconds():.0f} s")
