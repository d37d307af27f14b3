"""Who gets in: callers of gRPC servers, before anything that they send is read, and readers of metrics pages."""

import functools
import inspect
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import grpc
from grpc import aio

from albireo.identity import ANYONE, Caller, Role, TokenFile, current_caller

_Behaviour: TypeAlias = Callable[[Any, Any], Any]
_Wsgi: TypeAlias = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]

_SCHEME = "Bearer "
ALL_ROLES = frozenset(Role)
OPERATORS = frozenset({Role.TRUSTED, Role.SERVICE})
SERVICES = frozenset({Role.SERVICE})


class Refusal(Exception):
    """This caller does not get in."""

    def __init__(self, status: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.status = status


def caller_with(tokens: TokenFile, authorization: str | None) -> Caller:
    """Whose token a header carries. Raises Refusal."""
    if authorization is None:
        raise Refusal(grpc.StatusCode.UNAUTHENTICATED, "no token; send authorization: Bearer TOKEN")
    known = None
    if authorization.startswith(_SCHEME):
        known = tokens.tokens.find(authorization.removeprefix(_SCHEME).strip())
    if known is None:
        raise Refusal(grpc.StatusCode.UNAUTHENTICATED, "the token is not known")
    return known


def check_role(who: Caller, roles: Collection[Role], what: str) -> None:
    """Raises Refusal."""
    if who.role not in roles:
        raise Refusal(grpc.StatusCode.PERMISSION_DENIED, f"{what} is not for the role {who.role.value}")


class Admit(aio.ServerInterceptor):  # type: ignore[type-arg]  # takes none at run time
    """Lets callers in by their token or, where there are certificates and no token, by their certificate.

    A call that is refused for its token is refused unread. `albireo.identity.current_caller` tells handlers who it is.

    Args:
        tokens: None: only certificates count.
        roles_for: who may call a method ("/package.Service/Method").
        takes_certificates: a certificate does in place of a token.
    """

    def __init__(
        self,
        tokens: TokenFile | None,
        roles_for: Callable[[str], Collection[Role]],
        takes_certificates: bool = False,
    ) -> None:
        self._tokens = tokens
        self._takes_certificates = takes_certificates
        self._roles_for = roles_for
        self._by_certificate: dict[str, Any] = {}  # handlers by method; they never change

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        method: str = handler_call_details.method
        authorization = _authorization(handler_call_details.invocation_metadata)
        if self._takes_certificates and (self._tokens is None or authorization is None):
            return await self._with_certificate(continuation, handler_call_details)
        assert self._tokens is not None
        try:
            who = caller_with(self._tokens, authorization)
            check_role(who, self._roles_for(method), method)
        except Refusal as refusal:
            return _refusing(refusal)
        current_caller.set(who)  # gRPC serves a call in one task, from here on
        return await continuation(handler_call_details)

    async def _with_certificate(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: Any
    ) -> Any:
        """The method's handler, which looks at the certificate first: only there gRPC shows it."""
        method: str = details.method
        if method not in self._by_certificate:
            handler = await continuation(details)
            if handler is None:
                return None
            admit = functools.partial(self._admit_by_certificate, method)
            self._by_certificate[method] = _checked(handler, admit)
        return self._by_certificate[method]

    def _admit_by_certificate(self, method: str, context: Any) -> Caller:
        """Raises Refusal. Without a certificate a caller is on this host's file system, and so this very user."""
        peer = context.auth_context()
        if peer.get("transport_security_type") != [b"ssl"]:
            if self._tokens is not None:
                raise Refusal(grpc.StatusCode.UNAUTHENTICATED, "no token; send authorization: Bearer TOKEN")
            return ANYONE
        name = certificate_name(peer)
        if not name:
            raise Refusal(grpc.StatusCode.UNAUTHENTICATED, "the certificate has no name")
        roles = self._tokens.tokens.roles if self._tokens is not None else {}
        who = Caller(name, roles.get(name, Role.TENANT))
        check_role(who, self._roles_for(method), method)
        return who


def certificate_name(peer: Mapping[str, Sequence[bytes]]) -> str:
    """The first alternative name (URI, else DNS) of a peer's certificate, else its common name; empty: none.

    Args:
        peer: what gRPC tells of it.
    """
    for kind in ("peer_uri", "peer_dns", "x509_common_name"):
        for name in peer.get(kind, ()):
            return name.decode(errors="replace")
    return ""


def guarded(page: _Wsgi, tokens: TokenFile) -> _Wsgi:
    """A page that only operators see; others get status 401 or 403."""

    def check(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        try:
            check_role(caller_with(tokens, environ.get("HTTP_AUTHORIZATION")), OPERATORS, "this page")
        except Refusal as refusal:
            is_unknown = refusal.status is grpc.StatusCode.UNAUTHENTICATED
            status = "401 Unauthorized" if is_unknown else "403 Forbidden"
            headers = [("Content-Type", "text/plain"), *([("WWW-Authenticate", "Bearer")] if is_unknown else [])]
            start_response(status, headers)
            return [f"{refusal}\n".encode()]
        return page(environ, start_response)

    return check


def _authorization(metadata: Any) -> str | None:
    for key, value in metadata or ():
        if key == "authorization":
            return value if isinstance(value, str) else str(value, errors="replace")
    return None


def _refusing(refusal: Refusal) -> Any:
    """A handler that reads nothing: of a stream gRPC waits for no message."""

    async def refuse(_messages: Any, context: Any) -> None:
        await context.abort(refusal.status, str(refusal))

    return grpc.stream_stream_rpc_method_handler(refuse)


def _checked(handler: Any, admit: Callable[[Any], Caller]) -> Any:
    kinds = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
    kind = next(each for each in kinds if getattr(handler, each) is not None)
    behaviour: _Behaviour = getattr(handler, kind)

    async def check(request: Any, context: Any) -> Any:
        try:
            current_caller.set(admit(context))
        except Refusal as refusal:
            await context.abort(refusal.status, str(refusal))
        answer = behaviour(request, context)
        if not inspect.isasyncgen(answer):
            return await answer
        async for message in answer:
            await context.write(message)
        return None

    return handler._replace(**{kind: check})
