"""A sequence's life: what the planner knows of it beside the arrays of its slot."""

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

from albireo.arrays import Int32Array
from albireo.v1 import plan_pb2


class Status(enum.Enum):
    WAITING = enum.auto()  # in the queue
    RUNNING = enum.auto()  # owns a slot
    DRAINING = enum.auto()  # preempted; steps in flight still sample for it, then it waits again
    ENDED = enum.auto()


class EndReason(enum.Enum):
    STOP = enum.auto()
    LENGTH = enum.auto()
    ABORT = enum.auto()


class Place(NamedTuple):
    """Place in the order of service: higher priority first, then earlier arrival. The last is preempted first."""

    negative_priority: int
    arrival: int


@dataclass(slots=True, eq=False)
class Sequence:
    """One completion from arrival to end.

    Attributes:
        frontend, sequence_id: whose it is, and what its owner calls it.
        token_ids: prompt, then the output known when it last left its slot; while it runs, more is in its slot.
        num_prompt_tokens: of ``token_ids``.
        max_total_tokens: where it ends at the latest, prompt included.
        stop_token_ids: ids that end it, the model's end-of-sequence ids included unless they are ignored.
        tenant: whose it is, by index.
        block_hashes: of the full blocks of ``token_ids``, as many as have been worked out; the first follows ``root``.
        cache_limit: so many free blocks with such hashes are kept at most; 0: any number.
        num_cached_tokens: of the prompt, found in blocks when it ran first; -1 before.
        min_output_tokens: it cannot end with fewer by itself.
        trace_parent: W3C trace context; empty: it is not traced.
        deadline_ns: when its client stops waiting, by the service's clock; 0: never.
        num_prompt_logprobs: of the likeliest tokens at each position of its prompt; None: its prompt is not scored.
        num_scored: so many tokens of its prompt have logprobs, or need none, as the first.
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
    tenant: int = 0
    root: bytes = b""
    cache_limit: int = 0
    block_hashes: list[bytes] = field(default_factory=list)
    num_cached_tokens: int = -1
    min_output_tokens: int = 1
    trace_parent: str = ""
    deadline_ns: int = 0
    num_prompt_logprobs: int | None = None
    num_scored: int = 1
    status: Status = Status.WAITING
    slot: int = -1
    last_step: int = -1  # when it finishes or leaves its slot: no step after this one has a row of it
    num_preemptions: int = 0
    num_losses: int = 0  # of its group while it ran, with no token in between
    num_tokens_at_loss: int = 0
    submitted_ns: int = 0
    scheduled_ns: int = 0
    first_token_ns: int = 0

    @property
    def has_begun(self) -> bool:
        """Whether it has ever had a slot."""
        return self.num_cached_tokens >= 0

    @property
    def has_output(self) -> bool:
        """Whether it had sampled anything when it last left its slot."""
        return len(self.token_ids) > self.num_prompt_tokens

    @property
    def is_scored(self) -> bool:
        """Whether all logprobs of its prompt are there that it wants."""
        return self.num_prompt_logprobs is None or self.num_scored >= self.num_prompt_tokens

    @property
    def num_shareable_tokens(self) -> int:
        """Of so many tokens it may take KV that is there already. It takes a forward pass to sample what comes after
        the last one, and to score what follows any other."""
        return len(self.token_ids) - 1 if self.is_scored else self.num_scored - 1

    def stops_at(self, token: int, num_tokens: int) -> bool:
        """Whether ``token``, with which it has ``num_tokens`` tokens, ends it before its length does. The first
        min_tokens of the output end it by length only."""
        return token in self.stop_token_ids and num_tokens > self.num_prompt_tokens + self.sampling.min_tokens
