"""What both client APIs run on: from a request's fields to its stream, and from any error to a gRPC status."""

import asyncio
import functools
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar

import structlog
from grpc import aio

from albireo.errors import AlbireoError, GroupUnavailable, Overloaded
from albireo.tracing import Span, Tracer
from albireo.v1 import plan_pb2
from scheduler_svc.frontend.calls import Context, refuse, trace_context_of
from scheduler_svc.frontend.config import FrontendConfig
from scheduler_svc.frontend.deadline import remaining_s
from scheduler_svc.frontend.link import PlannerLink
from scheduler_svc.frontend.metrics import Metrics
from scheduler_svc.frontend.model import ServedModel
from scheduler_svc.frontend.slots import WriteSlots
from scheduler_svc.frontend.spans import SPAN_NAME, request_attributes
from scheduler_svc.frontend.stream import RequestStream
from scheduler_svc.frontend.validation import GenerationRequest, Limits, RequestFields, check_text, validate

log = structlog.get_logger()

# Tokenising this much takes well below a millisecond; more goes to a thread.
_MAX_INLINE_CHARS = 2048
_MAX_LOGGED_CHARS = 256
_RETRY_AFTER_S = 1.0

_current_span: ContextVar[Span | None] = ContextVar("current_span", default=None)  # of a traced call


class Core:
    """One per front end."""

    def __init__(
        self,
        config: FrontendConfig,
        model: ServedModel,
        link: PlannerLink,
        metrics: Metrics,
        tracer: Tracer | None = None,
    ) -> None:
        self.model = model
        self.link = link
        self.metrics = metrics
        self.write_slots = WriteSlots(timeout_s=config.write_timeout)
        self.started_at = time.monotonic()
        self.last_received_at = 0.0  # of requests; seconds since the epoch
        self.num_open = 0  # Generate calls
        self._max_streams = config.max_streams
        self._backlog_bytes = config.max_backlog_kib << 10
        self._is_closing = False
        self._tracer = tracer
        self._left: asyncio.Future[None] | None = None  # a request has, since the last look
        self._tokenising = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenise")

    @property
    def group(self) -> plan_pb2.GroupInfo:
        """What the worker group is and can hold. Raises GroupUnavailable when requests cannot be taken."""
        if self._is_closing:
            raise GroupUnavailable("the server is shutting down")
        if self.link.group is None:
            raise GroupUnavailable("the model is loading")
        if not self.link.is_open:
            raise GroupUnavailable("there is no link to the planner")
        return self.link.group

    def check_serving(self) -> None:
        """Raises GroupUnavailable unless a request would run now. One that is taken may have to wait."""
        _ = self.group
        if not self.link.is_serving:
            raise GroupUnavailable("requests wait: the planner is gone, or its group makes no progress")

    async def idle(self) -> None:
        """Waits until no request runs."""
        while self.num_open:
            self._left = asyncio.get_running_loop().create_future()
            await self._left

    def refuse_new(self) -> None:
        """From now on no request is taken; what runs goes on."""
        self._is_closing = True

    async def open(self, fields: RequestFields, in_full: bool = False) -> RequestStream:
        """Validates a request and prepares its stream; entering that submits it."""
        arrived_at = time.monotonic()
        remaining_s(fields.deadline)  # one that is over at its arrival costs nothing more
        group = self.group
        limits = Limits(vocab_size=group.vocab_size, max_model_len=group.max_model_len)
        text = check_text(fields, limits)
        prompt_ids = await self._tokenise(text) if text is not None else fields.prompt
        assert prompt_ids is not None
        assert not isinstance(prompt_ids, str)
        request = await self._validate(fields, prompt_ids, limits)
        span = _current_span.get() if self._tracer is not None else None
        if span is not None:
            span.note(request_attributes(request, self.model.name))
        eos = frozenset(group.eos_token_ids)
        return RequestStream(
            request,
            eos,
            self.link,
            self.model.detokenizer,
            self.metrics,
            self.write_slots,
            self._backlog_bytes,
            arrived_at,
            in_full,
            span,
        )

    async def handle(
        self,
        context: Context,
        request_id: str,
        generate: Callable[[str], Awaitable[None]],
    ) -> None:
        """Runs one Generate call with its label; turns whatever goes wrong into a status of this call alone.

        A call without a label gets one: the empty label must not stand for all of them in Abort.
        """
        self.last_received_at = time.time()
        request_id = request_id or uuid.uuid4().hex
        outcome = "cancelled"
        span = self._tracer.begin(SPAN_NAME, trace_context_of(context)) if self._tracer is not None else None
        if span is not None:
            _current_span.set(span)
        self.num_open += 1
        try:
            if self.num_open > self._max_streams:
                raise Overloaded(f"{self._max_streams} requests are open, which is all that are taken", _RETRY_AFTER_S)
            await generate(request_id)
            outcome = "finished"
        except AlbireoError as error:
            outcome = error.status.name.lower()
            await refuse(context, error)
        except aio.InternalError:  # a write failed
            raise asyncio.CancelledError from None  # the client went away
        except Exception:
            outcome = "internal"
            log.exception("a request met a bug", request_id=request_id[:_MAX_LOGGED_CHARS])
            await refuse(context, AlbireoError("internal error"))
        finally:
            self.num_open -= 1
            if self._left is not None and not self._left.done():
                self._left.set_result(None)
            self.metrics.count_request(outcome)
            if span is not None:
                span.end(outcome)
            log_end = log.debug if outcome in ("finished", "cancelled") else log.info
            log_end("request", request_id=request_id[:_MAX_LOGGED_CHARS], outcome=outcome)

    def close(self) -> None:
        self._tokenising.shutdown(wait=False, cancel_futures=True)

    async def _validate(self, fields: RequestFields, prompt_ids: Sequence[int], limits: Limits) -> GenerationRequest:
        check = functools.partial(validate, fields, prompt_ids, limits, self.model.defaults, self._encode_word)
        if sum(map(len, fields.sampling.bad_words)) <= _MAX_INLINE_CHARS:
            return check()
        return await asyncio.get_running_loop().run_in_executor(self._tokenising, check)

    def _encode_word(self, text: str) -> Sequence[int]:
        ids: list[int] = self.model.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    async def _tokenise(self, text: str) -> Sequence[int]:
        # The batch call is the one that lets other threads run meanwhile.
        encode = self.model.tokenizer.encode_batch_fast
        if len(text) <= _MAX_INLINE_CHARS:
            encodings = encode([text])
        else:
            encodings = await asyncio.get_running_loop().run_in_executor(self._tokenising, encode, [text])
        ids: list[int] = encodings[0].ids
        return ids
