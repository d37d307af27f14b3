"""`albireo serve` with certificates and tokens: who gets in where, and what one tenant can do to another."""

import asyncio
import contextlib
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc import aio
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from albireo.cli.processes import command_line, descendants, option
from albireo.rpc import make_channel
from albireo.security import Security, SecurityFlags, load_security
from albireo.v1 import generation_pb2 as pb
from albireo.v1 import generation_pb2_grpc
from certificates import LOOPBACK, Authority
from load import wait_until
from services import fixed_ports, process

pytestmark = [pytest.mark.e2e]

TOKENS = {name: f"the-token-of-{name}-0123" for name in ("albireo", "gateway", "acme", "rival", "noisy")}
ROLES = {"albireo": "service", "gateway": "trusted"}
MAX_NUM_SEQS = 4
NUM_FLOOD = 30


@dataclass(frozen=True)
class Server:
    """A running server, with everything turned on."""

    process: subprocess.Popen
    directory: Path
    port: int
    authority: Authority

    @property
    def run_dir(self) -> Path:
        return self.directory / "run"

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def sockets(self) -> dict[str, str]:
        """Of gRPC servers, by name."""
        names = ("group", "planner", "frontend-0")
        return {name: f"unix:{self.run_dir}/{name}.sock" for name in names}

    def client(self, name: str, authority: Authority | None = None) -> Security:
        """What a client with this token and its certificate shows; an empty name: no token."""
        pair = (authority or self.authority).sign("client")
        flags = {"tls_ca": self.authority.path, "tls_cert": pair.cert, "tls_key": pair.key}
        return load_security(SecurityFlags(**{key: str(path) for key, path in flags.items()}), TOKENS.get(name, name))

    def rank(self, rank: int) -> int | None:
        """Its process id."""
        pids = descendants(self.process.pid)
        return next((pid for pid in pids if option(command_line(pid), "--rank") == str(rank)), None)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, stub_model: Path) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("identity")
    authority = Authority(directory, "ours")
    pair = authority.sign("server", LOOPBACK)
    tokens, tenants = directory / "tokens", directory / "tenants.toml"
    tokens.write_text("".join(f"{name} {ROLES.get(name, 'tenant')} {token}\n" for name, token in TOKENS.items()))
    tokens.chmod(0o600)
    tenants.write_text("[noisy]\nmax_waiting = 2\n")
    ports = fixed_ports(4)
    flags = {
        "engine": "stub",
        "tp": 2,
        "max-num-seqs": MAX_NUM_SEQS,
        "stub-step-ms": 2,
        "port": ports,
        "metrics-port": ports + 1,
        "run-dir": directory / "run",
        "drain-timeout": 2,
        "first-prompt": "import os",
        "ready-file": directory / "ready",
        "tenants": tenants,
        "auth-token-file": tokens,
        "tls-cert": pair.cert,
        "tls-key": pair.key,
        "tls-ca": authority.path,
        "tls-client-ca": authority.path,
    }
    argv = ["albireo", "serve", str(stub_model)]
    for name, value in flags.items():
        argv += [f"--{name}", str(value)]
    log = directory / "serve.log"
    with process(argv, log) as child:
        asyncio.run(wait_until(lambda: (directory / "ready").exists() or child.poll() is not None, "it is ready"))
        assert child.poll() is None, log.read_text()
        yield Server(child, directory, ports, authority)


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


def test_every_socket_on_which_anything_listens_is_known_and_closed_to_other_users(server: Server):
    ports, paths = listening(server.process.pid)
    assert ports == {server.port, *(server.port + offset for offset in (1, 2, 3))}
    assert len(paths) >= 5  # three gRPC servers, the relay, a supervisor's
    for path in map(Path, paths):
        closed = [parent for parent in path.parents if not parent.stat().st_mode & 0o077]
        assert closed, f"{path}: other users may reach it"
    for address in server.sockets.values():
        assert Path(address.removeprefix("unix:")).stat().st_mode & 0o777 == 0o600


def test_no_method_of_any_server_answers_a_stranger(server: Server):
    """Without a token, with a wrong one, or with another authority's certificate."""
    acme = server.client("acme")
    targets = {"port": server.target, **server.sockets}
    num_methods = 0
    for name, target in targets.items():
        is_internal = name in ("group", "planner")
        methods = methods_of(target, acme)
        num_methods += len(methods)
        with channel_to(target, acme) as channel:
            for method in methods:
                wrong = status_of(channel, method, "a-token-that-nobody-has")
                assert wrong is grpc.StatusCode.UNAUTHENTICATED, (name, method)
                if is_internal:
                    tenant = status_of(channel, method, TOKENS["acme"])
                    assert tenant is grpc.StatusCode.PERMISSION_DENIED, (name, method)
                if name != "port":  # there the certificate is enough
                    assert status_of(channel, method, "") is grpc.StatusCode.UNAUTHENTICATED, (name, method)
    assert num_methods > 40
    strange = Authority(server.directory, "strange")
    for stranger in (None, server.client("acme", strange)):
        with channel_to(server.target, stranger) as channel:
            for method in methods_of(server.target, acme):
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


def test_metrics_are_for_operators(server: Server):
    strange = Authority(server.directory, "strange")
    for port in (server.port + offset for offset in (1, 2, 3)):
        assert page(server, port, "", server.authority) == 401
        assert page(server, port, "a-token-that-nobody-has", server.authority) == 401
        assert page(server, port, TOKENS["acme"], server.authority) == 403
        assert page(server, port, TOKENS["gateway"], server.authority) == 200
        with pytest.raises((ssl.SSLError, urllib.error.URLError)):  # the one at once, the other a moment later
            page(server, port, TOKENS["gateway"], strange)
        with pytest.raises(ConnectionError):  # no TLS
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5)


