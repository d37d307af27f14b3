"""What the kernels are told of a batch: parameters by row and a shard of its logits, all on the device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from albireo_kernels.noise import row_keys
from albireo_kernels.reference.sampling import Params


@dataclass(frozen=True, slots=True)
class Rows:
    """Sampling parameters, each [num_rows].

    Attributes:
        temperature: float32; below 1e-5 greedy.
        top_k: int32; 0 means all, 1 greedy.
        top_p: float64; from 1 on all.
        log_min_p: float64, log(min_p); -inf means all.
        k0, k1: int32 with the bits of the noise keys' uint32 halves.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    log_min_p: Tensor
    k0: Tensor
    k1: Tensor

    @property
    def device(self) -> torch.device:
        return self.temperature.device

    def __len__(self) -> int:
        return len(self.temperature)


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank's logits.

    Attributes:
        logits: [num_rows, width] float32; rows may be further apart than width. Width 0 is legal.
        first_id: the token id of column 0.
    """

    logits: Tensor
    first_id: int

    @property
    def width(self) -> int:
        return self.logits.shape[1]

    @property
    def stride(self) -> int:
        return self.logits.stride(0)


def make_rows(params: Sequence[Params], positions: Sequence[int], device: str | torch.device = "cpu") -> Rows:
    """Rows of sampling parameters; ``positions`` are those of the sampled tokens in their outputs."""
    seeds = np.array([each.seed for each in params], dtype=np.uint64)
    halves = row_keys(seeds, np.array(positions, dtype=np.int64)).view(np.int32).reshape(-1, 2)
    log_min_p = [math.log(each.min_p) if each.min_p > 0 else -math.inf for each in params]
    return Rows(
        temperature=torch.tensor([each.temperature for each in params], dtype=torch.float32, device=device),
        top_k=torch.tensor([each.top_k for each in params], dtype=torch.int32, device=device),
        top_p=torch.tensor([each.top_p for each in params], dtype=torch.float64, device=device),
        log_min_p=torch.tensor(log_min_p, dtype=torch.float64, device=device),
        k0=torch.from_numpy(halves[:, 0].copy()).to(device),
        k1=torch.from_numpy(halves[:, 1].copy()).to(device),
    )


def num_programs_per_row(num_rows: int, width: int, tile: int) -> int:
    """Into how many programs a row's work is cut.

    About 1024 programs fill any GPU of today (108 to 148 multiprocessors, some 8 programs of 4 warps on each): one row
    is cut into tiles, 1024 rows stay whole, which leaves the second stage little to do.
    """
    return max(1, min(-(-width // tile), -(-1024 // max(num_rows, 1))))
