"""Steps of rows that are all alike."""

from dataclasses import dataclass

import numpy as np

from albireo.arrays import Int32Array, Int64Array
from albireo_kernels import cpu
from albireo_kernels.cpu import BLOCK, StepData, make_step


@dataclass(frozen=True, slots=True)
class Sampling:
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True, slots=True)
class RowInputs:
    """Arrays of a step, as `make_step` takes them. The rows' blocks are anywhere in a pool of just as many."""

    token_rows: Int64Array
    positions: Int64Array
    slot_mapping: Int64Array
    query_starts: Int64Array
    context_lens: Int32Array
    block_tables: Int32Array

    @classmethod
    def of(cls, num_rows: int, tokens_per_row: int = 1, context: int = 1) -> "RowInputs":
        """
        Args:
            tokens_per_row: the last ones of a row's context.
        """
        num_blocks = num_rows * -(-context // BLOCK)
        tables = np.random.default_rng(0).permutation(num_blocks).astype(np.int32).reshape(num_rows, -1)
        token_rows = np.repeat(np.arange(num_rows), tokens_per_row)
        positions = np.tile(np.arange(context - tokens_per_row, context), num_rows)
        return cls(
            token_rows=token_rows,
            positions=positions,
            slot_mapping=tables[token_rows, positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK,
            query_starts=np.arange(num_rows + 1) * tokens_per_row,
            context_lens=np.full(num_rows, context, dtype=np.int32),
            block_tables=tables,
        )


def step_of(rows: RowInputs, *, token_ids: Int32Array | None = None, sampling: Sampling | None = None) -> StepData:
    """
    Args:
        token_ids: zeros if None.
        sampling: of every row, or of none.
    """
    num_tokens, num_rows = len(rows.token_rows), len(rows.context_lens)
    num_samples = num_rows if sampling else 0
    chosen = sampling or Sampling()
    return make_step(
        token_ids=np.zeros(num_tokens, dtype=np.int32) if token_ids is None else token_ids,
        from_last_token=np.zeros(num_tokens, dtype=np.bool_),
        token_slots=rows.token_rows.astype(np.int32),
        positions=rows.positions,
        slot_mapping=rows.slot_mapping,
        query_starts=rows.query_starts,
        context_lens=rows.context_lens,
        block_tables=rows.block_tables,
        sample_tokens=rows.query_starts[1 : num_samples + 1] - 1,
        sample_slots=np.arange(num_samples, dtype=np.int32),
        sampling=cpu.Sampling(
            temperature=np.full(num_samples, chosen.temperature, dtype=np.float32),
            top_p=np.full(num_samples, chosen.top_p, dtype=np.float32),
            min_p=np.zeros(num_samples, dtype=np.float32),
            top_k=np.full(num_samples, chosen.top_k, dtype=np.int32),
            noise_keys=np.random.default_rng(1).integers(0, 2**63, num_samples, dtype=np.uint64),
        ),
        last_tokens=np.zeros(num_rows, dtype=np.int32),
    )
