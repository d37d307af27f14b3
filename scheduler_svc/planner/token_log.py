"""Sampled tokens by slot."""

import numpy as np

from albireo.arrays import Int32Array, Int64Array

_NUM_ROWS = 32
_NONE = -1


class TokenLog:
    """What running sequences have sampled since they took their slots.

    A step's tokens are written side by side, into one of a few rows; when the rows are full, all tokens move to their
    slots' own places. Writing each to its place at once would touch a page per slot in every step, none of them cached.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int) -> None:
        self._rows = np.full((_NUM_ROWS, max_num_seqs), _NONE, dtype=np.int32)
        self._num_rows = 0
        self._moved = np.zeros((max_num_seqs, max_model_len), dtype=np.int32)
        self._num_moved = np.zeros(max_num_seqs, dtype=np.int64)

    def add(self, slots: Int64Array, token_ids: Int32Array) -> None:
        """One more token for each of ``slots``."""
        if self._num_rows == _NUM_ROWS:
            self._move()
        self._rows[self._num_rows, slots] = token_ids
        self._num_rows += 1

    def num_tokens(self, slot: int) -> int:
        return int(self._num_moved[slot] + (self._rows[: self._num_rows, slot] != _NONE).sum())

    def pop(self, slot: int) -> Int32Array:
        """The tokens of a slot, which has none from then on."""
        recent = self._rows[: self._num_rows, slot]
        tokens = np.concatenate((self._moved[slot, : self._num_moved[slot]], recent[recent != _NONE]))
        recent[:] = _NONE
        self._num_moved[slot] = 0
        return tokens

    def _move(self) -> None:
        by_slot = self._rows.T
        slots, rows = (by_slot != _NONE).nonzero()
        num_new = np.bincount(slots, minlength=len(self._num_moved))
        places = np.arange(len(slots)) - np.repeat(num_new.cumsum() - num_new, num_new)  # within each slot's new ones
        self._moved[slots, self._num_moved[slots] + places] = by_slot[slots, rows]
        self._num_moved += num_new
        self._rows[:] = _NONE
        self._num_rows = 0
