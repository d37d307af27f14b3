"""Who is calling: names with a role, known by a token or by a certificate.

A file lists them, one ``NAME ROLE TOKEN`` per line; what follows a ``#`` that begins a word is a comment. A caller with
the token ``-`` is known by its certificate alone. A name may have several tokens, so that they can be replaced.
"""

import enum
import hashlib
import os
import re
import socket
import struct
import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import structlog

from albireo.errors import ConfigError

MIN_TOKEN_CHARS = 16
_MAX_NAME_CHARS = 128
_CERTIFICATE_ONLY = "-"
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750
_LOOK_AGAIN_S = 1.0
_UCRED = struct.Struct("3i")  # pid, uid, gid

log = structlog.get_logger()


class Role(enum.Enum):
    """What a caller may do; the value is the word in the file."""

    TENANT = "tenant"  # its requests are its own, whatever metadata says
    TRUSTED = "trusted"  # a gateway: names the tenant of each request in metadata
    SERVICE = "service"  # one of our own processes


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose call it is."""

    name: str
    role: Role


# Where nothing asks callers who they are, their metadata is believed.
ANYONE = Caller("", Role.TRUSTED)

# Of the call that this task serves.
current_caller: ContextVar[Caller] = ContextVar("current_caller", default=ANYONE)


@dataclass(frozen=True)
class Tokens:
    """What a token file says.

    Attributes:
        callers: by the SHA-256 of their token, so that how long a look-up takes says nothing about tokens.
        roles: by name.
        own: what our processes show to each other: the first token of a service.
    """

    callers: Mapping[bytes, Caller] = field(repr=False)
    roles: Mapping[str, Role]
    own: str = field(repr=False)

    def find(self, token: str) -> Caller | None:
        return self.callers.get(_digest(token))


def parse_tokens(text: str) -> Tokens:
    """Raises ValueError, which names the line, never the token."""
    callers: dict[bytes, Caller] = {}
    roles: dict[str, Role] = {}
    own = ""
    for number, line in enumerate(text.splitlines(), start=1):
        words = list(takewhile(lambda word: not word.startswith("#"), line.split()))
        if not words:
            continue
        try:
            caller, token = _parse_line(words)
            if roles.setdefault(caller.name, caller.role) is not caller.role:
                raise ValueError(f"{caller.name} has the role {roles[caller.name].value} already")
            if token != _CERTIFICATE_ONLY:
                if _digest(token) in callers:
                    raise ValueError("its token has been given to a line before")
                callers[_digest(token)] = caller
                own = own or (token if caller.role is Role.SERVICE else "")
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    if not own:
        raise ValueError("no token with the role service, which our processes show to each other")
    return Tokens(callers, roles, own)


def _parse_line(words: list[str]) -> tuple[Caller, str]:
    if len(words) != 3:
        raise ValueError(f"{len(words)} words; NAME ROLE TOKEN")
    name, role, token = words
    if not (name.isascii() and name.isprintable() and len(name) <= _MAX_NAME_CHARS):
        raise ValueError(f"name {name[:_MAX_NAME_CHARS]!r}: printable ASCII characters, {_MAX_NAME_CHARS} at most")
    if role not in {each.value for each in Role}:
        raise ValueError(f"role {role!r}: one of {', '.join(each.value for each in Role)}")
    if token != _CERTIFICATE_ONLY:
        check_token(token)
    return Caller(name, Role(role)), token


def check_token(token: str) -> None:
    """Raises ValueError, which does not show it, for one that is easy to guess or does not fit a header."""
    if len(token) < MIN_TOKEN_CHARS:
        raise ValueError(f"a token of {len(token)} characters; at least {MIN_TOKEN_CHARS}")
    if not _TOKEN.fullmatch(token):
        raise ValueError("a token with other characters than letters, digits and -._~+/=")


def check_same_user(connection: socket.socket) -> None:
    """Raises ValueError where the other end of a unix socket is another user's, root aside."""
    _, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    if uid not in (os.getuid(), 0):
        raise ValueError(f"it runs as user {uid}, we as {os.getuid()}")


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="surrogateescape")).digest()


class TokenFile:
    """A token file that is read again when it changes. One that cannot be read then leaves all as it was."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError where the file cannot be used."""
        self._path = path
        self._tokens, self._version = _read(path)
        self._look_at = time.monotonic() + _LOOK_AGAIN_S

    @property
    def tokens(self) -> Tokens:
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + _LOOK_AGAIN_S
            self._read_if_changed()
        return self._tokens

    def _read_if_changed(self) -> None:
        try:
            if _version(os.stat(self._path)) != self._version:
                self._tokens, self._version = _read(self._path)
                log.info("tokens are read again", file=str(self._path), names=len(self._tokens.roles))
        except (ConfigError, OSError) as error:
            log.error("tokens stay as they were", reason=str(error))


_Version = tuple[int, int, int]


def _version(status: os.stat_result) -> _Version:
    return status.st_ino, status.st_mtime_ns, status.st_size


def _read(path: Path) -> tuple[Tokens, _Version]:
    try:
        with path.open(encoding="utf-8") as file:
            status = os.fstat(file.fileno())
            tokens = parse_tokens(file.read())
    except OSError as error:
        raise ConfigError(f"--auth-token-file {path}: {error.strerror}") from error
    except ValueError as error:  # bytes that are no UTF-8 as well
        raise ConfigError(f"--auth-token-file {path}: {error}") from error
    if status.st_mode & 0o077:
        log.warning("others than its owner may read the tokens; chmod 600", file=str(path))
    return tokens, _version(status)
