"""Batch state of a rank: slot-indexed arrays that plans update in place, and the input batch of each step.

Every rank keeps the same state from the same plans, whatever its engine.
"""

from dataclasses import dataclass, replace

import numpy as np

from albireo.arrays import BoolArray, Int32Array, Int64Array
from albireo.errors import GroupError
from albireo.limits import MAX_LOGPROBS
from albireo.plan import NewSequence, Rows, StepPlan, decode_rows
from albireo.v1 import plan_pb2
from worker_svc.row_sampling import RowSampling, SlotSampling, check_range
from worker_svc.step_layout import NO_ROWS, NONE_SCORED, Layout, Scored, scored_tokens

_MAX_STEP_ID = 2**63
_PAST_BLOCKS = "a row reaches past its sequence's blocks"

# Of each slot, in one array that a step gathers for its rows with a single call: num_blocks, num_known_tokens,
# num_prompt_tokens, num_computed_tokens.
_COUNTS = 4
# Columns that the block tables of a decode run have to grow into.
_SPARE_BLOCKS = 16


@dataclass(frozen=True, slots=True)
class History:
    """Tokens of a sequence that starts with this step, in a slot where sampling depends on them.

    Attributes:
        token_ids: the prompt and, when the sequence resumes, its output so far.
    """

    slot: int
    token_ids: Int32Array
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class InputBatch:
    """Inputs of one step: N tokens of R rows, and S sampling rows. The first K of these draw a token each, for K of the
    step's rows; the others score: each takes the token of a prompt that comes next, for the sake of its logprobs.

    Attributes:
        slots: [R].
        query_starts: [R + 1], where each row's tokens begin in the flat arrays; the last is N.
        context_lens: [R], tokens of the row's sequence with KV after this step.
        block_tables: [R, widest], blocks of each row's sequence; what lies past its context is undefined.
        token_ids: [N], of the vocabulary; which one is undefined where ``from_last_token``.
        from_last_token: [N], whether the token is the one last sampled in the row's slot (read on the device).
        token_slots: [N], the slot of each token.
        positions: [N].
        slot_mapping: [N], where each token's KV goes: block * block_size + offset.
        sample_tokens: [S], after which of the N tokens; none twice.
        sample_slots: [K], where to write the last token.
        scored_token_ids: [S - K].
        output_positions: [S], index of the sampled token in its sequence's output; 0 where a row scores.
        sampling: parameters of the sampling rows.
        histories: what the device must know before this step samples; tokens sampled later are added there.
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
    sample_tokens: Int64Array
    sample_slots: Int32Array
    scored_token_ids: Int32Array
    output_positions: Int64Array
    sampling: RowSampling
    histories: tuple[History, ...] = ()


@dataclass(slots=True)
class _DecodeRun:
    """A decode step whose rows the next plans may repeat: then inputs follow from those of the step before."""

    batch: InputBatch  # of the latest step; all its tokens are the slots' last ones, and none is suppressed
    first_offsets: Int64Array  # [R], of the first step's positions in their blocks
    longest: int  # the greatest of context_lens
    # [R, wider than needed]. Steps under way share it: a block is added past all that they read.
    block_tables: Int32Array
    row_of_slot: Int64Array  # -1: none
    num_repeats: int = 0

    def append(self, slots: Int32Array, places: Int32Array, blocks: Int32Array) -> bool:
        """Adds blocks of rows to the tables. False: that cannot be done, and the tables are not right any more."""
        rows = self.row_of_slot[slots]
        if rows.min() < 0 or places.max() >= self.block_tables.shape[1]:
            return False
        self.block_tables[rows, places] = blocks
        return True


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
        # Tokens that came with the plan; later ones exist on the device only.
        self.known_tokens = np.zeros((max_num_seqs, max_model_len), dtype=np.int32)
        self._counts = np.zeros((max_num_seqs, _COUNTS), dtype=np.int32)
        self.num_blocks = self._counts[:, 0]
        self.num_known_tokens = self._counts[:, 1]
        self.num_prompt_tokens = self._counts[:, 2]
        self.num_computed_tokens = self._counts[:, 3]
        self.sampling = SlotSampling(max_num_seqs, vocab_size)
        self._num_prompt_logprobs = np.full(max_num_seqs, -1, dtype=np.int32)  # -1: none
        self._histories: list[History] = []  # of the plan being applied
        self._epoch = 0
        self._next_step_id = 0
        self._layout = Layout.of(NO_ROWS)  # of the last plan
        self._run: _DecodeRun | None = None

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
        self.check_order(plan)
        self._next_step_id += 1
        if plan.rows is not None or plan.new_sequences:
            self._run = None
        if len(plan.finished_slots):
            self._check_slots("finished", plan.finished_slots)
        self._histories.clear()
        for new in plan.new_sequences:
            self._start_sequence(new)
        if len(plan.append_slots):
            self._append_blocks(plan.append_slots, plan.append_blocks)
        if self._run is not None:
            return self._repeat(self._run)
        if plan.rows is not None:
            self._layout = self._checked_layout(plan.rows)
        elif not self._layout.is_decode:
            self._layout = Layout.of(decode_rows(self._layout.rows.slots))
        batch = self._input_batch(self._layout)
        self._run = self._begin_run(batch) if self._layout.is_decode else None
        return batch

    def _checked_layout(self, rows: Rows) -> Layout:
        self._check_slots("row", rows.slots)
        check_range("scheduled tokens", rows.num_scheduled_tokens, 1, self._max_model_len + 1)
        layout = Layout.of(rows)
        if layout.starts[-1] > self._max_num_batched_tokens:
            raise GroupError(f"more than {self._max_num_batched_tokens} tokens in a step")
        return layout

    def check_order(self, plan: StepPlan) -> None:
        """Raises GroupError when the plan does not follow the last step. A new epoch forgets all slots."""
        if plan.epoch != self._epoch:
            if plan.epoch < self._epoch:
                raise GroupError(f"plan of epoch {plan.epoch} after epoch {self._epoch}")
            self._epoch, self._next_step_id = plan.epoch, plan.step_id
            self._counts[:] = 0
            self._layout, self._run = Layout.of(NO_ROWS), None
        if plan.step_id >= _MAX_STEP_ID:
            raise GroupError(f"step {plan.step_id}: no step follows that")
        if plan.step_id != self._next_step_id:
            raise GroupError(f"plan of step {plan.step_id} where step {self._next_step_id} follows")

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
        if new.num_prompt_logprobs is not None and new.num_prompt_logprobs > MAX_LOGPROBS:
            raise GroupError(f"slot {slot}: {new.num_prompt_logprobs} prompt logprobs; {MAX_LOGPROBS} at most")
        check_range("token", new.token_ids, 0, self._vocab_size)
        check_range("block", new.block_table, 0, self._num_cache_blocks)
        self.known_tokens[slot, :num_tokens] = new.token_ids
        self.num_known_tokens[slot] = num_tokens
        self.num_prompt_tokens[slot] = new.num_prompt_tokens
        self.num_computed_tokens[slot] = new.num_computed_tokens
        self.block_tables[slot, :num_blocks] = new.block_table
        self.num_blocks[slot] = num_blocks
        self._num_prompt_logprobs[slot] = (
            -1 if new.num_prompt_logprobs is None else min(new.num_prompt_logprobs, self._vocab_size)
        )
        if self.sampling.set(slot, new.sampling):
            self._histories.append(History(slot, new.token_ids, new.num_prompt_tokens))

    def _check_slots(self, what: str, slots: Int32Array) -> None:
        check_range(f"{what} slot", slots, 0, self._max_num_seqs)
        if len(set(slots.tolist())) < len(slots):
            raise GroupError(f"a {what} slot is named twice")

    def _append_blocks(self, slots: Int32Array, blocks: Int32Array) -> None:
        self._check_slots("append", slots)
        check_range("block", blocks, 0, self._num_cache_blocks)
        num_blocks = self.num_blocks[slots]
        if not num_blocks.all():
            raise GroupError("a slot without a sequence gets a block")
        self.block_tables[slots, num_blocks] = blocks
        self.num_blocks[slots] = num_blocks + 1
        if self._run is not None and not self._run.append(slots, num_blocks, blocks):
            self._run = None

    def _input_batch(self, layout: Layout) -> InputBatch:
        slots, counts, starts = layout.rows.slots, layout.rows.num_scheduled_tokens, layout.starts
        num_blocks, num_known, num_prompt, computed = self._counts[slots].T
        context_lens = computed + counts
        longest = int(context_lens.max(initial=0))
        if longest > self._max_model_len or (context_lens > num_blocks * self.block_size).any():
            raise GroupError(_PAST_BLOCKS)
        scored = NONE_SCORED
        if layout.is_decode:
            token_slots, positions = slots, computed.astype(np.int64)
            from_last_token = computed >= num_known
            output_positions = np.subtract(context_lens, num_prompt, dtype=np.int64)
        else:
            token_slots = np.repeat(slots, counts)
            positions = np.arange(starts[-1], dtype=np.int64) + np.repeat(computed - starts[:-1], counts)
            from_last_token = positions >= np.repeat(num_known, counts)
            output_positions = np.subtract(context_lens, num_prompt, dtype=np.int64)[layout.sample_rows]
            scored = scored_tokens(layout, computed, num_prompt)
        if output_positions.min(initial=0) < 0:
            raise GroupError("a row samples inside its prompt")
        block_indices, offsets = np.divmod(positions, self.block_size)
        slot_mapping = np.multiply(self.block_tables[token_slots, block_indices], self.block_size, dtype=np.int64)
        slot_mapping += offsets
        widest = -(-longest // self.block_size)
        self.num_computed_tokens[slots] = context_lens
        scored_num_logprobs = self._scored_num_logprobs(scored, len(layout.sample_rows))
        return InputBatch(
            slots=slots,
            query_starts=starts,
            context_lens=context_lens,
            block_tables=self.block_tables[:, :widest].take(slots, axis=0),
            token_ids=self._token_ids(token_slots, positions, from_last_token),
            from_last_token=from_last_token,
            token_slots=token_slots,
            positions=positions,
            slot_mapping=slot_mapping,
            sample_tokens=_with(layout.sample_tokens, scored.sample_tokens),
            sample_slots=layout.sample_slots,
            scored_token_ids=self.known_tokens[scored.slots, scored.prompt_positions],
            output_positions=_with(output_positions, np.zeros_like(scored.prompt_positions)),
            sampling=self.sampling.rows(layout.sample_slots, output_positions, scored_num_logprobs),
            histories=tuple(self._histories),
        )

    def _scored_num_logprobs(self, scored: Scored, num_samples: int) -> Int32Array:
        """Raises GroupError where tokens must not be scored."""
        num_logprobs = self._num_prompt_logprobs[scored.slots]
        if num_logprobs.min(initial=0) < 0:
            raise GroupError("a row scores where its sequence wants no prompt logprobs")
        if len(num_logprobs) + num_samples > self._max_num_seqs:
            raise GroupError(f"{len(num_logprobs)} tokens scored, {num_samples} sampled; {self._max_num_seqs} at most")
        return num_logprobs

    def _token_ids(self, token_slots: Int32Array, positions: Int64Array, from_last_token: BoolArray) -> Int32Array:
        token_ids = np.zeros(len(positions), dtype=np.int32)
        # Few but the prompts' own are known, and each look at another slot's tokens is a page that is not in the cache.
        (known,) = np.nonzero(~from_last_token)
        token_ids[known] = self.known_tokens[token_slots[known], positions[known]]
        return token_ids

    def _begin_run(self, batch: InputBatch) -> _DecodeRun | None:
        if not len(batch.slots) or not batch.sampling.lasts or not batch.from_last_token.all():
            return None
        row_of_slot = np.full(self._max_num_seqs, -1)
        row_of_slot[batch.slots] = np.arange(len(batch.slots))
        width = int(self.num_blocks[batch.slots].max()) + _SPARE_BLOCKS
        return _DecodeRun(
            batch,
            batch.positions % self.block_size,
            int(batch.context_lens.max()),
            self.block_tables[:, :width].take(batch.slots, axis=0),
            row_of_slot,
        )

    def _repeat(self, run: _DecodeRun) -> InputBatch:
        """One more token for each row of the step before. Everything has been checked then but what changes: whether
        rows that come to the end of a block have another."""
        last = run.batch
        run.num_repeats += 1
        run.longest += 1
        positions, context_lens = last.positions + 1, last.context_lens + 1
        slot_mapping = last.slot_mapping + 1
        (entering,) = np.nonzero(run.first_offsets == -run.num_repeats % self.block_size)
        if len(entering):
            slots, places = last.slots[entering], positions[entering] // self.block_size
            if (places >= self.num_blocks[slots]).any():
                raise GroupError(_PAST_BLOCKS)
            blocks = self.block_tables[slots, places]
            slot_mapping[entering] = np.multiply(blocks, self.block_size, dtype=np.int64)
        if run.longest > self._max_model_len:
            raise GroupError(_PAST_BLOCKS)
        self.num_computed_tokens[last.slots] = context_lens
        run.batch = replace(
            last,
            context_lens=context_lens,
            block_tables=run.block_tables[:, : -(-run.longest // self.block_size)],
            positions=positions,
            slot_mapping=slot_mapping,
            output_positions=last.output_positions + 1,
            histories=(),
        )
        return run.batch


def _with(values: Int64Array, more: Int64Array) -> Int64Array:
    return np.concatenate((values, more)) if len(more) else values
