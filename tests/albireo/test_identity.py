"""Who is calling: the token file, roles, certificates, and what a server makes of them."""

import os
import string
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo import identity, rpc
from albireo.errors import ConfigError
from albireo.identity import Caller, Role, TokenFile, parse_tokens
from albireo.security import OPEN, Security, SecurityFlags, load_security
from certificates import LOOPBACK, Authority, Pair
from services import free_port

OWN = "our-own-processes-token"
FILE = f"""
# NAME ROLE TOKEN
albireo service {OWN}       # ours
acme    tenant  acme-token-0123456
acme    tenant  acme-token-of-next-week
gateway trusted gateway-token-0123
spiffe://x/certified trusted -
"""

_names = st.text(string.ascii_letters + string.digits + "._-:/", min_size=1, max_size=128)
_tokens = st.text(string.ascii_letters + string.digits + "._~+/-", min_size=16, max_size=60)
_roles = st.sampled_from(Role)


def test_a_token_names_its_caller_and_its_role():
    tokens = parse_tokens(FILE)
    assert tokens.find(OWN) == Caller("albireo", Role.SERVICE)
    assert tokens.find("acme-token-of-next-week") == tokens.find("acme-token-0123456") == Caller("acme", Role.TENANT)
    assert tokens.find("gateway-token-0123") == Caller("gateway", Role.TRUSTED)
    assert tokens.find("-") is tokens.find("") is tokens.find("acme-token-012345") is None
    assert tokens.roles["spiffe://x/certified"] is Role.TRUSTED
    assert tokens.own == OWN


@settings(max_examples=50)
@given(st.lists(st.tuples(_names, _roles, _tokens), max_size=8, unique_by=(lambda line: line[0], lambda line: line[2])))
def test_every_written_line_is_found_again(lines: list[tuple[str, Role, str]]):
    text = "\n".join(f"  {name}\t{role.value} {token} # {token}" for name, role, token in lines)
    tokens = parse_tokens(f"{text}\n~ours service {OWN}~~\n")
    for name, role, token in lines:
        assert tokens.find(token) == Caller(name, role)
    own = [token for _, role, token in lines if role is Role.SERVICE]
    assert tokens.own == [*own, f"{OWN}~~"][0]
    assert len(tokens.callers) == len(lines) + 1


@given(st.text(max_size=200))
def test_whatever_the_text_only_named_callers_with_long_tokens_come_of_it(text: str):
    try:
        tokens = parse_tokens(text)
    except ValueError:
        return
    assert len(tokens.own) >= 16
    assert all(caller.name and " " not in caller.name for caller in tokens.callers.values())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("acme tenant", "2 words"),
        ("acme tenant 0123456789abcdef more", "4 words"),
        ("acme owner 0123456789abcdef", "role 'owner': one of tenant, trusted, service"),
        ("acme tenant 0123456789abcde", "15 characters; at least 16"),
        ("acme tenant 0123456789abcde!", "other characters"),
        ("acmé tenant 0123456789abcdef", "printable ASCII"),
        ("a" * 129 + " tenant 0123456789abcdef", "128 at most"),
        (f"acme tenant {OWN}", "its token has been given to a line before"),
        ("albireo tenant 0123456789abcdef", "albireo has the role service already"),
    ],
)
def test_a_wrong_line_is_named_without_its_token(line: str, reason: str):
    with pytest.raises(ValueError, match="line 2: ") as raised:
        parse_tokens(f"albireo service {OWN}\n{line}\n")
    assert reason in str(raised.value)
    assert OWN not in str(raised.value)
    assert "0123456789abcde" not in str(raised.value)


def test_a_file_without_a_token_for_our_own_processes_is_refused():
    with pytest.raises(ValueError, match="no token with the role service"):
        parse_tokens("acme tenant acme-token-0123456\nalbireo service -\n")


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_a_changed_file_is_read_again_and_a_broken_one_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(identity, "_LOOK_AGAIN_S", 0)
    path = write(tmp_path / "tokens", f"albireo service {OWN}\n")
    tokens = TokenFile(path)
    assert tokens.tokens.find("acme-token-0123456") is None
    write(path, FILE)
    assert tokens.tokens.find("acme-token-0123456") == Caller("acme", Role.TENANT)
    write(path, "acme tenant short\n")
    assert tokens.tokens.find("acme-token-0123456") == Caller("acme", Role.TENANT)
    path.unlink()
    assert tokens.tokens.find("acme-token-0123456") == Caller("acme", Role.TENANT)
    write(path, f"albireo service {OWN}\n")
    assert tokens.tokens.find("acme-token-0123456") is None


