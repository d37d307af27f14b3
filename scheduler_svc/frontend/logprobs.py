"""Log-probabilities as completions hold them: one entry per token."""

from typing import NamedTuple

from albireo.arrays import UInt64Array
from albireo.logprobs import Logprobs

_BYTES_PER_TOKEN = 200  # a tuple, its numbers, a list and its place in one
_BYTES_PER_TOP = 130


class TokenLogprobs(NamedTuple):
    """Of one token. ``top``: the likeliest tokens in order, each with its own."""

    logprob: float
    rank: int
    top: list[tuple[int, float]]


def group_logprobs(sequence_ids: UInt64Array, logprobs: Logprobs) -> dict[int, list[TokenLogprobs]]:
    """Splits logprobs by sequence, in the order of the tokens beside which they stand; ``sequence_ids`` of all
    tokens."""
    tops = list(zip(logprobs.top_token_ids.tolist(), logprobs.top_logprobs.tolist(), strict=True))
    owners = sequence_ids[logprobs.indices].tolist()
    of_sequence: dict[int, list[TokenLogprobs]] = {}
    start = 0
    for owner, logprob, rank, num_top in zip(
        owners, logprobs.logprobs.tolist(), logprobs.ranks.tolist(), logprobs.num_top.tolist(), strict=True
    ):
        of_sequence.setdefault(owner, []).append(TokenLogprobs(logprob, rank, tops[start : start + num_top]))
        start += num_top
    return of_sequence


def num_bytes_of(logprobs: list[TokenLogprobs]) -> int:
    """About what they take in memory."""
    return sum(_BYTES_PER_TOKEN + _BYTES_PER_TOP * len(each.top) for each in logprobs)
