"""Batch state of a rank: slot-indexed arrays that plans update in place, and the input batch of each step.

Every rank keeps the same state from the same plans, whatever its engine.
"""

from dataclasses import dataclass

import numpy as np

from albireo.arrays import BoolArray, Float32Array, Int32Array, Int64Array, UInt64Array, unpack_int32
from albireo.errors import GroupError
from albireo.plan import NewSequence, Rows, StepPlan, decode_rows
from albireo.v1 import plan_pb2

_INT32_MAX = 2**31 - 1
_MAX_STEP_ID = 2**63


@dataclass(frozen=True, slots=True)
class RowSampling:
    """Sampling parameters of a step's sampling rows; arrays [S], S rows.

    Attributes:
        temperature: 0 means greedy.
        top_p: 1 means all.
        top_k: 0 means all.
        suppressed: (row, ids that must not be sampled there now), for rows below their min_tokens.
    """

    temperature: Float32Array
    top_p: Float32Array
    top_k: Int32Array
    seed: UInt64Array
    suppressed: tuple[tuple[int, Int32Array], ...]


@dataclass(frozen=True, slots=True)
class InputBatch:
    """Inputs of one step: N tokens of R rows, of which S rows sample.

    Attributes:
        slots: [R].
        query_starts: [R + 1], where each row's tokens begin in the flat arrays; the last is N.
        context_lens: [R], tokens of the row's sequence with KV after this step.
        block_tables: [R, widest], blocks of each row's sequence; what lies past its context is undefined.
        token_ids: [N]; undefined where ``from_last_token``.
        from_last_token: [N], whether the token is the one last sampled in the row's slot (read on the device).
        token_slots: [N], the slot of each token.
        positions: [N].
        slot_mapping: [N], where each token's KV goes: block * block_size + offset.
        sample_rows: [S], the rows that sample, ascending.
        sample_slots: [S], their slots: where to write the last token.
        output_positions: [S], index of the sampled token in its sequence's output.
        sampling: parameters of the sampling rows.
    """

    slots: Int32Array
    query_starts: Int64Array
    context_lens: Int32Array
    block_tables: Int32Array
    token_ids: Int32Array
    from_last_token: BoolArray
    token_slots: Int32Array
    positions: Int64Array
    slot_mapping: Int64Array
    sample_rows: Int64Array
    sample_slots: Int32Array
    output_positions: Int64Array
    sampling: RowSampling