def test_nothing_that_is_logged_shows_a_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write(tmp_path / "tokens", FILE)
    path.chmod(0o644)
    security = load_security(SecurityFlags(auth_token_file=str(path)), "a-client's-own-token")
    assert "chmod 600" in capsys.readouterr().out
    shown = repr(security) + repr(security.tokens) + repr(security.tokens.tokens)
    assert not any(token in shown for token in (OWN, "acme-token", "client's-own"))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"), "ours")


def test_what_cannot_work_is_refused_with_flag_and_file(authority: Authority, tmp_path: Path):
    pair, other = authority.sign("one"), authority.sign("two")
    encrypted = tmp_path / "encrypted.key"
    encrypted.write_text(
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIGbMFcGCSqGSIb3DQ==\n-----END ENCRYPTED PRIVATE KEY-----\n"
    )
    for flags, reason in (
        ({"tls_cert": pair.cert}, "--tls-cert without --tls-key"),
        ({"tls_key": pair.key}, "--tls-key without --tls-cert"),
        ({"tls_client_ca": authority.path}, "--tls-client-ca without --tls-cert"),
        ({"tls_cert": pair.cert, "tls_key": other.key}, "not a certificate and its key"),
        ({"tls_cert": pair.cert, "tls_key": encrypted}, f"--tls-key {encrypted}"),
        ({"tls_cert": pair.key, "tls_key": pair.key}, "not a certificate and its key"),
        ({"tls_ca": tmp_path / "absent"}, f"--tls-ca {tmp_path}/absent: No such file"),
        ({"tls_ca": pair.key}, f"--tls-ca {pair.key}: no certificate in PEM format"),
        ({"auth_token_file": tmp_path / "absent"}, f"--auth-token-file {tmp_path}/absent: No such file"),
        ({"auth_token_file": pair.key}, f"--auth-token-file {pair.key}: line 1"),
    ):
        with pytest.raises(ConfigError) as raised:
            load_security(SecurityFlags(**{name: str(value) for name, value in flags.items()}))
        assert reason in str(raised.value)


class Asked(health_pb2_grpc.HealthServicer):
    """Answers any call; notes who was calling."""

    def __init__(self) -> None:
        self.callers: list[Caller] = []

    async def Check(self, request, context):
        self.callers.append(identity.current_caller.get())
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    async def Watch(self, request, context):
        self.callers.append(identity.current_caller.get())
        for _ in range(3):
            yield health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


@asynccontextmanager
async def serving(tmp_path: Path, security: Security, **options: object) -> AsyncIterator[tuple[Asked, str, str]]:
    """A server; its host:port and its socket."""
    server = rpc.make_server(security=security, **options)
    health_pb2_grpc.add_HealthServicer_to_server(asked := Asked(), server)
    addresses = f"127.0.0.1:{free_port()}", f"unix:{tmp_path}/s.sock"
    for address in addresses:
        rpc.listen(server, address, security)
    await server.start()
    try:
        yield asked, *addresses
    finally:
        await server.stop(None)


async def outcome(target: str, security: Security = OPEN) -> str:
    """The status of a call of either kind."""
    async with rpc.make_channel(target, security=security) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        codes = set()
        try:
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
            codes.add("OK")
        except grpc.aio.AioRpcError as error:
            codes.add(error.code().name)
        try:
            assert len([each async for each in stub.Watch(health_pb2.HealthCheckRequest(), timeout=5)]) == 3
            codes.add("OK")
        except grpc.aio.AioRpcError as error:
            codes.add(error.code().name)
        assert len(codes) == 1, codes
        return codes.pop()


async def test_only_callers_with_a_token_get_in_wherever_they_come_from(tmp_path: Path):
    security = load_security(SecurityFlags(auth_token_file=str(write(tmp_path / "tokens", FILE))))
    async with serving(tmp_path, security) as (asked, port, socket):
        for target in (port, socket):
            assert await outcome(target) == "UNAUTHENTICATED"
            assert await outcome(target, Security(token="another-token-0123")) == "UNAUTHENTICATED"
            assert await outcome(target, Security(token="-")) == "UNAUTHENTICATED"
            assert not asked.callers
            assert await outcome(target, security) == "OK"
            assert await outcome(target, Security(token="acme-token-0123456")) == "OK"
            assert asked.callers == [Caller("albireo", Role.SERVICE)] * 2 + [Caller("acme", Role.TENANT)] * 2
            asked.callers.clear()


