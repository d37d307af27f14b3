"""`albireo serve` with certificates and tokens: who gets in where, and what one tenant can do to another."""

import asyncio
import json
import os
import signal
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from grpc import aio

from albireo.errors import StoreUnavailable
from albireo.kv.arena import Lease, LocalArena
from albireo.rpc import make_channel
from albireo.v1 import generation_pb2 as pb
from albireo.v1 import generation_pb2_grpc, kvstore_pb2_grpc
from albireo.v1 import kvstore_pb2 as kv
from certificates import Authority
from guarded_server import (
    TOKENS,
    Server,
    argv_of,
    channel_to,
    check_certificates,
    check_tokens,
    listening,
    page,
    security_flags,
    serve,
    status_of,
)
from kv_stores import until
from load import wait_until
from services import fixed_ports, process

pytestmark = [pytest.mark.e2e]

NUM_FLOOD = 30
BLOCK_SIZE = 32


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, stub_model: Path) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("identity")
    with serve(directory, stub_model, Authority(directory, "ours")) as running:
        yield running


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


def test_no_method_of_any_server_answers_a_stranger(server: Server):
    num_methods = 0
    for name, address in server.sockets.items():
        num_methods += len(check_tokens(server, address, is_for_clients=name == "frontend-0"))
    methods = check_tokens(server, server.target, is_for_clients=True)
    assert num_methods + len(methods) > 48
    check_certificates(server, server.target, methods)


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


def test_planner_and_ranks_use_a_store_on_another_host(short_path: Path, stub_model: Path):
    """By TCP, with certificates and tokens, which this store asks of everybody."""
    authority, port = Authority(short_path, "ours"), fixed_ports(2)
    target, run_dir = f"127.0.0.1:{port}", short_path / "kv"
    flags = {"listen": target, "run-dir": run_dir, "arena-gib": 0.1, "metrics-port": port + 1}
    argv = argv_of({**flags, **security_flags(short_path, authority)})
    with (
        process(["kvstore_svc", *argv], short_path / "kv.log") as store,
        serve(short_path, stub_model, authority, target) as server,
    ):
        asyncio.run(check_store(server))
        check_certificates(server, target, check_tokens(server, target, is_for_clients=False))
        assert listening(store.pid) == ({port, port + 1}, {f"{run_dir}/kv-arena.sock"})
        assert run_dir.stat().st_mode & 0o777 == 0o700
        assert page(server, port + 1, TOKENS["acme"], authority) == 403
        assert page(server, port + 1, TOKENS["gateway"], authority) == 200