class SlotSampling:
    """Sampling parameters by slot."""

    def __init__(self, max_num_seqs: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._temperature = np.zeros(max_num_seqs, dtype=np.float32)
        self._top_p = np.ones(max_num_seqs, dtype=np.float32)
        self._top_k = np.zeros(max_num_seqs, dtype=np.int32)
        self._seed = np.zeros(max_num_seqs, dtype=np.uint64)
        self._min_tokens = np.zeros(max_num_seqs, dtype=np.int32)
        self._suppressed = [np.zeros(0, dtype=np.int32)] * max_num_seqs

    def set(self, slot: int, sampling: plan_pb2.Sampling) -> None:
        self._temperature[slot] = sampling.temperature
        self._top_p[slot] = sampling.top_p
        self._top_k[slot] = min(sampling.top_k, _INT32_MAX)
        self._seed[slot] = sampling.seed
        self._min_tokens[slot] = min(sampling.min_tokens, _INT32_MAX)
        self._suppressed[slot] = unpack_int32(sampling.suppressed_token_ids)
        _check_range("suppressed token", self._suppressed[slot], 0, self._vocab_size)

    def rows(self, slots: Int32Array, output_positions: Int64Array) -> RowSampling:
        """The parameters of a step's sampling rows; a copy, since slots change hands while the step waits."""
        return RowSampling(
            temperature=self._temperature[slots],
            top_p=self._top_p[slots],
            top_k=self._top_k[slots],
            seed=self._seed[slots],
            suppressed=tuple(
                (int(row), self._suppressed[slots[row]])
                for row in np.flatnonzero(output_positions < self._min_tokens[slots])
            ),
        )


class BatchState:
    """What a rank knows of its sequences, by slot. `apply` is the only way to change it.

    Args:
        num_cache_blocks: that the group's KV cache has.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        num_cache_blocks: int,
        vocab_size: int,
        max_num_batched_tokens: int,
    ) -> None:
        self.block_size = block_size
        self._max_num_seqs = max_num_seqs
        self._max_model_len = max_model_len
        self._num_cache_blocks = num_cache_blocks
        self._max_num_batched_tokens = max_num_batched_tokens
        self._vocab_size = vocab_size
        max_blocks = -(-max_model_len // block_size)
        self.block_tables = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self.num_blocks = np.zeros(max_num_seqs, dtype=np.int32)
        # Tokens that came with the plan; later ones exist on the device only.
        self.known_tokens = np.zeros((max_num_seqs, max_model_len), dtype=np.int32)
        self.num_known_tokens = np.zeros(max_num_seqs, dtype=np.int32)
        self.num_prompt_tokens = np.zeros(max_num_seqs, dtype=np.int32)
        self.num_computed_tokens = np.zeros(max_num_seqs, dtype=np.int32)
        self.sampling = SlotSampling(max_num_seqs, vocab_size)
        self._epoch = 0
        self._next_step_id = 0
        self._row_slots = np.zeros(0, dtype=np.int32)

    @classmethod
    def of_group(cls, info: plan_pb2.GroupInfo, num_cache_blocks: int) -> "BatchState":
        return cls(
            max_num_seqs=info.max_num_seqs,
            max_model_len=info.max_model_len,
            block_size=info.block_size,
            num_cache_blocks=num_cache_blocks,
            vocab_size=info.vocab_size,
            max_num_batched_tokens=info.max_num_batched_tokens,
        )

    def apply(self, plan: StepPlan) -> InputBatch:
        """Applies a plan and returns the inputs of its step.

        Raises GroupError when the plan does not follow the last one or does not fit the state, which is half changed
        then: only a new epoch can follow.
        """
        try:
            return self._apply(plan)
        except GroupError:
            raise
        except Exception as error:  # whatever the bytes were, they must not end the process
            raise GroupError(f"step {plan.step_id} cannot be applied: {error!r}") from error

    def _apply(self, plan: StepPlan) -> InputBatch:
        self._check_order(plan)
        self._check_slots("finished", plan.finished_slots)
        for new in plan.new_sequences:
            self._start_sequence(new)
        if len(plan.append_slots):
            self._append_blocks(plan.append_slots, plan.append_blocks)
        if plan.rows is None:
            rows = decode_rows(self._row_slots)
        else:
            rows = plan.rows
            self._check_slots("row", rows.slots)
            _check_range("scheduled tokens", rows.num_scheduled_tokens, 1, self._max_model_len + 1)
            if rows.num_scheduled_tokens.sum(dtype=np.int64) > self._max_num_batched_tokens:
                raise GroupError(f"more than {self._max_num_batched_tokens} tokens in a step")
            self._row_slots = rows.slots
        batch = self._input_batch(rows)
        self.num_computed_tokens[rows.slots] += rows.num_scheduled_tokens
        return batch

    def _check_order(self, plan: StepPlan) -> None:
        if plan.epoch != self._epoch:
            if plan.epoch < self._epoch:
                raise GroupError(f"plan of epoch {plan.epoch} after epoch {self._epoch}")
            self._epoch, self._next_step_id = plan.epoch, plan.step_id
            for of_slots in (self.num_blocks, self.num_known_tokens, self.num_prompt_tokens, self.num_computed_tokens):
                of_slots[:] = 0
            self._row_slots = np.zeros(0, dtype=np.int32)
        if plan.step_id >= _MAX_STEP_ID:
            raise GroupError(f"step {plan.step_id}: no step follows that")
        if plan.step_id != self._next_step_id:
            raise GroupError(f"plan of step {plan.step_id} where step {self._next_step_id} follows")
        self._next_step_id += 1

    def _start_sequence(self, new: NewSequence) -> None:
        slot, num_tokens, num_blocks = new.slot, len(new.token_ids), len(new.block_table)
        if not 0 <= slot < self._max_num_seqs:
            raise GroupError(f"slot {slot} of {self._max_num_seqs}")
        if not 0 < num_tokens <= self._max_model_len or num_blocks > self.block_tables.shape[1]:
            raise GroupError(f"slot {slot}: {num_tokens} tokens in {num_blocks} blocks do not fit")
        if not (0 <= new.num_prompt_tokens <= num_tokens and 0 <= new.num_computed_tokens < num_tokens):
            raise GroupError(
                f"slot {slot}: {num_tokens} tokens, {new.num_prompt_tokens} of the prompt, "
                f"{new.num_computed_tokens} computed"
            )
        _check_range("token", new.token_ids, 0, self._vocab_size)
        _check_range("block", new.block_table, 0, self._num_cache_blocks)
        self.known_tokens[slot, :num_tokens] = new.token_ids
        self.num_known_tokens[slot] = num_tokens
        self.num_prompt_tokens[slot] = new.num_prompt_tokens
        self.num_computed_tokens[slot] = new.num_computed_tokens
        self.block_tables[slot, :num_blocks] = new.block_table
        self.num_blocks[slot] = num_blocks
        self.sampling.set(slot, new.sampling)

    def _check_slots(self, what: str, slots: Int32Array) -> None:
        _check_range(f"{what} slot", slots, 0, self._max_num_seqs)
        if len(slots) > 1 and np.bincount(slots).max() > 1:
            raise GroupError(f"a {what} slot is named twice")

    def _append_blocks(self, slots: Int32Array, blocks: Int32Array) -> None:
        self._check_slots("append", slots)
        _check_range("block", blocks, 0, self._num_cache_blocks)
        if (self.num_blocks[slots] == 0).any():
            raise GroupError("a slot without a sequence gets a block")
        self.block_tables[slots, self.num_blocks[slots]] = blocks
        self.num_blocks[slots] += 1

    def _input_batch(self, rows: Rows) -> InputBatch:
        slots, counts = rows.slots, rows.num_scheduled_tokens
        starts = np.zeros(len(slots) + 1, dtype=np.int64)
        np.cumsum(counts, out=starts[1:])
        computed = self.num_computed_tokens[slots]
        context_lens = computed + counts
        reach = np.minimum(self.num_blocks[slots] * self.block_size, self._max_model_len)
        if (context_lens > reach).any():
            raise GroupError("a row reaches past its sequence's blocks")
        token_slots = np.repeat(slots, counts)
        positions = np.arange(starts[-1], dtype=np.int64) + np.repeat(computed - starts[:-1], counts)
        num_blocks = -(-context_lens // self.block_size)
        sample_rows = np.flatnonzero(rows.samples)
        sample_slots = slots[sample_rows]
        output_positions = context_lens[sample_rows].astype(np.int64) - self.num_prompt_tokens[sample_slots]
        if (output_positions < 0).any():
            raise GroupError("a row samples inside its prompt")
        return InputBatch(
            slots=slots,
            query_starts=starts,
            context_lens=context_lens,
            block_tables=self.block_tables[slots, : num_blocks.max(initial=0)],
            token_ids=self.known_tokens[token_slots, positions],
            from_last_token=positions >= self.num_known_tokens[token_slots],
            token_slots=token_slots,
            positions=positions,
            slot_mapping=self.block_tables[token_slots, positions // self.block_size].astype(np.int64) * self.block_size
            + positions % self.block_size,
            sample_rows=sample_rows,
            sample_slots=sample_slots,
            output_positions=output_positions,
            sampling=self.sampling.rows(sample_slots, output_positions),
        )


def _check_range(what: str, values: Int32Array, start: int, stop: int) -> None:
    if len(values) and not (start <= values.min() and values.max() < stop):
        raise GroupError(f"{what} {values.min()} .. {values.max()}: not in {start} .. {stop - 1}")
