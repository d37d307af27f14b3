"""The front end's side of ``Planner.Attach``: one long-lived stream for all of its sequences."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeAlias

import grpc
import numpy as np
import structlog
from grpc import aio

from albireo.arrays import Int32Array, UInt64Array, unpack_int32, unpack_uint64
from albireo.errors import AlbireoError, GroupUnavailable
from albireo.rpc import make_channel
from albireo.v1 import frontend_pb2, frontend_pb2_grpc, plan_pb2

log = structlog.get_logger()

_Call: TypeAlias = "aio.StreamStreamCall[frontend_pb2.FrontendMessage, frontend_pb2.PlannerMessage]"

_FIRST_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 2.0


class Receiver(Protocol):
    """Takes what arrives for one sequence. Its methods run in the reader: they must be short and never wait."""

    def receive(self, token_ids: list[int], now: float) -> None:
        """New tokens; called at most once per message from the planner."""

    def end(self, ended: frontend_pb2.Ended) -> None:
        """The sequence is over; nothing comes after it."""

    def fail(self, error: AlbireoError) -> None:
        """The sequence is lost; nothing comes after it."""


class PlannerLink:
    """Sequence ids are ours, from 1 up, and never used twice.

    What is sent gathers in a pending message and goes out with one write per wake-up. The planner reads a message's
    fields in their order: submits, truncates, cancels, aborts.
    """

    def __init__(self, target: str, name: str) -> None:
        self.group: plan_pb2.GroupInfo | None = None  # known once connected
        self.load = frontend_pb2.Load()
        self._target = target
        self._name = name
        self._channel = make_channel(target)
        self._call: _Call | None = None
        self._receivers: dict[int, Receiver] = {}
        self._next_sequence_id = 1
        self._outbox: list[frontend_pb2.FrontendMessage] = []
        self._outbox_filled = asyncio.Event()
        self._is_up = False

    @property
    def is_up(self) -> bool:
        return self._is_up

    async def connect(self, timeout_s: float) -> plan_pb2.GroupInfo:
        """Waits until planner and worker group are ready; they may start after us and load for a long time.

        Raises GroupUnavailable when they are not within ``timeout_s``, or when the planner refuses.
        """
        log.info("waiting for the planner", planner=self._target)
        backoff_s = _FIRST_BACKOFF_S
        try:
            async with asyncio.timeout(timeout_s):
                while (group := await self._attach()) is None:
                    await asyncio.sleep(backoff_s)
                    backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
        except TimeoutError:
            await self.close()
            raise GroupUnavailable(f"planner {self._target}: not ready within {timeout_s:g} s") from None
        self.group = group
        self._is_up = True
        log.info("attached to the planner", planner=self._target, engine=group.engine, device=group.device)
        return group

    async def run(self) -> None:
        """Reads and writes until the stream is lost; then fails all sequences and raises GroupUnavailable."""
        assert self._call is not None, "connect first"
        writer = asyncio.create_task(self._write_all(self._call))
        try:
            async for message in self._call:
                self._dispatch(message)
            reason = "the planner closed the stream"
        except aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        except ValueError as error:
            reason = f"a message of the planner cannot be read: {error}"
        finally:
            self._is_up = False
            self._call.cancel()
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
        lost = GroupUnavailable(f"the link to the planner is lost ({reason})")
        self.fail_all(lost)
        raise lost

    def submit(self, submit: frontend_pb2.Submit, receiver: Receiver) -> int:
        """Queues a sequence; gives it an id and returns that. Raises GroupUnavailable when there is no planner."""
        if not self._is_up:
            raise GroupUnavailable("there is no link to the planner")
        sequence_id = submit.sequence_id = self._next_sequence_id
        self._next_sequence_id += 1
        self._receivers[sequence_id] = receiver
        if self._outbox and self._outbox[-1].abort_labels:
            # In the same message the abort would come after this sequence and end it, too.
            self._outbox.append(frontend_pb2.FrontendMessage())
        self._pending().submits.append(submit)
        return sequence_id

    def truncate(self, sequence_id: int, num_kept: int) -> None:
        """Ends a sequence at a stop string; nothing more comes for it."""
        if self._receivers.pop(sequence_id, None) is not None:
            self._pending().truncates.add(sequence_id=sequence_id, num_kept=num_kept)

    def cancel(self, sequence_id: int) -> None:
        """Ends a sequence whose client is gone; nothing more comes for it."""
        if self._receivers.pop(sequence_id, None) is not None:
            self._pending().cancels.append(sequence_id)

    def abort_labels(self, labels: Sequence[str]) -> None:
        """Asks the planner to end every sequence with one of these request ids, whichever front end it came by."""
        if self._is_up and labels:
            self._pending().abort_labels.extend(labels)

    def fail_all(self, error: AlbireoError) -> None:
        """Fails every sequence."""
        receivers, self._receivers = self._receivers, {}
        for sequence_id, receiver in receivers.items():
            if self._is_up:
                self._pending().cancels.append(sequence_id)
            receiver.fail(error)

    async def close(self) -> None:
        if self._call is not None:
            self._call.cancel()
        await self._channel.close(None)

    async def _attach(self) -> plan_pb2.GroupInfo | None:
        """One try. None when the planner is not there, or went away before it was ready."""
        stub = frontend_pb2_grpc.PlannerStub(self._channel)
        call: _Call = stub.Attach(wait_for_ready=True)  # type: ignore[call-arg]  # stubs know only iterators
        try:
            await call.write(frontend_pb2.FrontendMessage(hello=frontend_pb2.Hello(name=self._name)))
            message = await anext(aiter(call))
        except StopAsyncIteration:
            call.cancel()
            return None
        except aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.UNAVAILABLE:
                log.info("the planner is not ready", planner=self._target, reason=error.details())
                return None
            raise GroupUnavailable(f"planner {self._target}: {error.code().name}: {error.details()}") from error
        except asyncio.CancelledError:
            call.cancel()
            raise
        if not message.HasField("welcome"):
            call.cancel()
            raise GroupUnavailable(f"planner {self._target}: its first message is no Welcome")
        self._call = call
        return message.welcome.group

    def _pending(self) -> frontend_pb2.FrontendMessage:
        """The message that is written next; whoever asks for it adds to it."""
        if not self._outbox:
            self._outbox.append(frontend_pb2.FrontendMessage())
        self._outbox_filled.set()
        return self._outbox[-1]

    async def _write_all(self, call: _Call) -> None:
        while True:
            await self._outbox_filled.wait()
            self._outbox_filled.clear()
            messages, self._outbox = self._outbox, []
            for message in messages:
                try:
                    await call.write(message)
                except (aio.AioRpcError, asyncio.InvalidStateError):
                    return  # the reader sees why

    def _dispatch(self, message: frontend_pb2.PlannerMessage) -> None:
        now = time.monotonic()
        if message.token_ids:
            sequence_ids = unpack_uint64(message.token_sequence_ids)
            token_ids = unpack_int32(message.token_ids)
            for sequence_id, tokens in group_tokens(sequence_ids, token_ids):
                receiver = self._receivers.get(sequence_id)  # none: cancelled, or ended by a stop string
                if receiver is not None:
                    try:
                        receiver.receive(tokens, now)
                    except Exception:
                        log.exception("tokens could not be taken", sequence_id=sequence_id)
                        self._drop(sequence_id, receiver)
        for ended in message.ended:
            receiver = self._receivers.pop(ended.sequence_id, None)
            if receiver is not None:
                try:
                    receiver.end(ended)
                except Exception:
                    log.exception("an end could not be taken", sequence_id=ended.sequence_id)
                    self._drop(ended.sequence_id, receiver)
        if message.HasField("load"):
            self.load = message.load

    def _drop(self, sequence_id: int, receiver: Receiver) -> None:
        """A bug met one sequence: it fails, the others go on."""
        self.cancel(sequence_id)
        receiver.fail(AlbireoError("internal error"))


def group_tokens(sequence_ids: UInt64Array, token_ids: Int32Array) -> Iterator[tuple[int, list[int]]]:
    """Splits two parallel arrays by sequence; each sequence's tokens stay in their order.

    Raises ValueError when the arrays are not parallel.
    """
    if len(sequence_ids) != len(token_ids):
        raise ValueError(f"{len(sequence_ids)} sequence ids and {len(token_ids)} tokens")
    order = np.argsort(sequence_ids, kind="stable")
    ids = sequence_ids[order]
    starts = np.flatnonzero(np.concatenate(([True], ids[1:] != ids[:-1])))
    tokens = token_ids[order].tolist()
    bounds = [*starts.tolist(), len(tokens)]
    for sequence_id, start, stop in zip(ids[starts].tolist(), bounds, bounds[1:], strict=False):
        yield sequence_id, tokens[start:stop]
