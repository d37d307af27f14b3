"""The front end's side of ``Planner.Attach``: one long-lived stream for all of its sequences.

The stream may be lost and the planner may die: the link attaches again, to whoever listens there then, and submits what
still runs with the output that has come. The sequences go on where they were.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

import grpc
import structlog
from grpc import aio

from albireo import cache_events
from albireo.cache_events import Change
from albireo.errors import AlbireoError, DeadlineExceeded, GroupUnavailable
from albireo.ledger import FRONTEND_COLUMNS, Ledger
from albireo.rpc import make_channel
from albireo.security import OPEN, Security
from albireo.v1 import frontend_pb2, frontend_pb2_grpc, ledger_pb2, ledger_pb2_grpc, plan_pb2
from scheduler_svc.frontend.messages import (
    MAX_SUBMITS_BYTES,
    in_messages,
    logprobs_in,
    prompt_logprobs_in,
    started_in,
    tokens_in,
)
from scheduler_svc.frontend.outstanding import Outstanding, Receiver

log = structlog.get_logger()

_Call: TypeAlias = "aio.StreamStreamCall[frontend_pb2.FrontendMessage, frontend_pb2.PlannerMessage]"

_FIRST_BACKOFF_S = 0.05
_MAX_BACKOFF_S = 0.5
_WELCOME_TIMEOUT_S = 5.0  # a planner that listens welcomes at once
_LEDGER_TIMEOUT_S = 2.0


class PlannerLink:
    """Sequence ids are ours, from 1 up, and never used twice.

    What is sent gathers in a pending message and goes out with one write per wake-up. The planner reads a message's
    fields in their order: submits, truncates, cancels, aborts.

    Attributes:
        group: known once connected.
        load: the planner's latest figures.
        ledger: one row per message with tokens.
        on_change: called when `is_serving` may have changed.
        on_load: called when there are new figures.
        on_cache_changes: called with what comes while the cache is followed, and shortly after.
    """

    def __init__(self, target: str, name: str, recovery_timeout_s: float = 30.0, security: Security = OPEN) -> None:
        self.group: plan_pb2.GroupInfo | None = None
        self.load = frontend_pb2.Load()
        self.ledger = Ledger(name, FRONTEND_COLUMNS)
        self.on_change: Callable[[], None] = lambda: None
        self.on_load: Callable[[], None] = lambda: None
        self.on_cache_changes: Callable[[Sequence[Change]], None] = lambda _: None
        self._target = target
        self._name = name
        self._recovery_timeout_s = recovery_timeout_s
        self._channel = make_channel(target, to_peer=True, security=security)
        self._call: _Call | None = None
        self._sequences: dict[int, Outstanding] = {}
        self._next_sequence_id = 1
        self._outbox: list[frontend_pb2.FrontendMessage] = []
        self._outbox_filled = asyncio.Event()
        self._num_submit_bytes = 0  # in the outbox's last message
        self._is_attached = False
        self._is_open = False
        self._follows_cache = False

    @property
    def is_open(self) -> bool:
        """Whether sequences may be submitted: attached, or not lost for long; then they wait here."""
        return self._is_open

    @property
    def is_serving(self) -> bool:
        """Attached to a planner whose group makes progress."""
        return self._is_attached and self.load.is_serving

    async def connect(self, timeout_s: float) -> plan_pb2.GroupInfo:
        """Waits until planner and worker group are ready; they may start after us and load for a long time.

        Raises GroupUnavailable when they are not within ``timeout_s``, or when what answers is no planner.
        """
        log.info("waiting for the planner", planner=self._target)
        try:
            async with asyncio.timeout(timeout_s):
                self.group = await self._attach()
        except TimeoutError:
            await self.close()
            raise GroupUnavailable(f"planner {self._target}: not ready within {timeout_s:g} s") from None
        self._is_open = True
        return self.group

    async def run(self) -> None:
        """Keeps the link for ever. Raises GroupUnavailable when the planner serves something else than before."""
        while True:
            reason = await self._exchange()
            log.warning("the link to the planner is lost", reason=reason, sequences=len(self._sequences))
            self.on_change()
            await self._recover(f"the link to the planner is lost ({reason})")

    async def _exchange(self) -> str:
        """Reads and writes until the stream is lost; returns why."""
        assert self._call is not None, "connect first"
        writer = asyncio.create_task(self._write_all(self._call))
        try:
            async for message in self._call:
                self._dispatch(message)
            return "the planner closed the stream"
        except aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
        except ValueError as error:
            return f"a message of the planner cannot be read: {error}"
        finally:
            self._is_attached = False
            self._call.cancel()
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    async def _recover(self, reason: str) -> None:
        """Attaches again and submits what runs; past the recovery timeout it fails that, and keeps trying."""

        def give_up() -> None:
            log.error("the planner did not come back in time", planner=self._target, sequences=len(self._sequences))
            self._is_open = False
            self.fail_all(GroupUnavailable(f"{reason} and was not back within {self._recovery_timeout_s:g} s"))
            self._outbox.clear()

        lost_at = time.monotonic()
        deadline = asyncio.get_running_loop().call_later(self._recovery_timeout_s, give_up)
        try:
            group = await self._attach()
        finally:
            deadline.cancel()
        if _model_of(group) != _model_of(self.group):
            self._is_open = False
            changed = GroupUnavailable("the planner serves another model than before")
            self.fail_all(changed)
            raise changed
        self.group = group
        self._resubmit()
        self._is_open = True
        log.info("went on", sequences=len(self._sequences), after_s=round(time.monotonic() - lost_at, 3))

    def _resubmit(self) -> None:
        """Puts what ran at the lost planner in front of what was never sent to it; what has no time left fails."""
        unsent = {submit.sequence_id for message in self._outbox for submit in message.submits}
        submits: dict[int, frontend_pb2.Submit] = {}
        for sequence_id, sequence in list(self._sequences.items()):
            try:
                submits[sequence_id] = sequence.again(was_sent=sequence_id not in unsent)
            except DeadlineExceeded as error:
                del self._sequences[sequence_id]
                sequence.receiver.fail(error)
        for message in self._outbox:
            waiting = [submits.pop(one.sequence_id) for one in message.submits if one.sequence_id in submits]
            del message.submits[:]
            message.submits.extend(waiting)
        self._outbox = [*in_messages(submits.values()), *self._outbox]
        if self._follows_cache:
            self._pending().follows_cache = True
        if self._outbox:
            self._num_submit_bytes = self._outbox[-1].ByteSize()
            self._outbox_filled.set()

    def submit(self, submit: frontend_pb2.Submit, receiver: Receiver) -> int:
        """Queues a sequence; gives it an id and returns that. Raises GroupUnavailable when there is no planner.

        ``remaining_s`` counts from now, wherever and whenever the sequence runs. ``submit`` is kept: for another
        sequence of the same request it may be submitted again, with another seed, with prompt logprobs or without, and
        with no other change.
        """
        if not self._is_open:
            raise GroupUnavailable("there is no link to the planner")
        sequence_id = submit.sequence_id = self._next_sequence_id
        self._next_sequence_id += 1
        self._sequences[sequence_id] = Outstanding(submit, receiver)
        self._pending_with_room(submit.ByteSize()).submits.append(submit)
        return sequence_id

    def truncate(self, sequence_id: int, num_kept: int) -> None:
        """Ends a sequence at a stop string; nothing more comes for it."""
        if self._sequences.pop(sequence_id, None) is not None:
            self._pending().truncates.add(sequence_id=sequence_id, num_kept=num_kept)

    def cancel(self, sequence_id: int) -> None:
        """Ends a sequence whose client is gone; nothing more comes for it."""
        if self._sequences.pop(sequence_id, None) is not None:
            self._pending().cancels.append(sequence_id)

    def abort(self, labels: Sequence[str], tenant: str | None = None) -> None:
        """Asks the planner to end every sequence with one of these request ids, whichever front end it came by.

        Args:
            tenant: whose sequences; None: whoever's.
        """
        if self._is_open:
            for label in labels:
                self._pending().aborts.add(request_id=label, tenant=tenant)

    def flush_cache(self) -> None:
        """Asks the planner to forget what KV blocks hold."""
        if self._is_open:
            self._pending().flushes_cache = True

    def follow_cache(self, follows: bool) -> None:
        """From now on: whether the planner tells what changes in the prefix cache. First, and again after any loss,
        come a reset and all that is cached."""
        self._follows_cache = follows
        if self._is_open:
            self._pending().follows_cache = follows

    def fail_all(self, error: AlbireoError) -> None:
        """Fails every sequence."""
        sequences, self._sequences = self._sequences, {}
        for sequence_id, sequence in sequences.items():
            if self._is_attached:
                self._pending().cancels.append(sequence_id)
            sequence.receiver.fail(error)

    async def read_ledger(self, num_rows: int) -> ledger_pb2.LedgerPages:
        """The ledger's page, and those of the planner where that answers; ``num_rows`` as in ReadLedgerRequest."""
        pages = ledger_pb2.LedgerPages(pages=[self.ledger.page(num_rows)])
        stub = ledger_pb2_grpc.LedgerStub(self._channel)
        try:
            request = ledger_pb2.ReadLedgerRequest(num_rows=num_rows)
            pages.MergeFrom(await stub.Read(request, timeout=_LEDGER_TIMEOUT_S))
        except aio.AioRpcError as error:
            log.info("the planner's ledger cannot be read", reason=f"{error.code().name}: {error.details()}")
        return pages

    async def close(self) -> None:
        self._is_open = False
        if self._call is not None:
            self._call.cancel()
        await self._channel.close(None)

    async def _attach(self) -> plan_pb2.GroupInfo:
        """Tries until there is a planner. Raises GroupUnavailable when what answers is none."""
        backoff_s = _FIRST_BACKOFF_S
        while (message := await self._try_to_attach()) is None:
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
        group = message.welcome.group
        self.load = message.load
        self._is_attached = True
        self.on_change()
        log.info("attached to the planner", planner=self._target, engine=group.engine, device=group.device)
        return group

    async def _try_to_attach(self) -> frontend_pb2.PlannerMessage | None:
        """The planner's first message; None when it is not there, or went away before it was ready."""
        stub = frontend_pb2_grpc.PlannerStub(self._channel)
        call: _Call = stub.Attach(wait_for_ready=True)  # type: ignore[call-arg]  # stubs know only iterators
        welcomed = False
        try:
            async with asyncio.timeout(_WELCOME_TIMEOUT_S):
                await call.write(frontend_pb2.FrontendMessage(hello=frontend_pb2.Hello(name=self._name)))
                message = await anext(aiter(call))
            welcomed = message.HasField("welcome")
        except (StopAsyncIteration, TimeoutError, asyncio.InvalidStateError):
            return None
        except aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise GroupUnavailable(f"planner {self._target}: {error.code().name}: {error.details()}") from error
            log.info("the planner is not ready", planner=self._target, reason=error.details())
            return None
        finally:
            if not welcomed:
                call.cancel()
        if not welcomed:
            raise GroupUnavailable(f"planner {self._target}: its first message is no Welcome")
        self._call = call
        return message

    def _pending(self) -> frontend_pb2.FrontendMessage:
        """The message that is written next; whoever asks for it adds to it."""
        if not self._outbox:
            self._outbox.append(frontend_pb2.FrontendMessage())
        self._outbox_filled.set()
        return self._outbox[-1]

    def _pending_with_room(self, num_bytes: int) -> frontend_pb2.FrontendMessage:
        """The pending message, or a new one, for a submit of so many bytes."""
        pending = self._pending()
        is_full = pending.submits and self._num_submit_bytes + num_bytes > MAX_SUBMITS_BYTES
        # In the same message an abort would come after the submit and end its sequence, too.
        if is_full or pending.aborts:
            pending = frontend_pb2.FrontendMessage()
            self._outbox.append(pending)
        self._num_submit_bytes = num_bytes + (self._num_submit_bytes if pending.submits else 0)
        return pending

    async def _write_all(self, call: _Call) -> None:
        while True:
            await self._outbox_filled.wait()
            self._outbox_filled.clear()
            while self._outbox:  # what is not written when the stream is lost stays for the next one
                try:
                    await call.write(self._outbox.pop(0))
                except (aio.AioRpcError, asyncio.InvalidStateError):
                    return  # the reader sees why

    def _dispatch(self, message: frontend_pb2.PlannerMessage) -> None:
        """Spreads a message over its sequences. Raises ValueError when it cannot be read."""
        received_at_ns = time.monotonic_ns()
        started, tokens, logprobs = started_in(message), tokens_in(message), logprobs_in(message)
        scored = prompt_logprobs_in(message)
        now = received_at_ns / 1e9
        for sequence_id, num_cached_tokens in started:
            sequence = self._sequences.get(sequence_id)
            if sequence is not None and not sequence.has_started:
                sequence.has_started = True
                self._tell(sequence_id, sequence.receiver, sequence.receiver.start, num_cached_tokens)
        for sequence_id, first_position, of_prompt in scored:
            sequence = self._sequences.get(sequence_id)
            if sequence is not None:
                sequence.num_scored = first_position + len(of_prompt.indices)
                self._tell(sequence_id, sequence.receiver, sequence.receiver.score, of_prompt)
        for sequence_id, token_ids in tokens.items():
            sequence = self._sequences.get(sequence_id)  # none: cancelled, or ended by a stop string
            if sequence is not None:
                sequence.output.extend(token_ids)
                of_tokens = logprobs.get(sequence_id)
                self._tell(sequence_id, sequence.receiver, sequence.receiver.receive, token_ids, now, of_tokens)
        for ended in message.ended:
            sequence = self._sequences.pop(ended.sequence_id, None)
            if sequence is not None:
                self._tell(ended.sequence_id, sequence.receiver, sequence.receiver.end, ended)
        if tokens:
            num_tokens = sum(map(len, tokens.values()))
            self.ledger.add(received_at_ns, time.monotonic_ns(), len(tokens), num_tokens)
        if message.cache_events:
            self.on_cache_changes(cache_events.decode(message.cache_events))
        if message.HasField("load"):
            was_serving, self.load = self.load.is_serving, message.load
            self.on_load()
            if was_serving is not self.load.is_serving:
                self.on_change()

    def _tell(self, sequence_id: int, receiver: Receiver, tell: Callable[..., None], *args: object) -> None:
        """Calls a method of the receiver. A bug that it meets fails its sequence; the others go on."""
        try:
            tell(*args)
        except Exception:
            log.exception("a sequence met a bug", sequence_id=sequence_id)
            self.cancel(sequence_id)
            receiver.fail(AlbireoError("internal error"))


def _model_of(group: plan_pb2.GroupInfo | None) -> tuple[object, ...]:
    """What must not change while sequences live."""
    assert group is not None
    return group.vocab_size, group.max_model_len, tuple(group.eos_token_ids)
