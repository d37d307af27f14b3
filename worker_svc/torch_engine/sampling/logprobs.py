"""What the model makes of sampled tokens: logprobs, ranks, and the likeliest tokens.

Worked out from whole rows of unedited logits, in float64 and in one fixed order of additions, so that not a bit depends
on how the vocabulary is sharded, on the batch, or on the scheme. Results travel as int64, floats as their bits:

    logprob, rank, N ids of the likeliest tokens, their N logprobs
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from albireo.arrays import Int32Array, Int64Array
from albireo.logprobs import Logprobs
from worker_svc.row_sampling import RowSampling
from worker_svc.torch_engine.sampling.records import ids_of, make_records, without_nan


def rows_with_logprobs(sampling: RowSampling) -> Int64Array:
    """The sampling rows that want them, ascending."""
    if not sampling.wants_logprobs:
        return np.zeros(0, dtype=np.int64)
    return np.flatnonzero(sampling.num_logprobs >= 0)


def most_logprobs(sampling: RowSampling, vocab_size: int) -> int:
    """Of the likeliest tokens, that a row of the step wants."""
    return min(int(sampling.num_logprobs.max(initial=0)), vocab_size)


def token_logprobs(logits: Tensor, tokens: Tensor, num_top: int) -> Tensor:
    """Results of some rows.

    Args:
        logits: [n, vocab_size] float32, of the model.
        tokens: [n] int64, the sampled ones.
    Returns:
        [n, 2 + 2 * num_top] int64.
    """
    results = [_of_row(row, token, num_top) for row, token in zip(logits, tokens, strict=True)]
    return torch.stack(results) if results else tokens.new_zeros((0, 2 + 2 * num_top))


def unpack(results: Int64Array, sampling: RowSampling) -> Logprobs:
    """Results [rows with logprobs, 2 + 2 * N] of a step, on the host."""
    rows = rows_with_logprobs(sampling)
    most = (results.shape[1] - 2) // 2
    num_top: Int32Array = np.minimum(sampling.num_logprobs[rows], most)
    is_wanted = np.arange(most) < num_top[:, None]
    return Logprobs(
        indices=rows.astype(np.int32),
        logprobs=results[:, 0].copy().view(np.float64).astype(np.float32),
        ranks=results[:, 1].astype(np.int32),
        num_top=num_top,
        top_token_ids=results[:, 2 : 2 + most][is_wanted].astype(np.int32),
        top_logprobs=results[:, 2 + most :][is_wanted].view(np.float64).astype(np.float32),
    )


def _of_row(logits: Tensor, token: Tensor, num_top: int) -> Tensor:
    """[vocab_size] logits and a token [] -> [2 + 2 * num_top]. A row at a time bounds the memory of float64."""
    logits = without_nan(logits)
    ids = torch.arange(len(logits), device=logits.device)
    sampled = logits.gather(0, token[None])
    rank = ((logits > sampled) | ((logits == sampled) & (ids < token))).sum() + 1
    top_ids = ids_of(make_records(logits, ids).topk(num_top).values)
    values = torch.cat((sampled, logits[top_ids])).double()
    logprobs = (values - _log_sum_exp(logits.double())).view(torch.int64)
    return torch.cat((logprobs[:1], rank[None], top_ids, logprobs[1:]))


def _log_sum_exp(values: Tensor) -> Tensor:
    """Of float64 values [n], bit by bit the same on any device of the kind: they are added in a fixed tree."""
    largest = values.max()
    sums = (values - largest).exp()
    sums = F.pad(sums, (0, (1 << (len(sums) - 1).bit_length()) - len(sums)))
    while len(sums) > 1:
        lower, upper = sums.view(2, -1)
        sums = lower + upper
    return largest + sums[0].log()
