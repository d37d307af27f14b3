"""What a rank finds in its shard of the vocabulary: records, each a value and a token id in one int64.

Records compare as integers in the one order of everything: value descending, then id ascending. So the best of some
records is their maximum, whichever ranks they come from, and no id passes through a float:

    bits 63 .. 32   the float32 value's bits, mapped to a signed integer of the same order; -0 is 0, NaN is -inf
    bits 31 .. 0    2^32 - 1 - id
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from albireo_kernels.reference import gumbel_noise

# Below every record of a token.
NO_RECORD = -(2**63)
_MASK32 = 0xFFFFFFFF


def without_nan(values: Tensor) -> Tensor:
    """A copy with -inf for NaN, which is no value."""
    return values.nan_to_num(-torch.inf, torch.inf, -torch.inf)


def make_records(values: Tensor, ids: Tensor) -> Tensor:
    """Packs float32 values and int64 ids, which broadcast."""
    # Adding 0 makes -0 equal to 0.
    bits = without_nan(values).add_(0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(torch.int64) << 32) + (_MASK32 - ids)


def ids_of(records: Tensor) -> Tensor:
    """int64; past any vocabulary where there is no record."""
    return _MASK32 - (records & _MASK32)


def values_of(records: Tensor) -> Tensor:
    """float32; NaN where there is no record."""
    ordered = (records >> 32).to(torch.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)


def local_best(logits: Tensor, first_id: int) -> Tensor:
    """The best token of each row.

    Args:
        logits: [n, width] float32, of the ids from ``first_id`` on.
    Returns:
        [n] records.
    """
    if not logits.shape[1]:
        return torch.full((len(logits),), NO_RECORD, dtype=torch.int64, device=logits.device)
    values = without_nan(logits)
    places = values.argmax(dim=-1, keepdim=True)  # the first of equal ones
    return make_records(values.gather(1, places), places + first_id)[:, 0]


def local_noisy_best(logits: Tensor, first_id: int, temperature: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
    """The best token of each row by scaled logit and noise.

    Args:
        logits: [n, width] float32, of the ids from ``first_id`` on.
        temperature, k0, k1: [n].
    Returns:
        [n] records, whose values include the noise.
    """
    ids = torch.arange(first_id, first_id + logits.shape[1], device=logits.device)
    return local_best(gumbel_noise(ids, k0, k1).add_(logits / temperature[:, None]), first_id)


def local_top(logits: Tensor, first_id: int, temperature: Tensor, count: int) -> Tensor:
    """The best ``count`` tokens of each row.

    Args:
        logits: [n, width] float32, of the ids from ``first_id`` on.
        temperature: [n].
    Returns:
        [n, count] records of scaled logits, descending; the last are no records where the shard is narrower.
    """
    width = logits.shape[1]
    ids = torch.arange(first_id, first_id + width, device=logits.device)
    # torch.topk promises nothing about equal values. Records are all different.
    best = make_records(logits / temperature[:, None], ids).topk(min(count, width), dim=-1).values
    return F.pad(best, (0, count - best.shape[1]), value=NO_RECORD)