async def test_between_services_only_services_get_in(tmp_path: Path):
    security = load_security(SecurityFlags(auth_token_file=str(write(tmp_path / "tokens", FILE))))
    async with serving(tmp_path, security, for_peers=True) as (asked, port, _):
        assert await outcome(port, Security(token="acme-token-0123456")) == "PERMISSION_DENIED"
        assert await outcome(port, Security(token="gateway-token-0123")) == "PERMISSION_DENIED"
        assert not asked.callers
        assert await outcome(port, security) == "OK"


async def test_what_is_for_operators_is_not_for_tenants(tmp_path: Path):
    security = load_security(SecurityFlags(auth_token_file=str(write(tmp_path / "tokens", FILE))))
    methods = ("/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch")
    async with serving(tmp_path, security, for_operators=methods) as (_, port, _):
        assert await outcome(port, Security(token="acme-token-0123456")) == "PERMISSION_DENIED"
        assert await outcome(port, Security(token="gateway-token-0123")) == "OK"
        assert await outcome(port, security) == "OK"


async def test_a_refused_request_is_not_even_read(tmp_path: Path):
    """A stranger's message costs the server nothing: it is answered before it has come."""
    security = load_security(SecurityFlags(auth_token_file=str(write(tmp_path / "tokens", FILE))))
    async with serving(tmp_path, security) as (_, port, _), rpc.make_channel(port) as channel:
        call = channel.stream_unary("/grpc.health.v1.Health/Check", None, None)(timeout=20)
        assert await call.code() is grpc.StatusCode.UNAUTHENTICATED


def client_of(authority: Authority, pair: Pair | None = None, **flags: str) -> Security:
    own = {"tls_cert": str(pair.cert), "tls_key": str(pair.key)} if pair is not None else {}
    return load_security(SecurityFlags(tls_ca=str(authority.path), **own, **flags))


@pytest.mark.parametrize("has_tokens", [False, True])
async def test_a_certificate_names_its_owner(tmp_path: Path, authority: Authority, has_tokens: bool):
    tokens = {"auth_token_file": str(write(tmp_path / "tokens", FILE))} if has_tokens else {}
    server = authority.sign("server", LOOPBACK)
    flags = {"tls_cert": server.cert, "tls_key": server.key, "tls_ca": authority.path, "tls_client_ca": authority.path}
    security = load_security(SecurityFlags(**{name: str(path) for name, path in flags.items()}, **tokens))
    uri = x509.UniformResourceIdentifier("spiffe://x/certified")
    certified = authority.sign("certified", x509.DNSName("dns.example"), uri)
    stranger = Authority(tmp_path, "strange").sign("acme")
    async with serving(tmp_path, security) as (asked, port, socket):
        assert await outcome(port) == "UNAVAILABLE"  # no TLS
        assert await outcome(port, client_of(authority)) == "UNAVAILABLE"
        assert await outcome(port, client_of(authority, stranger)) == "UNAVAILABLE"
        assert not asked.callers
        assert await outcome(port, client_of(authority, authority.sign("someone"))) == "OK"
        assert await outcome(port, client_of(authority, authority.sign("dns", x509.DNSName("dns.example")))) == "OK"
        assert await outcome(port, client_of(authority, certified)) == "OK"
        role = Role.TRUSTED if has_tokens else Role.TENANT
        assert asked.callers[::2] == [
            Caller("someone", Role.TENANT),
            Caller("dns.example", Role.TENANT),
            Caller("spiffe://x/certified", role),
        ]
        # A socket's callers are of this user; but where there are tokens, they are asked for them.
        assert await outcome(socket) == ("UNAUTHENTICATED" if has_tokens else "OK")


async def test_a_server_is_known_by_its_certificate(tmp_path: Path, authority: Authority):
    pair = authority.sign("server", x509.DNSName("planner.example"))
    security = load_security(SecurityFlags(tls_cert=str(pair.cert), tls_key=str(pair.key)))
    async with serving(tmp_path, security) as (_, port, _):
        assert await outcome(port, client_of(authority)) == "UNAVAILABLE"  # its name is another one
        assert await outcome(port, client_of(authority, tls_server_name="planner.example")) == "OK"
        assert await outcome(port, client_of(Authority(tmp_path, "strange"))) == "UNAVAILABLE"


async def test_only_its_owner_can_open_a_socket(tmp_path: Path):
    umask = os.umask(0)
    try:
        async with serving(tmp_path, Security()):
            assert (tmp_path / "s.sock").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(umask)
