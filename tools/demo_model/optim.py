"""Muon for the block matrices, and the learning-rate schedule.

Muon is Keller Jordan's optimiser (https://kellerjordan.github.io/posts/muon/): momentum, then an approximate
orthogonalisation of the update by five Newton-Schulz iterations with the quintic coefficients given there.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor, nn


def orthogonalise(matrices: Tensor, dtype: torch.dtype, iterations: int = 5) -> Tensor:
    """Approximate ``U V^T`` of each matrix in a stack ``(count, rows, columns)``, computed in ``dtype``."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(dtype)
    transposed = x.shape[1] > x.shape[2]
    if transposed:
        x = x.transpose(1, 2)
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(iterations):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    if transposed:
        x = x.transpose(1, 2)
    result: Tensor = x.to(matrices.dtype)
    return result


class Muon:
    """Muon over two-dimensional parameters; those of one shape are orthogonalised together."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, dtype: torch.dtype) -> None:
        groups: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            groups[parameter.shape].append(parameter)
        self.groups = list(groups.values())
        self.momenta = [torch.zeros(len(g), *g[0].shape) for g in self.groups]
        self.lr = lr
        self.dtype = dtype

    @torch.no_grad()
    def step(self, scale: float, momentum: float) -> None:
        """One update; ``scale`` multiplies the peak learning rate."""
        for group, buffer in zip(self.groups, self.momenta, strict=True):
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            buffer.lerp_(gradient, 1 - momentum)
            update = orthogonalise(gradient.lerp(buffer, momentum), self.dtype)
            rows, columns = group[0].shape
            rate = self.lr * scale * max(1.0, rows / columns) ** 0.5
            for parameter, change in zip(group, update, strict=True):
                parameter.add_(change, alpha=-rate)


def learning_rate_scale(step: int, steps: int, warm_up: int = 60) -> float:
    """Factor on the peak learning rate.

    Linear warm-up, plateau to half the run, gently down to 0.65 at 76 % of it, then faster, linearly, to 0.
    """
    decay = float(np.interp(step / steps, [0.5, 0.7625, 1.0], [1.0, 0.65, 0.0]))
    return min((step + 1) / warm_up, decay)


def momentum_at(step: int) -> float:
    """Muon's momentum: 0.85 rising to 0.95 over the first 200 steps."""
    return 0.85 + 0.10 * min(1.0, step / 200)
