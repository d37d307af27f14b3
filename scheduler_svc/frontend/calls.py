"""How a call ends and how it is written to: the parts of gRPC that a client can hold up."""

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any, TypeAlias

import grpc
from grpc import aio

from albireo.errors import AlbireoError
from albireo.identity import Role, current_caller

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"  # a string: the class takes no parameters at run time

_LAST_WORDS_S = 1.0


async def refuse(context: Context, error: AlbireoError) -> None:
    """Ends a call with the status of ``error``, and says when to try again where that is known.

    gRPC's own retry policies obey the metadata (gRFC A6); people read the message.

    A client that does not read is not waited for. gRPC has the status then, behind what the client has not read; the
    call stays with gRPC until the client reads it, cancels, or goes away. There is no way to reset it.
    """
    details = str(error)
    metadata: tuple[tuple[str, str], ...] = ()
    if error.retry_after_s > 0:
        details += f"; try again in {round(error.retry_after_s, 1):g} s"
        metadata = (("grpc-retry-pushback-ms", str(round(error.retry_after_s * 1000))),)
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                await context.abort(error.status, details, metadata)
    except aio.InternalError:
        raise asyncio.CancelledError from None  # the client went away


def tenant_of(context: Context) -> str:
    """Whose request this is: the caller's, unless that is trusted and names another one; empty: the default tenant."""
    return named_tenant(context) or current_caller.get().name


def named_tenant(context: Context) -> str | None:
    """Whom a request is restricted to: a tenant to itself, others to whom their metadata names; None: to nobody."""
    caller = current_caller.get()
    if caller.role is Role.TENANT:
        return caller.name
    for key, value in context.invocation_metadata() or ():
        if key == "x-tenant":
            return (value if isinstance(value, str) else value.decode(errors="replace")) or None
    return None


def trace_context_of(context: Context) -> Mapping[str, str]:
    """What a call's metadata says of the trace that it belongs to, by W3C's names."""
    metadata = context.invocation_metadata() or ()
    return {key: str(value) for key, value in metadata if key in ("traceparent", "tracestate")}
