"""`albireo serve` with everything turned on that keeps strangers out, and strangers who try to get in."""

import asyncio
import contextlib
import os
import re
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from albireo.cli.processes import command_line, descendants, option
from albireo.security import Security, SecurityFlags, load_security
from certificates import LOOPBACK, Authority
from load import wait_until
from services import fixed_ports, process

TOKENS = {name: f"the-token-of-{name}-0123" for name in ("albireo", "gateway", "acme", "rival", "noisy")}
ROLES = {"albireo": "service", "gateway": "trusted"}
MAX_NUM_SEQS = 4


@dataclass(frozen=True)
class Server:
    """A running server, with everything turned on."""

    process: subprocess.Popen
    directory: Path
    port: int
    authority: Authority
    store: str  # the KV store's address

    @property
    def run_dir(self) -> Path:
        return self.directory / "run"

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def sockets(self) -> dict[str, str]:
        """Of gRPC servers, by name."""
        return {name: f"unix:{self.run_dir}/{name}.sock" for name in ("group", "planner", "kvstore", "frontend-0")}

    @property
    def metrics_ports(self) -> list[int]:
        """Of planner, group, front end and KV store."""
        return [self.port + offset for offset in (1, 2, 3, 4)]

    def client(self, name: str, authority: Authority | None = None) -> Security:
        """What a client with this token and its certificate shows; an empty name: no token."""
        pair = (authority or self.authority).sign("client")
        flags = {"tls_ca": self.authority.path, "tls_cert": pair.cert, "tls_key": pair.key}
        return load_security(SecurityFlags(**{key: str(path) for key, path in flags.items()}), TOKENS.get(name, name))

    def rank(self, rank: int) -> int | None:
        """Its process id."""
        pids = descendants(self.process.pid)
        return next((pid for pid in pids if option(command_line(pid), "--rank") == str(rank)), None)


def security_flags(directory: Path, authority: Authority) -> dict[str, object]:
    """Of a service with everything turned on."""
    pair, tokens = authority.sign("server", LOOPBACK), directory / "tokens"
    tokens.write_text("".join(f"{name} {ROLES.get(name, 'tenant')} {token}\n" for name, token in TOKENS.items()))
    tokens.chmod(0o600)
    files = {"tls-cert": pair.cert, "tls-key": pair.key, "tls-ca": authority.path, "tls-client-ca": authority.path}
    return {"auth-token-file": tokens, **files}


def argv_of(flags: dict[str, object]) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


@contextlib.contextmanager
def serve(directory: Path, model: Path, authority: Authority, kv_store: str = "") -> Iterator[Server]:
    """``kv_store``: the address of a KV store; empty: one is started as well."""
    tenants = directory / "tenants.toml"
    tenants.write_text("[noisy]\nmax_waiting = 2\n")
    ports = fixed_ports(5)
    store = {"kv-store": kv_store} if kv_store else {"kv-store-gib": 0.1}
    flags = {
        "engine": "stub",
        "tp": 2,
        "max-num-seqs": MAX_NUM_SEQS,
        "stub-step-ms": 2,
        "port": ports,
        "metrics-port": ports + 1,
        "swap": "always",
        "run-dir": directory / "run",
        "drain-timeout": 2,
        "first-prompt": "import os",
        "ready-file": directory / "ready",
        "tenants": tenants,
        **store,
        **security_flags(directory, authority),
    }
    log = directory / "serve.log"
    with process(["albireo", "serve", str(model), *argv_of(flags)], log) as child:
        asyncio.run(wait_until(lambda: (directory / "ready").exists() or child.poll() is not None, "it is ready"))
        assert child.poll() is None, log.read_text()
        yield Server(child, directory, ports, authority, kv_store or f"unix:{directory}/run/kvstore.sock")


