"""Running sequences by slot."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from albireo.arrays import BoolArray, Int32Array, Int64Array
from scheduler_svc.planner.sequence import Sequence, Status
from scheduler_svc.planner.token_log import TokenLog

_NOBODY = -1


@dataclass(slots=True)
class SlotTable:
    """Arrays [max_num_seqs] for what happens to every sequence in every step, lists for what happens to few.

    A running sequence is in one of three phases. *Prefilling*: prompt tokens are still to be planned. *Decoding*: one
    token in each step. *Finishing*: its last token is in flight. A step takes it from one to the next.

    Attributes:
        owners: the sequence of each slot.
        tenant: the owner's, -1 where there is none.
        num_computed_tokens: tokens whose KV is computed once all planned steps have run.
        next_event: with so many computed tokens, a decoding sequence needs a block or has been promised its last token.
        is_decoding, prefilling, finishing: slots by phase.
        full: decoding slots that need a block for their next token.
        outputs: what has been sampled for the owners.
        is_stop: [vocab_size], ids that end some running sequence.
    """

    block_size: int
    owners: list[Sequence | None]
    tenant: Int32Array
    frontend: Int32Array
    sequence_id: Int64Array
    num_computed_tokens: Int32Array
    next_event: Int32Array
    is_decoding: BoolArray
    num_blocks: Int32Array
    block_tables: Int32Array  # [max_num_seqs, max_blocks]
    outputs: TokenLog
    is_stop: BoolArray
    free_slots: list[int]
    prefilling: list[int] = field(default_factory=list)
    finishing: list[int] = field(default_factory=list)
    full: list[int] = field(default_factory=list)
    _num_stopping: Counter[int] = field(default_factory=Counter)  # by id, how many running sequences it ends
    _decoding_slots: Int64Array | None = None  # of is_decoding; None: it has changed

    @classmethod
    def make(cls, max_num_seqs: int, max_model_len: int, block_size: int, vocab_size: int) -> "SlotTable":
        def ints() -> Int32Array:
            return np.zeros(max_num_seqs, dtype=np.int32)

        return cls(
            block_size=block_size,
            owners=[None] * max_num_seqs,
            tenant=np.full(max_num_seqs, _NOBODY, dtype=np.int32),
            frontend=ints(),
            sequence_id=np.zeros(max_num_seqs, dtype=np.int64),
            num_computed_tokens=ints(),
            next_event=ints(),
            is_decoding=np.zeros(max_num_seqs, dtype=np.bool_),
            num_blocks=ints(),
            block_tables=np.zeros((max_num_seqs, -(-max_model_len // block_size)), dtype=np.int32),
            outputs=TokenLog(max_num_seqs, max_model_len),
            is_stop=np.zeros(vocab_size, dtype=np.bool_),
            free_slots=list(range(max_num_seqs - 1, -1, -1)),
        )

    @property
    def num_running(self) -> int:
        return len(self.owners) - len(self.free_slots)

    @property
    def running(self) -> list[Sequence]:
        return [owner for owner in self.owners if owner is not None]

    @property
    def decoding_slots(self) -> Int64Array:
        """Ascending; the same object as long as they are the same."""
        if self._decoding_slots is None:
            self._decoding_slots = self.is_decoding.nonzero()[0]
        return self._decoding_slots

    def owner(self, slot: int) -> Sequence:
        owner = self.owners[slot]
        assert owner is not None
        return owner

    def blocks_of(self, slot: int) -> list[int]:
        """The blocks that the slot's sequence holds."""
        blocks: list[int] = self.block_tables[slot, : self.num_blocks[slot]].tolist()
        return blocks

    def take(self, sequence: Sequence, blocks: list[int], num_computed_tokens: int) -> int:
        """Gives ``sequence`` a slot; one is free. ``blocks`` are for all of its tokens; of the first
        ``num_computed_tokens`` they hold the KV already."""
        slot = self.free_slots.pop()
        self.owners[slot] = sequence
        self.tenant[slot] = sequence.tenant
        self.frontend[slot] = sequence.frontend
        self.sequence_id[slot] = sequence.sequence_id
        self.num_computed_tokens[slot] = num_computed_tokens
        self.num_blocks[slot] = len(blocks)
        self.block_tables[slot, : len(blocks)] = blocks
        self.prefilling.append(slot)
        for token in sequence.stop_token_ids:
            self._num_stopping[token] += 1
            self.is_stop[token] = True
        sequence.slot, sequence.status = slot, Status.RUNNING
        return slot

    def give_up(self, slot: int) -> Sequence:
        """Frees a slot; its sequence keeps the tokens known so far. Returns the sequence."""
        sequence = self.owner(slot)
        sequence.token_ids = np.concatenate((sequence.token_ids, self.outputs.pop(slot)))
        sequence.slot = -1
        self.owners[slot] = None
        self.tenant[slot] = _NOBODY
        if self.is_decoding[slot]:
            self._set_decoding(slot, False)
        for phase in (self.prefilling, self.finishing, self.full):
            if slot in phase:
                phase.remove(slot)
        for token in sequence.stop_token_ids:
            self._num_stopping[token] -= 1
            if not self._num_stopping[token]:
                del self._num_stopping[token]
                self.is_stop[token] = False
        self.free_slots.append(slot)
        return sequence

    def append_blocks(self, slots: list[int], blocks: list[int]) -> None:
        """Each of these full slots gets one more block."""
        for slot, block in zip(slots, blocks, strict=True):
            num_blocks = self.num_blocks[slot]
            self.block_tables[slot, num_blocks] = block
            self.num_blocks[slot] = num_blocks + 1
            self._set_next_event(slot)
        self.full = [slot for slot in self.full if slot not in slots]

    def advance_prompt(self, slot: int, num_tokens: int) -> bool:
        """``num_tokens`` more of a prompt are planned. Returns whether it ends with them: then it decodes."""
        num_computed = int(self.num_computed_tokens[slot]) + num_tokens
        self.num_computed_tokens[slot] = num_computed
        if num_computed < len(self.owner(slot).token_ids):
            return False
        self.prefilling.remove(slot)
        self._set_decoding(slot, True)
        self._set_next_event(slot)
        if num_computed == self.next_event[slot]:
            self._meet_event(slot)
        return True

    def advance_decodes(self, decodes: BoolArray) -> None:
        """One more token of each of these decoding slots [max_num_seqs] is planned."""
        self.num_computed_tokens += decodes
        for slot in (decodes & (self.num_computed_tokens == self.next_event)).nonzero()[0].tolist():
            self._meet_event(slot)

    def _meet_event(self, slot: int) -> None:
        if self.num_computed_tokens[slot] == self.owner(slot).max_total_tokens - 1:
            self._set_decoding(slot, False)
            self.finishing.append(slot)
        else:
            self.full.append(slot)

    def _set_next_event(self, slot: int) -> None:
        capacity = int(self.num_blocks[slot]) * self.block_size
        self.next_event[slot] = min(capacity, self.owner(slot).max_total_tokens - 1)

    def _set_decoding(self, slot: int, is_decoding: bool) -> None:
        self.is_decoding[slot] = is_decoding
        self._decoding_slots = None

    def num_blocks_of(self, slots: Iterable[int]) -> int:
        return sum(int(self.num_blocks[slot]) for slot in slots)
