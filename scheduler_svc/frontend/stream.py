"""A request in flight, as its RPC handler sees it: completions to wait for and to take deltas from."""

import asyncio
from collections import deque
from types import TracebackType
from typing import Any

import grpc

from albireo.arrays import pack_float32, pack_int32
from albireo.errors import AlbireoError, Overloaded
from albireo.logprobs import Logprobs
from albireo.v1 import frontend_pb2, plan_pb2
from scheduler_svc.frontend.calls import Context
from scheduler_svc.frontend.completion import Completion, Delta
from scheduler_svc.frontend.deadline import remaining_s
from scheduler_svc.frontend.link import PlannerLink
from scheduler_svc.frontend.metrics import Metrics
from scheduler_svc.frontend.slots import WriteSlots
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
    ) -> None:
        self.request = request
        self._link = link
        self._metrics = metrics
        self._slots = slots
        self._backlog_bytes = backlog_bytes
        self._in_full = in_full
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
        end_ids = frozenset(request.stop_token_ids) | (frozenset() if request.ignore_eos else eos_token_ids)
        self._sequences = [
            _Sequence(self, _open_completion(i, request, end_ids, detokenizer)) for i in range(request.n)
        ]

    def __enter__(self) -> "RequestStream":
        submit = _submit(self.request)
        for sequence in self._sequences:
            submit.sampling.seed = self.request.seed_of(sequence.completion.index)
            sequence.sequence_id = self._link.submit(submit, sequence)
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

    async def next_delta(self) -> Delta | None:
        """Waits until a completion has something new and there is a slot to write it; returns everything new of the
        one that has waited longest. None: there is nothing more. Raises what the request failed with.

        The slot is held until the next call.
        """
        self._slots.leave(self)
        if self._error is None and self._num_unfinished:
            self._turn = self._loop.create_future()
            self._has_asked = False
            if self._ready:
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
        if delta.finish is not None:
            self._num_unfinished -= 1
        return delta

    def _ask(self) -> None:
        if not self._has_asked:
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


def _submit(request: GenerationRequest) -> frontend_pb2.Submit:
    """Raises DeadlineExceeded."""
    return frontend_pb2.Submit(
        request_id=request.request_id,
        token_ids=pack_int32(request.token_ids),
        max_tokens=request.max_tokens,
        sampling=_sampling(request),
        stop_token_ids=pack_int32(request.stop_token_ids),
        ignore_eos=request.ignore_eos,
        priority=request.priority,
        tenant=request.tenant,
        remaining_s=remaining_s(request.deadline),
        min_output_tokens=_min_output_tokens(request),
    )


def _sampling(request: GenerationRequest) -> plan_pb2.Sampling:
    logits = request.logits
    return plan_pb2.Sampling(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_tokens=request.min_tokens,
        min_p=logits.min_p,
        repetition_penalty=logits.repetition_penalty,
        presence_penalty=logits.presence_penalty,
        frequency_penalty=logits.frequency_penalty,
        bias_token_ids=pack_int32(logits.bias_token_ids),
        biases=pack_float32(logits.biases),
        allowed_token_ids=pack_int32(logits.allowed_token_ids),
        allowed_mask=logits.allowed_mask,
        bad_words=[pack_int32(word) for word in logits.bad_words],
        num_logprobs=logits.num_logprobs,
    )


def _min_output_tokens(request: GenerationRequest) -> int:
    """Each completion has so many tokens at least."""
    may_stop = request.stop or request.stop_token_ids or not request.ignore_eos
    return request.min_tokens if may_stop else request.max_tokens
