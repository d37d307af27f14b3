"""Bytes that are no valid request are the client's error: INVALID_ARGUMENT, where gRPC would say INTERNAL."""

import functools
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from grpc import aio

_Behaviour: TypeAlias = Callable[[Any, Any], Awaitable[Any]]
_Parse: TypeAlias = Callable[[bytes], Any]


@dataclass(frozen=True)
class _Malformed:
    """Stands for a request that could not be parsed."""

    reason: str


class RefuseMalformed(aio.ServerInterceptor):  # type: ignore[type-arg]  # takes none at run time
    """Covers the unary requests of the named services; all else passes unchanged."""

    def __init__(self, service_names: Collection[str]) -> None:
        self._prefixes = tuple(f"/{name}/" for name in service_names)
        self._guarded: dict[str, Any] = {}  # by method; they never change

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        method: str = handler_call_details.method
        if method in self._guarded:
            return self._guarded[method]
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or not method.startswith(self._prefixes):
            return handler
        self._guarded[method] = _guard(handler)
        return self._guarded[method]


def _guard(handler: Any) -> Any:
    parse = functools.partial(_parse, handler.request_deserializer)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(_checked(handler.unary_stream), parse, handler.response_serializer)
    return grpc.unary_unary_rpc_method_handler(_checked(handler.unary_unary), parse, handler.response_serializer)


def _parse(parse: _Parse, data: bytes) -> Any:
    try:
        return parse(data)
    except Exception as error:  # noqa: BLE001  # whatever the parser says of these bytes
        return _Malformed(f"the request is no valid {_message_name(parse)}: {error}")


def _message_name(parse: _Parse) -> str:
    """Of the message type whose ``FromString`` this is."""
    descriptor = getattr(getattr(parse, "__self__", None), "DESCRIPTOR", None)
    return getattr(descriptor, "full_name", "message")


def _checked(behaviour: _Behaviour) -> _Behaviour:
    async def check(request: Any, context: Any) -> Any:
        if isinstance(request, _Malformed):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, request.reason)
        return await behaviour(request, context)

    return check
