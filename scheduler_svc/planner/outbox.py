"""What the planner has for one front end and has not sent yet. The step loop fills it and never waits for it."""

import asyncio

import numpy as np

from albireo import cache_events
from albireo.arrays import Int32Array, Int64Array, pack_int32, pack_uint64
from albireo.logprobs import Logprobs, encode, join
from albireo.v1 import frontend_pb2
from scheduler_svc.planner.cache_follower import CacheFollower

_MAX_CACHE_CHANGES = 512  # of one message: telling all that is cached must not hold up tokens


class Outbox:
    """Tokens and ends that merge into one message however many steps they came from.

    Attributes:
        backlog_tokens: waiting; the likeliest ones of logprobs count like sampled ones, as do those of prompts.
    """

    def __init__(self) -> None:
        self._sequence_ids: list[Int64Array] = []
        self._token_ids: list[Int32Array] = []
        self._logprobs: list[Logprobs] = []
        self._prompt_logprobs: list[frontend_pb2.PromptLogprobs] = []
        self._num_tokens = 0
        self._ended: list[frontend_pb2.Ended] = []
        self._started: list[tuple[int, int]] = []
        self._load: frontend_pb2.Load | None = None
        self._filled = asyncio.Event()
        self._follower: CacheFollower | None = None
        self.backlog_tokens = 0

    def add_tokens(self, sequence_ids: Int64Array, token_ids: Int32Array, logprobs: Logprobs | None = None) -> None:
        """Two parallel arrays, in the order sampled; logprobs of some of the tokens."""
        if logprobs is not None and len(logprobs.indices):
            self._logprobs.append(logprobs._replace(indices=logprobs.indices + np.int32(self._num_tokens)))
            self.backlog_tokens += len(logprobs.top_token_ids)
        self._sequence_ids.append(sequence_ids)
        self._token_ids.append(token_ids)
        self._num_tokens += len(token_ids)
        self.backlog_tokens += len(token_ids)
        self._filled.set()

    def add_prompt_logprobs(self, sequence_id: int, first_position: int, logprobs: Logprobs) -> None:
        """Of consecutive tokens of a prompt."""
        self._prompt_logprobs.append(
            frontend_pb2.PromptLogprobs(
                sequence_id=sequence_id, first_position=first_position, logprobs=encode(logprobs)
            )
        )
        self.backlog_tokens += len(logprobs.indices) + len(logprobs.top_token_ids)
        self._filled.set()

    def add_started(self, sequence_id: int, num_cached_tokens: int) -> None:
        self._started.append((sequence_id, num_cached_tokens))
        self._filled.set()

    def add_ended(self, ended: frontend_pb2.Ended) -> None:
        self._ended.append(ended)
        self._filled.set()

    def set_load(self, load: frontend_pb2.Load) -> None:
        self._load = load
        self._filled.set()

    def follow_cache(self, follows: bool) -> CacheFollower | None:
        """From now on: whether messages tell what a new follower is told. Returns it."""
        self._follower = CacheFollower(self._filled.set) if follows else None
        return self._follower

    def wake(self) -> None:
        """Lets `take` return, with an empty message if need be."""
        self._filled.set()

    async def take(self) -> frontend_pb2.PlannerMessage:
        """Waits until there is something, and takes all of it."""
        await self._filled.wait()
        self._filled.clear()
        message = frontend_pb2.PlannerMessage(ended=self._ended, load=self._load)
        if self._token_ids:
            message.token_sequence_ids = pack_uint64(np.concatenate(self._sequence_ids))
            message.token_ids = pack_int32(np.concatenate(self._token_ids))
        if self._logprobs:
            message.logprobs.CopyFrom(encode(join(self._logprobs)))
            self._logprobs = []
        if self._prompt_logprobs:
            message.prompt_logprobs.extend(self._prompt_logprobs)
            self._prompt_logprobs = []
        if self._started:
            sequence_ids, num_cached_tokens = zip(*self._started, strict=True)
            message.started_sequence_ids = pack_uint64(sequence_ids)
            message.started_num_cached_tokens = pack_int32(num_cached_tokens)
        if self._follower is not None:
            message.cache_events.extend(cache_events.encode(self._follower.take(_MAX_CACHE_CHANGES)))
        self._sequence_ids, self._token_ids, self._ended, self._started, self._load = [], [], [], [], None
        self._num_tokens = self.backlog_tokens = 0
        return message
