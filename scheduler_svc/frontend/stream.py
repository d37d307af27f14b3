"""A request in flight, as its RPC handler sees it: completions to wait for and to take deltas from."""

import asyncio
from collections import deque
from types import TracebackType
from typing import Any

import grpc

from albireo.errors import AlbireoError, Overloaded
from albireo.logprobs import Logprobs
from albireo.tracing import Span
from albireo.v1 import frontend_pb2
from scheduler_svc.frontend.calls import Context
from scheduler_svc.frontend.completion import Completion, Delta
from scheduler_svc.frontend.link import PlannerLink
from scheduler_svc.frontend.logprobs import PromptLogprobs
from scheduler_svc.frontend.metrics import Metrics
from scheduler_svc.frontend.slots import WriteSlots
from scheduler_svc.frontend.spans import completion_attributes
from scheduler_svc.frontend.submit import submit_of
from scheduler_svc.frontend.text import Detokenizer, StopMatcher
from scheduler_svc.frontend.validation import GenerationRequest

_STATUS_OF_CODE: dict[int, grpc.StatusCode] = {status.value[0]: status for status in grpc.StatusCode}


class RequestRefused(AlbireoError):
    """The planner refused or failed a sequence; the status is its."""

    def __init__(self, refusal: frontend_pb2.Refusal) -> None:
        super().__init__(refusal.message)
        self.status = _STATUS_OF_CODE.get(refusal.code, grpc.StatusCode.INTERNAL)
        self.retry_after_s = refusal.retry_after_s


class RequestStream:
    """The sequences of one request. A context manager: entered, it submits them (raises DeadlineExceeded, and
    GroupUnavailable when there is no planner); on exit, what still runs is cancelled at the planner.

    Use, in one task: `next_delta` and `write`, until there is none. With ``in_full``, there is none before all
    completions are over. ``arrived_at`` is the request's arrival by the monotonic clock. Past ``backlog_bytes``,
    received from the planner and not taken (of an answer in full, that is all of it), the request fails.

    The handler sleeps until it has both something to write and a slot for writing, and is woken once for both: the
    stream is the `Writer` of its slot.
    """

    def __init__(
        self,
        request: GenerationRequest,
        eos_token_ids: frozenset[int],
        link: PlannerLink,
        detokenizer: Detokenizer,
        metrics: Metrics,
        slots: WriteSlots,
        backlog_bytes: int,
        arrived_at: float,
        in_full: bool = False,
        span: Span | None = None,
    ) -> None:
        self.request = request
        self._link = link
        self._metrics = metrics
        self._slots = slots
        self._backlog_bytes = backlog_bytes
        self._in_full = in_full
        self._span = span
        self._arrived_at = arrived_at
        self._ready: deque[_Sequence] = deque()
        self._loop = asyncio.get_running_loop()
        self._task = _current_task()
        self._turn: asyncio.Future[None] | None = None  # set when the handler may write, or must not wait any more
        self._has_asked = True  # for a slot
        self._error: AlbireoError | None = None
        self._has_written = self._is_writing = self._is_interrupted = False
        self._num_waiting_bytes = 0
        self._num_unfinished = request.n  # completions whose last delta was not taken
        self._num_running = request.n
        self._prompt_logprobs: PromptLogprobs | None = None
        if request.logits.num_prompt_logprobs is not None:
            self._prompt_logprobs = PromptLogprobs(len(request.token_ids), request.n)
        end_ids = frozenset(request.stop_token_ids) | (frozenset() if request.ignore_eos else eos_token_ids)
        self._sequences = [
            _Sequence(self, _open_completion(i, request, end_ids, detokenizer)) for i in range(request.n)
        ]

    def __enter__(self) -> "RequestStream":
        submit = submit_of(self.request)
        if self._span is not None:
            submit.trace_parent = self._span.trace_parent
        for sequence in self._sequences:
            submit.sampling.seed = self.request.seed_of(sequence.completion.index)
            sequence.sequence_id = self._link.submit(submit, sequence)
            submit.ClearField("num_prompt_logprobs")  # one sequence scores the prompt for all
        self._metrics.num_streams_open += 1
        self._metrics.num_prompt_tokens += len(self.request.token_ids)
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._metrics.num_streams_open -= 1
        self._slots.leave(self)
        for sequence in self._sequences:
            self._link.cancel(sequence.sequence_id)  # nothing where it is over
        if self._span is not None:
            self._span.note(completion_attributes([sequence.completion for sequence in self._sequences]))

    async def next_delta(self) -> Delta | None:
        """Waits until a completion has something new and there is a slot to write it; returns everything new of the
        one that has waited longest. None: there is nothing more. Raises what the request failed with.

        The slot is held until the next call.
        """
        self._slots.leave(self)
        if self._error is None and self._num_unfinished:
            self._turn = self._loop.create_future()
            self._has_asked = False
            self._ask()
            await self._turn
        if self._error is not None:
            raise self._error
        return self._take() if self._num_unfinished else None

    async def write(self, context: Context, message: Any) -> None:
        """Writes to the client. Raises what the request failed with, also meanwhile, and Overloaded when the client
        does not read.

        A write is pending while the client's flow-control window is full. It can be left, but not taken back.
        """
        if self._error is not None:
            raise self._error
        self._is_writing = True
        try:
            if not self._has_written:
                # Apart, because a status cannot follow headers that are part of a pending write.
                await context.send_initial_metadata(())
                self._has_written = True
            await context.write(message)
            self._metrics.num_responses += 1
        except asyncio.CancelledError:
            if self._is_interrupted and self._error is not None and not self._task.uncancel():
                raise self._error from None
            raise  # the client cancelled the call
        finally:
            self._is_writing = False

    def _take(self) -> Delta:
        sequence = self._ready.popleft()
        sequence.is_ready = False
        self._num_waiting_bytes -= sequence.completion.num_waiting_bytes
        delta = sequence.completion.take()
        if delta and delta.is_first and self._prompt_logprobs is not None:
            num_bytes = self._prompt_logprobs.num_bytes
            delta.prompt_logprobs = self._prompt_logprobs.tell()
            self._num_waiting_bytes -= num_bytes - self._prompt_logprobs.num_bytes
        if delta.finish is not None:
            self._num_unfinished -= 1
        return delta

    def _ask(self) -> None:
        """For a slot, where there is something to write. All waits for the logprobs of the prompt."""
        is_held = self._prompt_logprobs is not None and self._prompt_logprobs.num_missing
        if self._ready and not is_held and not self._has_asked:
            self._has_asked = True
            self._slots.ask(self)

    def may_write(self) -> None:
        if self._turn is not None and not self._turn.done():
            self._turn.set_result(None)

    def too_slow(self, pending_s: float) -> None:
        self.fail(Overloaded(f"the client reads too slowly: a write has been pending for {pending_s:g} s"))

    def received(self, num_bytes: int) -> None:
        """More waits to be taken."""
        self._num_waiting_bytes += num_bytes
        if self._num_waiting_bytes > self._backlog_bytes and self._error is None:
            most = f"{self._backlog_bytes >> 10} KiB"
            if self._in_full:
                self.fail(Overloaded(f"the answer in full takes more than {most}: stream it"))
            else:
                self.fail(Overloaded(f"the client reads too slowly: more than {most} wait for it"))

    def scored(self, logprobs: Logprobs | None) -> None:
        """Logprobs of more of the prompt's tokens came; None: no more will."""
        if self._prompt_logprobs is None:
            return
        num_bytes = self._prompt_logprobs.num_bytes
        if logprobs is None:
            self._prompt_logprobs.give_up()
        else:
            self._prompt_logprobs.add(logprobs)
        self.received(self._prompt_logprobs.num_bytes - num_bytes)
        self._ask()

    def first_token_came(self, now: float) -> None:
        self._metrics.time_to_first_token.observe(now - self._arrived_at)

    def changed(self, sequence: "_Sequence") -> None:
        """A sequence has something new, or is over."""
        if self._in_full:
            if sequence.completion.finish is None:
                return
            self._num_running -= 1
            if self._num_running:
                return
            self._ready.extend(self._sequences)
        elif not sequence.is_ready:
            sequence.is_ready = True
            self._ready.append(sequence)
        self._ask()

    def fail(self, error: AlbireoError) -> None:
        self._error = self._error or error
        self.may_write()
        if self._is_writing and not self._is_interrupted:
            self._is_interrupted = True
            self._task.cancel()