def channel_to(target: str, security: Security | None) -> grpc.Channel:
    """A plain channel without a token; ``security``: to ports, by its certificates."""
    if target.startswith("unix:") or security is None:
        return grpc.insecure_channel(target)
    return grpc.secure_channel(target, security.channel_credentials())


def with_token(channel: grpc.Channel, token: str) -> grpc.Channel:
    class Adds(grpc.StreamStreamClientInterceptor):
        def intercept_stream_stream(self, continuation, details, requests):
            metadata = [*(details.metadata or ()), ("authorization", f"Bearer {token}")]
            return continuation(details._replace(metadata=metadata), requests)

    return grpc.intercept_channel(channel, Adds())


def methods_of(target: str, security: Security) -> list[str]:
    """Of all services that reflection names."""
    with channel_to(target, security) as channel:
        database = ProtoReflectionDescriptorDatabase(with_token(channel, TOKENS["albireo"]))
        services = [DescriptorPool(database).FindServiceByName(name) for name in database.get_services()]
    return [f"/{service.full_name}/{method.name}" for service in services for method in service.methods]


def status_of(channel: grpc.Channel, method: str, token: str) -> grpc.StatusCode:
    """How a call with an empty message ends."""
    metadata = [("authorization", f"Bearer {token}")] if token else []
    call = channel.stream_stream(method)(iter([b""]), metadata=metadata, timeout=5)
    with contextlib.suppress(grpc.RpcError):
        next(call)
        call.cancel()
        return grpc.StatusCode.OK
    return call.code()


def listening(pid: int) -> tuple[set[int], set[str]]:
    """Ports and paths on which a process and all under it listen."""
    inodes = set()
    for each in [pid, *descendants(pid)]:
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{each}/fd").iterdir():
                with contextlib.suppress(OSError):
                    inodes.update(re.findall(r"socket:\[(\d+)\]", os.readlink(link)))
    tcp = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()]
    unix = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    ports = {int(line[1].rpartition(":")[2], 16) for line in tcp if line[3] == "0A" and line[9] in inodes}
    # Flags 00010000: it accepts connections. Datagram sockets (type 0002) take messages of whoever may open them.
    opens = [line for line in unix if len(line) == 8 and (line[3] == "00010000" or line[4] == "0002")]
    return ports, {line[7] for line in opens if line[6] in inodes}


def check_tokens(server: Server, target: str, is_for_clients: bool) -> list[str]:
    """Who sends none, or a wrong one, or a tenant's where only services get in, is refused; the methods there."""
    acme = server.client("acme")
    methods = methods_of(target, acme)
    with channel_to(target, acme) as channel:
        for method in methods:
            wrong = status_of(channel, method, "a-token-that-nobody-has")
            assert wrong is grpc.StatusCode.UNAUTHENTICATED, (target, method)
            if not is_for_clients:
                tenant = status_of(channel, method, TOKENS["acme"])
                assert tenant is grpc.StatusCode.PERMISSION_DENIED, (target, method)
            if target != server.target:  # there the certificate is enough
                assert status_of(channel, method, "") is grpc.StatusCode.UNAUTHENTICATED, (target, method)
    return methods


def check_certificates(server: Server, target: str, methods: list[str]) -> None:
    """A token is no use to who has no certificate, or one of another authority."""
    strange = Authority(server.directory, "strange")
    for stranger in (None, server.client("acme", strange)):
        with channel_to(target, stranger) as channel:
            for method in methods:
                assert status_of(channel, method, TOKENS["albireo"]) is grpc.StatusCode.UNAVAILABLE, method


def page(server: Server, port: int, token: str, authority: Authority) -> int:
    """The HTTP status of a metrics page."""
    context = ssl.create_default_context(cafile=str(server.authority.path))
    pair = authority.sign("scraper")
    context.load_cert_chain(pair.cert, pair.key)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"https://127.0.0.1:{port}/metrics", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=5, context=context) as answer:
            assert b"process_cpu_seconds" in answer.read()
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