def albireo(server: Server, name: str, *argv: str) -> subprocess.CompletedProcess:
    """The command line, with the token and a certificate of ``name``."""
    flags = server.client(name).flags
    token = server.directory / f"{name}.token"
    token.write_text(TOKENS[name] + "\n")
    shown = ["--token-file", str(token), "--tls-ca", flags.tls_ca, "--tls-cert", flags.tls_cert]
    command = [sys.executable, "-m", "albireo", *argv, "--target", server.target, *shown, "--tls-key", flags.tls_key]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_command_line_gets_in_with_token_and_certificate(server: Server):
    answer = albireo(server, "acme", "generate", "import os", "--max-tokens", "5", "--ignore-eos", "--json")
    assert answer.returncode == 0, answer.stderr
    assert len(json.loads(answer.stdout)["token_ids"]) == 5
    report = albireo(server, "acme", "bench", "serve", "--workload", "single", "--reps", "1")
    assert report.returncode == 0, report.stderr
    trace = albireo(server, "gateway", "trace", "-o", str(server.directory / "trace.json"))
    assert trace.returncode == 0, trace.stderr


async def complete(
    server: Server, name: str, text: str = "import os", tenant: str = "", label: str = "", num_tokens: int = 3
) -> pb.Finish:
    """The end of one completion, for the holder of a token; ``tenant`` is what its metadata claims."""
    params = pb.SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=0)
    request = pb.GenerateRequest(text=text, sampling_params=params, request_id=label)
    metadata = (("x-tenant", tenant),) if tenant else ()
    async with make_channel(server.target, security=server.client(name)) as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        *_, last = [each async for each in stub.Generate(request, metadata=metadata, timeout=30)]
        return last.finish


async def num_cached(server: Server, name: str, text: str, tenant: str = "") -> int:
    return (await complete(server, name, text, tenant)).usage.cached_tokens


async def test_a_tenant_cannot_find_out_what_another_has_sent(server: Server):
    text = "def secret(): return 42 " * 10
    assert await num_cached(server, "acme", text) == 0
    assert await num_cached(server, "acme", text) > 0
    assert await num_cached(server, "rival", text, tenant="acme") == 0
    assert await num_cached(server, "gateway", text) == 0
    assert await num_cached(server, "gateway", text, tenant="acme") > 0
    with channel_to(server.target, server.client("rival")) as channel:
        engine = "/vllm.grpc.engine.VllmEngine/"
        others = [f"{engine}{name}" for name in ("SubscribeKvEvents", "FlushCache", "StartProfile", "StopProfile")]
        for method in (*others, "/albireo.v1.Ledger/Read"):
            assert status_of(channel, method, TOKENS["rival"]) is grpc.StatusCode.PERMISSION_DENIED, method
            assert status_of(channel, method, "") is grpc.StatusCode.PERMISSION_DENIED, method  # by its certificate
            assert status_of(channel, method, TOKENS["gateway"]) is not grpc.StatusCode.PERMISSION_DENIED, method


async def abort(server: Server, name: str, label: str, tenant: str = "") -> None:
    metadata = (("x-tenant", tenant),) if tenant else ()
    async with make_channel(server.target, security=server.client(name)) as channel:
        await generation_pb2_grpc.GenerationStub(channel).Abort(pb.AbortRequest(request_ids=[label]), metadata=metadata)


async def test_a_tenant_aborts_its_own_requests_only(server: Server):
    running = asyncio.create_task(complete(server, "acme", label="mine", num_tokens=200))
    for name, tenant in (("rival", ""), ("rival", "acme"), ("gateway", "rival")):
        await abort(server, name, "mine", tenant)
    assert (await running).reason == pb.FINISH_REASON_LENGTH
    for name, tenant in (("acme", ""), ("gateway", "acme"), ("gateway", "")):
        running = asyncio.create_task(complete(server, "acme", label="mine", num_tokens=400))
        while not running.done():
            await abort(server, name, "mine", tenant)
            await asyncio.wait({running}, timeout=0.05)
        assert (await running).reason == pb.FINISH_REASON_ABORT


async def test_a_flood_is_refused_past_its_limit_and_others_are_served(server: Server):
    flood = [asyncio.create_task(complete(server, "noisy", num_tokens=60)) for _ in range(NUM_FLOOD)]
    assert (await complete(server, "acme", num_tokens=20)).reason == pb.FINISH_REASON_LENGTH
    ends = await asyncio.gather(*flood, return_exceptions=True)
    refused = [end for end in ends if isinstance(end, aio.AioRpcError)]
    assert refused
    assert len(refused) < NUM_FLOOD
    for each in refused:
        assert each.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "max_waiting: 2 sequences of this tenant wait already" in each.details()


async def test_everything_heals_and_rolls_with_certificates_and_tokens(server: Server):
    pid = server.rank(1)
    assert pid is not None
    running = asyncio.create_task(complete(server, "acme", num_tokens=200))
    os.kill(pid, signal.SIGKILL)
    assert (await running).reason == pb.FINISH_REASON_LENGTH
    assert server.rank(1) not in (None, pid)
    server.process.send_signal(signal.SIGUSR2)
    log = server.run_dir / "logs" / "scheduler.log"
    await wait_until(lambda: "frontend-0 is replaced" in log.read_text(), "the restart is over")
    assert "planner is replaced" in log.read_text()
    assert (await complete(server, "acme")).reason == pb.FINISH_REASON_LENGTH
