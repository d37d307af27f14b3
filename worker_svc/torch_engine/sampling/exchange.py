"""Moves rows between ranks: shards of a row to the one rank that works on it, and its result to all."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from albireo.arrays import Int64Array
from albireo_kernels.reference import to_device
from worker_svc.torch_engine.collectives import Collectives


def owners_of(num_rows: int, group: Collectives) -> Int64Array:
    """Which rank works on each of some rows."""
    return np.arange(num_rows) % group.size


def collect_rows(shard: Tensor, owners: Int64Array, widths: Sequence[int], group: Collectives) -> Tensor:
    """Joins the shards of each row on its owner.

    Args:
        shard: [n, widths[rank]], this rank's part of every row.
        owners: [n], the rank that gets each row.
        widths: of every rank's part; 0 is legal.
    Returns:
        [rows of this rank, sum(widths)], in their order.
    Collective: one all-to-all.
    """
    rows_of_rank = np.bincount(owners, minlength=group.size)
    in_order = to_device(np.argsort(owners, kind="stable"), shard.device)
    num_own = int(rows_of_rank[group.rank])
    received = group.all_to_all(
        shard[in_order].flatten(),
        (rows_of_rank * shard.shape[1]).tolist(),
        [num_own * width for width in widths],
    )
    parts = torch.split(received, [num_own * width for width in widths])
    return torch.cat([part.view(num_own, width) for part, width in zip(parts, widths, strict=True)], dim=1)


def share_results(results: Tensor, num_rows: int, group: Collectives) -> Tensor:
    """Hands the owners' results to every rank.

    Args:
        results: [rows of this rank, width], of rows shared out by `owners_of`.
        num_rows: of all ranks together.
    Returns:
        [num_rows, width].
    Collective: one all-gather.
    """
    width, most = results.shape[1], -(-num_rows // group.size)
    padded = F.pad(results, (0, 0, 0, most - len(results))).flatten()
    gathered = group.all_gather(padded, [most * width] * group.size)
    return gathered.view(group.size, most, width).transpose(0, 1).reshape(-1, width)[:num_rows]
