"""What a process shows to others and asks of them: certificates (TLS) and tokens. By default nothing, on loopback."""

import ssl
from dataclasses import dataclass, field, fields
from pathlib import Path

import grpc

from albireo.config import flag
from albireo.errors import ConfigError
from albireo.identity import TokenFile


@dataclass(frozen=True)
class TlsFlags:
    """Files in PEM format; empty: none."""

    tls_cert: str = flag("", "certificate of this process, PEM: shown by its ports and to the servers it connects to")
    tls_key: str = flag("", "its private key, PEM")
    tls_ca: str = flag("", "authority of the servers that this process connects to, PEM; without it, no TLS to them")
    tls_server_name: str = flag("", "name in these servers' certificates, where it is not the host's")


@dataclass(frozen=True)
class SecurityFlags(TlsFlags):
    """Flags that all services share."""

    tls_client_ca: str = flag("", "authority of clients, PEM: without a certificate of it nobody gets in")
    auth_token_file: str = flag("", "lines NAME ROLE TOKEN, ROLE tenant, trusted or service: nobody else gets in")


SECURITY_FLAGS = tuple(each.name for each in fields(SecurityFlags))


@dataclass(frozen=True)
class Security:
    """The flags of a process, checked. Sockets of the file system carry no TLS: only their owner can open them.

    Attributes:
        tokens: of callers that are let in; None: tokens are not asked for.
        token: what a process without ``tokens`` shows to servers; empty: none.
    """

    flags: SecurityFlags = SecurityFlags()
    tokens: TokenFile | None = None
    token: str = field(default="", repr=False)

    @property
    def own_token(self) -> str:
        return self.tokens.tokens.own if self.tokens is not None else self.token

    @property
    def sends_token(self) -> bool:
        return self.tokens is not None or bool(self.token)

    @property
    def asks_for_certificates(self) -> bool:
        return bool(self.flags.tls_client_ca)

    def server_credentials(self) -> grpc.ServerCredentials | None:
        """None: no TLS."""
        flags = self.flags
        if not flags.tls_cert:
            return None
        pair = (_content(flags.tls_key), _content(flags.tls_cert))
        clients = _content(flags.tls_client_ca) if flags.tls_client_ca else None
        return grpc.ssl_server_credentials([pair], clients, require_client_auth=clients is not None)

    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        """None: no TLS."""
        flags = self.flags
        if not flags.tls_ca:
            return None
        key = _content(flags.tls_key) if flags.tls_key else None
        certificate = _content(flags.tls_cert) if flags.tls_cert else None
        return grpc.ssl_channel_credentials(_content(flags.tls_ca), key, certificate)


OPEN = Security()


def load_security(flags: SecurityFlags, token: str = "") -> Security:
    """Reads what the flags name. Raises ConfigError where that cannot be used."""
    _check_tls(flags)
    return Security(
        # Of a whole configuration only these are kept.
        SecurityFlags(**{name: getattr(flags, name) for name in SECURITY_FLAGS}),
        TokenFile(Path(flags.auth_token_file)) if flags.auth_token_file else None,
        token,
    )


def _check_tls(flags: SecurityFlags) -> None:
    if bool(flags.tls_cert) != bool(flags.tls_key):
        given, missing = ("--tls-cert", "--tls-key") if flags.tls_cert else ("--tls-key", "--tls-cert")
        raise ConfigError(f"{given} without {missing}: a certificate and its key go together")
    if flags.tls_client_ca and not flags.tls_cert:
        raise ConfigError("--tls-client-ca without --tls-cert: only ports with TLS see certificates")
    for name in ("tls_cert", "tls_key", "tls_ca", "tls_client_ca"):
        if getattr(flags, name):
            _content(getattr(flags, name), name)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for name in ("tls_ca", "tls_client_ca"):
        if path := getattr(flags, name):
            try:
                context.load_verify_locations(path)
            except ssl.SSLError as error:
                raise ConfigError(f"{_flag(name)} {path}: no certificate in PEM format ({error.reason})") from error
    if flags.tls_cert:
        try:
            context.load_cert_chain(flags.tls_cert, flags.tls_key, password=_no_password)
        except ssl.SSLError as error:
            reason = error.reason or "not in PEM format"
            pair = f"--tls-cert {flags.tls_cert} and --tls-key {flags.tls_key}"
            raise ConfigError(f"{pair}: not a certificate and its key ({reason})") from error


def _no_password() -> str:
    raise ConfigError("--tls-key: encrypted; a service has nobody to ask for its password")


def _content(path: str, name: str = "") -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{_flag(name)} {path}: {error.strerror}".lstrip()) from error


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-") if name else ""
