"""Which way a row is drawn: from its parameters alone, on the host, before anything runs. All ranks choose alike."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from albireo.arrays import Int64Array
from albireo_kernels.reference import noise_keys, to_device
from albireo_kernels.reference.sampling import MIN_TEMPERATURE
from worker_svc.row_sampling import RowSampling

# Up to this top_k, rows are drawn from every rank's best candidates.
MAX_CANDIDATES = 256
_ALL = np.iinfo(np.int32).max


@dataclass(frozen=True, slots=True)
class Routes:
    """Some rows by their routes; each row is in one array.

    Attributes:
        greedy: the best logit.
        unfiltered: the best of scaled logit and noise, all tokens surviving.
        candidates: top-k, and whatever filters follow it, from each rank's best.
        sorted: filters that need the order of the whole vocabulary.
        num_candidates: of each row of ``candidates``, the largest of their top_k.
    """

    greedy: Int64Array
    unfiltered: Int64Array
    candidates: Int64Array
    sorted: Int64Array
    num_candidates: int

    @property
    def num_records(self) -> int:
        """That a rank sends to the others."""
        return len(self.greedy) + len(self.unfiltered) + len(self.candidates) * self.num_candidates


def choose_routes(sampling: RowSampling, rows: Int64Array, vocab_size: int) -> Routes:
    """The routes of a step's sampling rows ``rows``, as indices into that array."""
    temperature, top_k = sampling.temperature[rows], sampling.top_k[rows]
    greedy = (temperature < MIN_TEMPERATURE) | (top_k == 1)
    has_top_k = (top_k > 0) & (top_k < vocab_size)
    unfiltered = ~greedy & ~has_top_k & (sampling.top_p[rows] >= 1) & (sampling.min_p[rows] <= 0)
    candidates = ~greedy & has_top_k & (top_k <= MAX_CANDIDATES)
    return Routes(
        np.flatnonzero(greedy),
        np.flatnonzero(unfiltered),
        np.flatnonzero(candidates),
        np.flatnonzero(~(greedy | unfiltered | candidates)),
        int(top_k[candidates].max(initial=0)),
    )


class DrawParams(NamedTuple):
    """Parameters of n rows on the device, [n]; those that mean nothing filter nothing.

    Attributes:
        temperature: float32.
        top_k: int64; large: all.
        top_p: float64; inf: all.
        log_min_p: float64; -inf: all.
        k0, k1: int64, the keys of the rows' noise.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    log_min_p: Tensor
    k0: Tensor
    k1: Tensor

    def take(self, rows: Tensor | slice) -> "DrawParams":
        return DrawParams(*(values[rows] for values in self))


def draw_params(sampling: RowSampling, output_positions: Int64Array, device: torch.device) -> DrawParams:
    """Of all sampling rows of a step, whose tokens come at these positions of their outputs."""
    k0, k1 = noise_keys(sampling.seed, output_positions)
    log_min_p = np.full(len(k0), -np.inf)
    np.log(sampling.min_p, out=log_min_p, where=sampling.min_p > 0, dtype=np.float64)
    integers = to_device(np.stack((np.where(sampling.top_k == 0, _ALL, sampling.top_k), k0, k1)), device)
    top_p = np.where(sampling.top_p >= 1, np.inf, sampling.top_p)
    floats = to_device(np.stack((top_p, log_min_p)), device, torch.float64)
    temperature = to_device(sampling.temperature, device, torch.float32)
    return DrawParams(temperature, integers[0], floats[0], floats[1], integers[1], integers[2])
