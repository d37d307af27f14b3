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
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from grpc import aio
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from albireo.cli.processes import command_line, descendants, option
from albireo.errors import StoreUnavailable
from albireo.kv.arena import Lease, LocalArena
from albireo.rpc import make_channel
from albireo.security import Security, SecurityFlags, load_security
from albireo.v1 import generation_pb2 as pb
from albireo.v1 import generation_pb2_grpc, kvstore_pb2_grpc
from albireo.v1 import kvstore_pb2 as kv
from certificates import LOOPBACK, Authority
from kv_stores import until
from load import wait_until
from services import fixed_ports, process

pytestmark = [pytest.mark.e2e]

TOKENS = {name: f"the-token-of-{name}-0123" for name in ("albireo", "gateway", "acme", "rival", "noisy")}
ROLES = {"albireo": "service", "gateway": "trusted"}
MAX_NUM_SEQS = 4
NUM_FLOOD = 30
BLOCK_SIZE = 32


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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, stub_model: Path) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("identity")
    with serve(directory, stub_model, Authority(directory, "ours")) as running:
        yield running


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
    assert ports == {server.port, *server.metrics_ports}
    arena = f"{server.run_dir}/kv-arena.sock"
    assert paths > {arena, server.store.removeprefix("unix:")}
    assert len(paths) >= 7  # three more gRPC servers, the relay, a supervisor's
    for path in map(Path, paths):
        closed = [parent for parent in path.parents if not parent.stat().st_mode & 0o077]
        assert closed, f"{path}: other users may reach it"
    for address in server.sockets.values():
        assert Path(address.removeprefix("unix:")).stat().st_mode & 0o777 == 0o600
    with pytest.raises(StoreUnavailable, match="does not know lease"):
        LocalArena.attach(Lease(bytes(16), arena, 0, 0))


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


def test_no_method_of_any_server_answers_a_stranger(server: Server):
    num_methods = 0
    for name, address in server.sockets.items():
        num_methods += len(check_tokens(server, address, is_for_clients=name == "frontend-0"))
    methods = check_tokens(server, server.target, is_for_clients=True)
    assert num_methods + len(methods) > 48
    check_certificates(server, server.target, methods)


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
    for port in server.metrics_ports:
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


async def ask_store(server: Server, method: str, request: Message) -> Any:
    async with make_channel(server.store, security=server.client("albireo")) as channel:
        return await getattr(kvstore_pb2_grpc.KvStoreStub(channel), method)(request, timeout=10, wait_for_ready=True)


async def stats_of(server: Server) -> kv.KvStats:
    stats: kv.KvStats = await ask_store(server, "GetStats", kv.GetKvStatsRequest())
    return stats


async def check_store(server: Server) -> None:
    """What a group has forgotten in its death comes back, for who has sent it."""
    text = "def kept(): return 42 " * 10
    await ask_store(server, "Flush", kv.FlushKvRequest())
    assert await num_cached(server, "acme", text) == 0
    num_tokens = await num_cached(server, "acme", text)

    async def is_stored() -> bool:
        stats = await stats_of(server)
        num_blocks = sum(each.num_blocks for each in stats.tenants if each.tenant == "acme")
        return num_blocks * BLOCK_SIZE >= num_tokens and stats.pinned_bytes == 0

    await until(is_stored, "the prompt is not stored")
    num_hits = (await stats_of(server)).num_hits
    pid = server.rank(0)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert await num_cached(server, "rival", text) == 0
    assert await num_cached(server, "acme", text) == num_tokens
    assert (await stats_of(server)).num_hits - num_hits == num_tokens // BLOCK_SIZE


async def test_planner_and_ranks_use_the_store_that_serve_starts(server: Server):
    await check_store(server)


def test_planner_and_ranks_use_a_store_on_another_host(tmp_path: Path, stub_model: Path):
    """By TCP, with certificates and tokens, which this store asks of everybody."""
    authority, port = Authority(tmp_path, "ours"), fixed_ports(2)
    target, run_dir = f"127.0.0.1:{port}", tmp_path / "kv"
    flags = {"listen": target, "run-dir": run_dir, "arena-gib": 0.1, "metrics-port": port + 1}
    argv = argv_of({**flags, **security_flags(tmp_path, authority)})
    with (
        process(["kvstore_svc", *argv], tmp_path / "kv.log") as store,
        serve(tmp_path, stub_model, authority, target) as server,
    ):
        asyncio.run(check_store(server))
        check_certificates(server, target, check_tokens(server, target, is_for_clients=False))
        assert listening(store.pid) == ({port, port + 1}, {f"{run_dir}/kv-arena.sock"})
        assert run_dir.stat().st_mode & 0o777 == 0o700
        assert page(server, port + 1, TOKENS["acme"], authority) == 403
        assert page(server, port + 1, TOKENS["gateway"], authority) == 200
