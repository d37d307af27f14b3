"""What both client APIs run on: from a request's fields to its stream, and from any error to a gRPC status."""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import grpc
import structlog

from albireo.errors import AlbireoError, GroupUnavailable
from albireo.v1 import plan_pb2
from scheduler_svc.frontend.link import PlannerLink
from scheduler_svc.frontend.metrics import Metrics
from scheduler_svc.frontend.model import ServedModel
from scheduler_svc.frontend.slots import WriteSlots
from scheduler_svc.frontend.stream import RequestStream
from scheduler_svc.frontend.validation import Limits, RequestFields, check_text, validate

log = structlog.get_logger()

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"  # a string: the class takes no parameters at run time

# Tokenising this much takes well below a millisecond; more goes to a thread.
_MAX_INLINE_CHARS = 2048


class Core:
    """One per front end."""

    def __init__(self, model: ServedModel, link: PlannerLink, metrics: Metrics) -> None:
        self.model = model
        self.link = link
        self.metrics = metrics
        self.write_slots = WriteSlots()
        self.started_at = time.monotonic()
        self.last_received_at = 0.0  # of requests; seconds since the epoch
        self._tokenising = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenise")

    @property
    def group(self) -> plan_pb2.GroupInfo:
        """What the worker group is and can hold. Raises GroupUnavailable when there is none."""
        if self.link.group is None:
            raise GroupUnavailable("the model is loading")
        if not self.link.is_up:
            raise GroupUnavailable("there is no link to the planner")
        return self.link.group

    async def open(self, fields: RequestFields, in_full: bool = False) -> RequestStream:
        """Validates a request and prepares its stream; entering that submits it."""
        arrived_at = time.monotonic()
        group = self.group
        limits = Limits(vocab_size=group.vocab_size, max_model_len=group.max_model_len)
        text = check_text(fields, limits)
        prompt_ids = await self._tokenise(text) if text is not None else fields.prompt
        assert prompt_ids is not None
        assert not isinstance(prompt_ids, str)
        request = validate(fields, prompt_ids, limits, self.model.defaults)
        eos = frozenset(group.eos_token_ids)
        return RequestStream(request, eos, self.link, self.model.detokenizer, self.metrics, arrived_at, in_full)

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
        try:
            await generate(request_id)
            outcome = "finished"
        except AlbireoError as error:
            outcome = error.status.name.lower()
            await context.abort(error.status, str(error))
        except Exception:
            if context.done():
                return  # the client went away during a write
            outcome = "internal"
            log.exception("a request met a bug", request_id=request_id)
            await context.abort(grpc.StatusCode.INTERNAL, "internal error")
        finally:
            self.metrics.count_request(outcome)
            log.info("request", request_id=request_id, outcome=outcome)

    def close(self) -> None:
        self._tokenising.shutdown(wait=False, cancel_futures=True)

    async def _tokenise(self, text: str) -> Sequence[int]:
        # The batch call is the one that lets other threads run meanwhile.
        encode = self.model.tokenizer.encode_batch_fast
        if len(text) <= _MAX_INLINE_CHARS:
            encodings = encode([text])
        else:
            encodings = await asyncio.get_running_loop().run_in_executor(self._tokenising, encode, [text])
        ids: list[int] = encodings[0].ids
        return ids


def tenant_of(context: Context) -> str | None:
    """The tenant that trusted metadata names."""
    for key, value in context.invocation_metadata() or ():
        if key == "x-tenant":
            return value if isinstance(value, str) else value.decode(errors="replace")
    return None
