"""What the planner knows of sequences: an object per sequence for its life, arrays by slot for its steps."""

import enum
from dataclasses import dataclass, field

import numpy as np

from albireo.arrays import BoolArray, Int32Array, Int64Array
from albireo.v1 import plan_pb2

MAX_STOP_COLUMNS = 4  # stop ids of a sequence that are compared without Python work; more are rare


class Status(enum.Enum):
    WAITING = enum.auto()  # in the queue
    RUNNING = enum.auto()  # owns a slot
    DRAINING = enum.auto()  # preempted; steps in flight still sample for it, then it waits again
    ENDED = enum.auto()


class EndReason(enum.Enum):
    STOP = enum.auto()
    LENGTH = enum.auto()
    ABORT = enum.auto()


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Place in the order of service: higher priority first, then earlier arrival. The last is preempted first."""

    negative_priority: int
    arrival: int


@dataclass(slots=True, eq=False)
class Sequence:
    """One completion from arrival to end.

    Attributes:
        frontend, sequence_id: whose it is, and what its owner calls it.
        token_ids: prompt, then the output known when it last left its slot; while it runs the slot's row is newer.
        num_prompt_tokens: of ``token_ids``.
        max_total_tokens: where it ends at the latest, prompt included.
        stop_token_ids: ids that end it, beside the model's end-of-sequence ids.
        tenant: whose it is, by index.
        block_hashes: of the full blocks of ``token_ids``, as many as have been worked out; the first follows ``root``.
        num_cached_tokens: of the prompt, found in blocks when it ran first; -1 before.
        min_output_tokens: it cannot end with fewer by itself.
        deadline_ns: when its client stops waiting, by the service's clock; 0: never.
        latest_start_ns: when it is too late to start; 0: never.
    """

    frontend: int
    sequence_id: int
    request_id: str
    token_ids: Int32Array
    num_prompt_tokens: int
    max_total_tokens: int
    sampling: plan_pb2.Sampling
    place: Place
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    tenant: int = 0
    root: bytes = b""
    block_hashes: list[bytes] = field(default_factory=list)
    num_cached_tokens: int = -1
    min_output_tokens: int = 1
    deadline_ns: int = 0
    latest_start_ns: int = 0
    status: Status = Status.WAITING
    slot: int = -1
    last_step: int = -1  # the last step planned with a row of this sequence
    num_preemptions: int = 0
    num_losses: int = 0  # of its group while it ran, with no token in between
    num_tokens_at_loss: int = 0
    submitted_ns: int = 0
    scheduled_ns: int = 0
    first_token_ns: int = 0

    @property
    def min_total_tokens(self) -> int:
        """Before so many tokens nothing but length ends the sequence."""
        return self.num_prompt_tokens + self.sampling.min_tokens

    def stops_at(self, token: int, is_eos: bool, num_tokens: int) -> bool:
        """Whether ``token``, with which it has ``num_tokens`` tokens, ends it before its length does."""
        ends = (is_eos and not self.ignore_eos) or token in self.stop_token_ids
        return ends and num_tokens > self.min_total_tokens


@dataclass(slots=True)
class SlotTable:
    """Running sequences by slot: arrays [max_num_seqs], so that a decode step costs no Python work per sequence.

    Attributes:
        owners: the sequence of each slot.
        is_decoding: plans made so far compute the whole prompt.
        num_tokens: prompt, output and placeholders (tokens planned, not yet sampled).
        num_computed_tokens: tokens whose KV is computed once all planned steps have run.
        num_known_tokens: ``num_tokens`` without placeholders; ``token_ids`` holds so many.
        stop_token_ids: [max_num_seqs, MAX_STOP_COLUMNS], -1 where there is none.
        prefilling: slots whose prompts are in progress.
        num_with_stop_token_ids: of the running sequences; with none, nothing is compared.
        last_step: the last step planned with a row of this slot.
    """

    owners: list[Sequence | None]
    active: BoolArray
    is_decoding: BoolArray
    frontend: Int32Array
    sequence_id: Int64Array
    num_tokens: Int32Array
    num_computed_tokens: Int32Array
    num_known_tokens: Int32Array
    num_prompt_tokens: Int32Array
    min_total_tokens: Int32Array
    max_total_tokens: Int32Array
    checks_eos: BoolArray
    stop_token_ids: Int32Array
    has_more_stop_token_ids: BoolArray
    tenant: Int32Array
    last_step: Int64Array
    num_blocks: Int32Array
    block_tables: Int32Array  # [max_num_seqs, max_blocks]
    token_ids: Int32Array  # [max_num_seqs, max_model_len]
    free_slots: list[int] = field(default_factory=list)
    prefilling: list[int] = field(default_factory=list)
    num_with_stop_token_ids: int = 0

    @classmethod
    def make(cls, max_num_seqs: int, max_model_len: int, block_size: int) -> "SlotTable":
        def ints() -> Int32Array:
            return np.zeros(max_num_seqs, dtype=np.int32)

        return cls(
            owners=[None] * max_num_seqs,
            active=np.zeros(max_num_seqs, dtype=np.bool_),
            is_decoding=np.zeros(max_num_seqs, dtype=np.bool_),
            frontend=ints(),
            sequence_id=np.zeros(max_num_seqs, dtype=np.int64),
            num_tokens=ints(),
            num_computed_tokens=ints(),
            num_known_tokens=ints(),
            num_prompt_tokens=ints(),
            min_total_tokens=ints(),
            max_total_tokens=ints(),
            checks_eos=np.zeros(max_num_seqs, dtype=np.bool_),
            stop_token_ids=np.full((max_num_seqs, MAX_STOP_COLUMNS), -1, dtype=np.int32),
            has_more_stop_token_ids=np.zeros(max_num_seqs, dtype=np.bool_),
            tenant=ints(),
            last_step=np.full(max_num_seqs, -1, dtype=np.int64),
            num_blocks=ints(),
            block_tables=np.zeros((max_num_seqs, -(-max_model_len // block_size)), dtype=np.int32),
            token_ids=np.zeros((max_num_seqs, max_model_len), dtype=np.int32),
            free_slots=list(range(max_num_seqs - 1, -1, -1)),
        )

    def take(self, sequence: Sequence, blocks: list[int], num_computed_tokens: int) -> int:
        """Gives ``sequence`` a slot; one is free. ``blocks`` are for all of its tokens; of the first
        ``num_computed_tokens`` they hold the KV already."""
        slot = self.free_slots.pop()
        num_tokens = len(sequence.token_ids)
        self.owners[slot] = sequence
        self.active[slot] = True
        self.frontend[slot] = sequence.frontend
        self.sequence_id[slot] = sequence.sequence_id
        self.num_tokens[slot] = self.num_known_tokens[slot] = num_tokens
        self.num_computed_tokens[slot] = num_computed_tokens
        self.num_prompt_tokens[slot] = sequence.num_prompt_tokens
        self.min_total_tokens[slot] = sequence.min_total_tokens
        self.max_total_tokens[slot] = sequence.max_total_tokens
        self.checks_eos[slot] = not sequence.ignore_eos
        self._set_stop_token_ids(slot, sorted(sequence.stop_token_ids))
        self.tenant[slot] = sequence.tenant
        self.prefilling.append(slot)
        self.last_step[slot] = -1
        self.num_blocks[slot] = len(blocks)
        self.block_tables[slot, : len(blocks)] = blocks
        self.token_ids[slot, :num_tokens] = sequence.token_ids
        sequence.slot, sequence.status = slot, Status.RUNNING
        return slot

    def give_up(self, slot: int) -> Sequence:
        """Frees a slot; its sequence keeps the tokens known so far. Returns the sequence."""
        sequence = self.owners[slot]
        assert sequence is not None
        sequence.token_ids = self.token_ids[slot, : self.num_known_tokens[slot]].copy()
        sequence.last_step = int(self.last_step[slot])
        sequence.slot = -1
        self.owners[slot] = None
        self.active[slot] = False
        if self.is_decoding[slot]:
            self.is_decoding[slot] = False
        else:
            self.prefilling.remove(slot)
        self.num_with_stop_token_ids -= bool(sequence.stop_token_ids)
        self.free_slots.append(slot)
        return sequence

    def _set_stop_token_ids(self, slot: int, ids: list[int]) -> None:
        self.num_with_stop_token_ids += bool(ids)
        self.has_more_stop_token_ids[slot] = len(ids) > MAX_STOP_COLUMNS
        self.stop_token_ids[slot] = -1
        self.stop_token_ids[slot, : len(ids)] = ids[:MAX_STOP_COLUMNS]

    def blocks_of(self, slot: int) -> Int32Array:
        """The blocks that the slot's sequence holds (a copy)."""
        return self.block_tables[slot, : self.num_blocks[slot]].copy()
