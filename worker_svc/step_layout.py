"""What follows from a step's rows: where their tokens lie, and after which of them tokens are sampled or scored."""

from dataclasses import dataclass

import numpy as np

from albireo.arrays import EMPTY_INT32, Int32Array, Int64Array
from albireo.plan import Rows

NO_ROWS = Rows(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.bool_))


@dataclass(frozen=True, slots=True)
class Layout:
    """Of R rows, of which K sample.

    Attributes:
        is_decode: one sampled token of each row.
        starts: [R + 1], where each row's tokens begin; the last is their number.
        sample_rows: [K], ascending.
        sample_tokens: [K], the last token of each of these rows.
        sample_slots: [K].
    """

    rows: Rows
    is_decode: bool
    starts: Int64Array
    sample_rows: Int64Array
    sample_tokens: Int64Array
    sample_slots: Int32Array

    @classmethod
    def of(cls, rows: Rows) -> "Layout":
        starts = np.zeros(len(rows.slots) + 1, dtype=np.int64)
        np.cumsum(rows.num_scheduled_tokens, out=starts[1:])
        sample_rows = np.flatnonzero(rows.samples)
        # No row has less than one token.
        if len(sample_rows) == len(rows.slots) == starts[-1]:
            return cls(rows, True, starts, sample_rows, sample_rows, rows.slots)
        return cls(rows, False, starts, sample_rows, starts[sample_rows + 1] - 1, rows.slots[sample_rows])


@dataclass(frozen=True, slots=True)
class Scored:
    """The tokens of prompts that a step scores, in row order; arrays [of their number].

    Attributes:
        slots: whose they are.
        prompt_positions: where they stand.
        sample_tokens: which of the step's tokens they come after.
    """

    slots: Int32Array
    prompt_positions: Int64Array
    sample_tokens: Int64Array


NONE_SCORED = Scored(EMPTY_INT32, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))


def scored_tokens(layout: Layout, num_computed: Int32Array, num_prompt_tokens: Int32Array) -> Scored:
    """The tokens that follow the positions of the rows that score, as far as their prompts go.

    Args:
        num_computed: [R], before this step.
        num_prompt_tokens: [R].
    """
    if layout.rows.scores is None:
        return NONE_SCORED
    of_row = np.minimum(layout.rows.num_scheduled_tokens, num_prompt_tokens - 1 - num_computed)
    num = np.where(layout.rows.scores, np.maximum(of_row, 0), 0)
    places = np.arange(num.sum()) - np.repeat(np.cumsum(num) - num, num)  # of each token, among its row's
    return Scored(
        slots=np.repeat(layout.rows.slots, num),
        prompt_positions=places + np.repeat(num_computed + 1, num),
        sample_tokens=places + np.repeat(layout.starts[:-1], num),
    )
