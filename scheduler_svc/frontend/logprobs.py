"""Log-probabilities on their way from the planner's messages to deltas: as arrays for as long as they wait."""

from array import array
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from albireo.arrays import UInt64Array
from albireo.logprobs import Logprobs


class TokenLogprobs(NamedTuple):
    """Of one token. ``top``: the likeliest tokens in order, each with its own."""

    logprob: float
    rank: int
    top: list[tuple[int, float]]


def split_logprobs(sequence_ids: UInt64Array, logprobs: Logprobs) -> dict[int, Logprobs]:
    """Splits logprobs by sequence, in the order of the tokens beside which they stand; ``sequence_ids`` of all
    tokens."""
    owners = sequence_ids[logprobs.indices]
    order = np.argsort(owners, kind="stable")
    top_order = np.argsort(np.repeat(owners, logprobs.num_top), kind="stable")
    of_tokens = [column[order] for column in logprobs[:4]]
    of_tops = [column[top_order] for column in logprobs[4:]]
    present, starts = np.unique(owners[order], return_index=True)
    bounds = [*starts.tolist(), len(order)]
    top_bounds = np.concatenate(([0], np.cumsum(of_tokens[3])))[bounds].tolist()
    of_sequence: dict[int, Logprobs] = {}
    for i, owner in enumerate(present.tolist()):
        mine, my_tops = slice(*bounds[i : i + 2]), slice(*top_bounds[i : i + 2])
        columns = [*(column[mine] for column in of_tokens), *(column[my_tops] for column in of_tops)]
        of_sequence[owner] = Logprobs._make(columns)
    return of_sequence


class WaitingLogprobs:
    """Of tokens that came and were not taken: a completion's, or a prompt's. With 20 likeliest, a token has 172 bytes
    here, and some 2800 as tuples."""

    __slots__ = ("_logprobs", "_num_top", "_ranks", "_top_logprobs", "_top_token_ids")

    def __init__(self) -> None:
        self._logprobs, self._top_logprobs = array("f"), array("f")
        self._ranks, self._num_top, self._top_token_ids = array("i"), array("i"), array("i")

    def add(self, logprobs: Logprobs) -> int:
        """Returns how many bytes more wait."""
        columns: list[array[Any]] = [
            self._logprobs,
            self._ranks,
            self._num_top,
            self._top_token_ids,
            self._top_logprobs,
        ]
        for column, new in zip(columns, logprobs[1:], strict=True):
            column.frombytes(new.tobytes())
        return sum(new.nbytes for new in logprobs[1:])

    def __iter__(self) -> Iterator[TokenLogprobs]:
        start = 0
        for logprob, rank, num_top in zip(self._logprobs, self._ranks, self._num_top, strict=True):
            stop = start + num_top
            tops = zip(self._top_token_ids[start:stop], self._top_logprobs[start:stop], strict=True)
            yield TokenLogprobs(logprob, rank, list(tops))
            start = stop

    def take(self, num_tokens: int) -> list[TokenLogprobs]:
        """Those of the first tokens; fewer where there are fewer."""
        taken = list(islice(self, num_tokens))
        start = sum(self._num_top[:num_tokens])
        for column in (self._logprobs, self._ranks, self._num_top):
            del column[:num_tokens]
        for column in (self._top_token_ids, self._top_logprobs):
            del column[:start]
        return taken


class PromptLogprobs:
    """Of a request's prompt: they come from one of its sequences, and each of its completions tells them.

    Attributes:
        num_missing: tokens whose logprobs have not come; the first token has none.
        num_bytes: that wait until all completions have told them.
    """

    def __init__(self, num_tokens: int, num_completions: int) -> None:
        self.num_missing = num_tokens - 1
        self.num_bytes = 0
        self._num_untold = num_completions
        self._waiting = WaitingLogprobs()

    def add(self, logprobs: Logprobs) -> None:
        self.num_bytes += self._waiting.add(logprobs)
        self.num_missing -= len(logprobs.logprobs)

    def give_up(self) -> None:
        """No more will come: what is not complete is not told."""
        if self.num_missing:
            self.num_missing = self.num_bytes = 0
            self._waiting = WaitingLogprobs()

    def tell(self) -> WaitingLogprobs:
        """For one completion."""
        self._num_untold -= 1
        if not self._num_untold:
            self.num_bytes = 0
        return self._waiting
