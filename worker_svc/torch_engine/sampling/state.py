"""What sampling remembers of sequences, by slot and on the device: the tokens that penalties and bad words look at.

Tokens known to the plan come as a `History` when a sequence starts; each token sampled later is added here, before the
host knows it. A slot's history waits on the host until the slot samples: only then is it known what of it is needed.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from albireo.arrays import Int32Array
from albireo.limits import MAX_WORD_TOKENS
from albireo_kernels.reference import to_device
from worker_svc.batch import History

# Of a bad word but its last token; a word has 64 tokens at most.
MAX_WORD_PREFIX = MAX_WORD_TOKENS - 1
# A place before the output's first token.
NO_TOKEN = -1


class TokenCounts:
    """By slot, how often each token of a range occurs in the output, and whether it does in the prompt."""

    def __init__(self, num_slots: int, ids: range, device: torch.device) -> None:
        self._ids = ids
        self.in_output = torch.zeros((num_slots, len(ids)), dtype=torch.int32, device=device)
        self.in_prompt = torch.zeros((num_slots, len(ids)), dtype=torch.bool, device=device)

    def start(self, history: History) -> None:
        prompt, output = np.split(history.token_ids, [history.num_prompt_tokens])
        slot, device = history.slot, self.in_output.device
        self.in_prompt[slot] = False
        self.in_prompt[slot].index_fill_(0, to_device(np.unique(self._local(prompt)), device), True)
        self.in_output[slot] = 0
        ids, counts = np.unique(self._local(output), return_counts=True)
        self.in_output[slot].index_copy_(0, to_device(ids, device), to_device(counts, device, torch.int32))

    def add(self, slots: Tensor, tokens: Tensor) -> None:
        """One token [n] in each of some slots [n], all different."""
        if not len(self._ids):
            return
        places = tokens - self._ids.start
        is_local = (places >= 0) & (places < len(self._ids))
        places = places.clamp(0, len(self._ids) - 1)
        self.in_output.index_put_((slots, places), is_local.to(torch.int32), accumulate=True)

    def _local(self, tokens: Int32Array) -> Int32Array:
        local: Int32Array = tokens[(tokens >= self._ids.start) & (tokens < self._ids.stop)] - self._ids.start
        return local


class Tails:
    """By slot, the output's last tokens, the latest at the end; `NO_TOKEN` before its first."""

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self.tokens = torch.full((num_slots, MAX_WORD_PREFIX), NO_TOKEN, dtype=torch.int64, device=device)

    def start(self, history: History) -> None:
        output = history.token_ids[history.num_prompt_tokens :][-MAX_WORD_PREFIX:]
        tail = np.full(MAX_WORD_PREFIX, NO_TOKEN)
        tail[MAX_WORD_PREFIX - len(output) :] = output
        self.tokens[history.slot] = to_device(tail, self.tokens.device)

    def add(self, slots: Tensor, tokens: Tensor) -> None:
        """One token [n] in each of some slots [n], all different."""
        self.tokens[slots] = torch.cat((self.tokens[slots, 1:], tokens[:, None]), dim=1)


class SlotState:
    """Allocates what it holds when a row first needs it."""

    def __init__(self, num_slots: int, ids: range, device: torch.device) -> None:
        """``ids``: the part of the vocabulary whose logits are edited here."""
        self._num_slots = num_slots
        self._ids = ids
        self._device = device
        self._counts: TokenCounts | None = None
        self._tails: Tails | None = None
        # Histories of slots that have not sampled yet. Those of sequences that never did stay until the slot's next.
        self._waiting: dict[int, History] = {}

    @property
    def counts(self) -> TokenCounts:
        if self._counts is None:
            self._counts = TokenCounts(self._num_slots, self._ids, self._device)
        return self._counts

    @property
    def tails(self) -> Tails:
        if self._tails is None:
            self._tails = Tails(self._num_slots, self._device)
        return self._tails

    def expect(self, histories: Iterable[History]) -> None:
        """Sequences that start, in the order of the steps."""
        for history in histories:
            self._waiting[history.slot] = history

    def begin(self, penalised: Int32Array, with_words: Int32Array) -> None:
        """Before a step samples in these slots, by what their rows need."""
        needed = {*penalised.tolist(), *with_words.tolist()}
        started = {slot: self._waiting.pop(slot) for slot in needed & self._waiting.keys()}
        for slot in penalised.tolist():
            if slot in started:
                self.counts.start(started[slot])
        for slot in with_words.tolist():
            if slot in started:
                self.tails.start(started[slot])
