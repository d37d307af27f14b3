"""Sequences that run at the planner: who takes what comes for them, and all it takes to go on at another planner."""

from array import array
from typing import Protocol

import numpy as np

from albireo.arrays import pack_int32
from albireo.errors import AlbireoError
from albireo.logprobs import Logprobs
from albireo.v1 import frontend_pb2
from scheduler_svc.frontend.deadline import deadline_in, remaining_s


class Receiver(Protocol):
    """Takes what arrives for one sequence. Its methods run in the reader: they must be short and never wait."""

    def start(self, num_cached_tokens: int) -> None:
        """The sequence runs; so much of its prompt was in the prefix cache. Called once at most, before `receive`."""

    def score(self, logprobs: Logprobs) -> None:
        """Logprobs of more of its prompt's tokens, from the second one on. All come before `receive`."""

    def receive(self, token_ids: list[int], now: float, logprobs: Logprobs | None) -> None:
        """New tokens, and logprobs of all of them or none; called at most once per message from the planner."""

    def end(self, ended: frontend_pb2.Ended) -> None:
        """The sequence is over; nothing comes after it."""

    def fail(self, error: AlbireoError) -> None:
        """The sequence is lost; nothing comes after it."""


class Outstanding:
    """One sequence. What was submitted is kept, not copied: a request's sequences share it, and differ in id, seed, and
    whether they score the prompt.

    Attributes:
        has_started: at any planner; where it goes on, it is told as started once more.
        num_scored: so many tokens of the prompt have logprobs, the first included, which has none; 0: no others have.
        output: what has come so far.
    """

    __slots__ = (
        "_deadline",
        "_num_prompt_logprobs",
        "_seed",
        "_sequence_id",
        "_submit",
        "_was_sent",
        "has_started",
        "num_scored",
        "output",
        "receiver",
    )

    def __init__(self, submit: frontend_pb2.Submit, receiver: Receiver) -> None:
        self.receiver = receiver
        self.has_started = False
        self.num_scored = 0
        self.output = array("i")
        self._submit = submit
        self._sequence_id = submit.sequence_id
        self._seed = submit.sampling.seed
        self._num_prompt_logprobs = submit.num_prompt_logprobs if submit.HasField("num_prompt_logprobs") else None
        self._was_sent = False
        self._deadline = deadline_in(submit.remaining_s or None)

    def again(self, was_sent: bool) -> frontend_pb2.Submit:
        """What submits it to the next planner; ``was_sent``: to the last one. Raises DeadlineExceeded."""
        self._was_sent |= was_sent
        submit = frontend_pb2.Submit()
        submit.CopyFrom(self._submit)
        submit.sequence_id = self._sequence_id
        submit.sampling.seed = self._seed
        submit.ClearField("num_prompt_logprobs")
        if self._num_prompt_logprobs is not None:
            submit.num_prompt_logprobs = self._num_prompt_logprobs
            submit.num_scored_tokens = self.num_scored
        submit.remaining_s = remaining_s(self._deadline)
        submit.is_resumed = self._was_sent
        submit.output_token_ids = pack_int32(np.frombuffer(self.output, dtype=np.int32)) if self.output else b""
        return submit