class _Sequence:
    """The link's receiver of one sequence: hands on to the completion, measures, wakes the handler."""

    __slots__ = ("_last", "_stream", "completion", "is_ready", "sequence_id")

    def __init__(self, stream: RequestStream, completion: Completion) -> None:
        self.completion = completion
        self.sequence_id = 0
        self.is_ready = False  # in the stream's queue
        self._stream = stream
        self._last = 0.0  # when tokens came; 0 before the first

    def start(self, num_cached_tokens: int) -> None:
        self.completion.num_cached_tokens = num_cached_tokens

    def score(self, logprobs: Logprobs) -> None:
        self._stream.scored(logprobs)

    def receive(self, token_ids: list[int], now: float, logprobs: Logprobs | None) -> None:
        stream = self._stream
        metrics = stream._metrics
        metrics.num_output_tokens += len(token_ids)
        if self._last:
            metrics.inter_token_latency.observe(now - self._last)
        else:
            stream.first_token_came(now)
        self._last = now
        num_waiting_bytes = self.completion.num_waiting_bytes
        num_kept = self.completion.receive(token_ids, logprobs)
        if num_kept is not None:
            stream._link.truncate(self.sequence_id, num_kept)
        stream.changed(self)
        stream.received(self.completion.num_waiting_bytes - num_waiting_bytes)

    def end(self, ended: frontend_pb2.Ended) -> None:
        if ended.HasField("refusal"):
            self._stream.fail(RequestRefused(ended.refusal))
            return
        if self.completion.index == 0:
            self._stream.scored(None)
        num_waiting_bytes = self.completion.num_waiting_bytes
        self.completion.end(ended)
        self._stream.changed(self)
        self._stream.received(self.completion.num_waiting_bytes - num_waiting_bytes)

    def fail(self, error: AlbireoError) -> None:
        self._stream.fail(error)


def _current_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


def _open_completion(
    index: int, request: GenerationRequest, end_ids: frozenset[int], detokenizer: Detokenizer
) -> Completion:
    matcher = StopMatcher(request.stop, request.include_stop_str_in_output) if request.stop else None
    needs_text = request.wants_text or matcher is not None
    return Completion(
        index,
        end_ids,
        request.wants_stop_token,
        request.min_tokens,
        detokenizer.open(request.skip_special_tokens) if needs_text else None,
        matcher,
    )
