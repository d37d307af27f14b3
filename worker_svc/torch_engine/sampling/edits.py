"""What is done to logits before temperature and filters, on any part of the vocabulary.

In the order that the oracle sets: biases, allowed ids, bad words, penalties. All are operations on single columns, so a
rank edits its own without knowing the others'.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from albireo.arrays import Int32Array, Int64Array, UInt32Array
from albireo_kernels.reference import to_device
from worker_svc.row_sampling import RowEdits, RowSampling
from worker_svc.torch_engine.sampling.state import MAX_WORD_PREFIX, NO_TOKEN, SlotState, Tails, TokenCounts

# Stands in a bad word's row before the word's first token, and equals anything.
_ANYTHING = NO_TOKEN - 1


class Penalties(NamedTuple):
    """Of n rows, [n] float32 on the device."""

    repetition: Tensor
    presence: Tensor
    frequency: Tensor


class NeedyRows(NamedTuple):
    """The sampling rows whose draws look at tokens before, ascending."""

    penalised: Int64Array
    with_words: Int64Array


def needy_rows(sampling: RowSampling) -> NeedyRows:
    with_words = [edits.row for edits in sampling.edits if edits.bad_words]
    penalised = np.flatnonzero(sampling.is_penalised) if sampling.has_penalties else np.zeros(0, dtype=np.int64)
    return NeedyRows(penalised, np.array(with_words, dtype=np.int64))


def edit_rows(
    logits: Tensor, ids: range, sampling: RowSampling, rows: Int64Array, slots: Int32Array, state: SlotState
) -> None:
    """Edits the logits of some of a step's sampling rows, in place.

    Args:
        logits: [n, len(ids)] float32, of the sampling rows ``rows`` [n], ascending.
        slots: [K], of all sampling rows that draw; no others have edits.
        state: of the token ids ``ids``; it has begun with this step.
    """
    if not len(ids):
        return
    place_of = np.full(len(sampling.temperature), -1, dtype=np.int64)
    place_of[rows] = np.arange(len(rows))
    edits = [(int(place_of[of_row.row]), of_row) for of_row in sampling.edits if place_of[of_row.row] >= 0]
    _add_biases(logits, ids, edits)
    _forbid_all_but_allowed(logits, ids, edits)
    words = [(place, word) for place, of_row in edits for word in of_row.bad_words if int(word[-1]) in ids]
    if words:
        word_slots = slots[rows[[place for place, _ in words]]]
        _forbid_bad_words(logits, ids.start, words, word_slots, state.tails)
    penalised = np.intersect1d(needy_rows(sampling).penalised, rows, assume_unique=True)
    if len(penalised):
        device = logits.device
        penalties = Penalties(
            *(
                to_device(values[penalised], device, torch.float32)
                for values in (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
            )
        )
        places = to_device(place_of[penalised], device)
        _penalise(logits, places, to_device(slots[penalised], device), penalties, state.counts)


_PlacedEdits = Iterable[tuple[int, RowEdits]]  # with the place of their row among the logits


def _add_biases(logits: Tensor, ids: range, edits: _PlacedEdits) -> None:
    biased = [(place, of_row, (of_row.ids >= ids.start) & (of_row.ids < ids.stop)) for place, of_row in edits]
    biased = [(place, of_row, is_here) for place, of_row, is_here in biased if is_here.any()]
    if not biased:
        return
    places = np.repeat([place for place, _, _ in biased], [is_here.sum() for _, _, is_here in biased])
    columns = np.concatenate([of_row.ids[is_here] for _, of_row, is_here in biased]) - ids.start
    biases = np.concatenate([of_row.biases[is_here] for _, of_row, is_here in biased])
    device = logits.device
    index = to_device(places, device), to_device(columns, device)
    logits.index_put_(index, to_device(biases, device, torch.float32), accumulate=True)


def _forbid_all_but_allowed(logits: Tensor, ids: range, edits: _PlacedEdits) -> None:
    limited: list[tuple[int, UInt32Array]] = [(place, e.allowed) for place, e in edits if e.allowed is not None]
    if not limited:
        return
    device, first_word = logits.device, ids.start // 32
    words = np.stack([allowed[first_word : (ids.stop - 1) // 32 + 1] for _, allowed in limited]).astype(np.int64)
    columns = torch.arange(ids.start, ids.stop, device=device)
    is_allowed = to_device(words, device)[:, (columns >> 5) - first_word] >> (columns & 31) & 1
    places = to_device(np.array([place for place, _ in limited]), device)
    logits[places] = torch.where(is_allowed.bool(), logits[places], -torch.inf)


def _forbid_bad_words(
    logits: Tensor, first_id: int, words: list[tuple[int, Int32Array]], slots: Int32Array, tails: Tails
) -> None:
    """Args:
    words: with the places of their rows among the logits; their last tokens have columns here.
    slots: of these rows.
    """
    prefixes = np.full((len(words), MAX_WORD_PREFIX), _ANYTHING, dtype=np.int64)
    for index, (_, word) in enumerate(words):
        prefixes[index, MAX_WORD_PREFIX - len(word) + 1 :] = word[:-1]
    device = logits.device
    wanted = to_device(prefixes, device)
    ends_so = ((tails.tokens[to_device(slots, device)] == wanted) | (wanted == _ANYTHING)).all(dim=1)
    places = to_device(np.array([place for place, _ in words]), device)
    columns = to_device(np.array([word[-1] for _, word in words]) - first_id, device)
    # Added, since two words of a row may end alike.
    logits.index_put_((places, columns), torch.where(ends_so, -torch.inf, 0.0), accumulate=True)


def _penalise(logits: Tensor, places: Tensor, slots: Tensor, penalties: Penalties, counts: TokenCounts) -> None:
    """Args:
    places: [n], which rows of the logits.
    slots: [n], of these rows.
    """
    repetition, presence, frequency = (values[:, None] for values in penalties)
    in_output = counts.in_output[slots]
    is_in_output = in_output > 0
    edited = logits[places]
    penalised = torch.where(edited > 0, edited / repetition, edited * repetition)
    edited = torch.where(is_in_output | counts.in_prompt[slots], penalised, edited)
    edited -= frequency * in_output
    edited -= presence * is_in_output
    logits[places] = edited
