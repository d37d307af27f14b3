"""HTTP clients without the key, others that leave, and a scheduler replaced beneath them, on the stub engine."""

import asyncio
import contextlib
import http.client
import json
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from albireo.cli.processes import command_line, descendants
from http_server import HttpServer, authorization, http_server, posted
from load import EMPTY, wait_for_metrics, wait_until
from services import read_metrics

pytestmark = [pytest.mark.e2e, pytest.mark.alone]

NUM_CLIENTS = 64
STUB = ("--engine", "stub", "--tp", "2", "--stub-step-ms", "20", "--max-num-seqs", "48", "--served-model-name", "demo")
NUM_TOKENS = 450
LONG = {"model": "demo", "max_tokens": NUM_TOKENS, "ignore_eos": True}
KEY = "the-key-of-http-clients-0123"
GUARDED = [
    *(("GET", path) for path in ("/get_loads", "/workers", "/wasm", "/v1/tokenizers", "/v1/responses/x")),
    *(("POST", path) for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/responses")),
    *(("POST", path) for path in ("/generate", "/v1/messages", "/v1/rerank", "/v1/tokenize", "/v1/conversations")),
    *(("POST", path) for path in ("/flush_cache", "/workers", "/v1/tokenizers", "/wasm", "/parse/reasoning")),
    *(("POST", path) for path in ("/start_profile", "/stop_profile", "/heap_profile")),
    *(("DELETE", path) for path in ("/workers/x", "/v1/tokenizers/x", "/wasm/x")),
    ("PUT", "/workers/x"),
]
CANARY = {"max_tokens": 20, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, stub_model: Path) -> Iterator[HttpServer]:
    with http_server(tmp_path_factory.mktemp("h"), str(stub_model), *STUB, key=KEY) as served:
        yield served


def status_of(port: int, method: str, path: str, key: str) -> int:
    headers = {"content-type": "application/json", **authorization(key)}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request(method, path, None if method == "GET" else "{}", headers)
        return connection.getresponse().status


def test_nobody_gets_in_without_the_key(server: HttpServer):
    """But to health and the model's name."""
    for method, path in GUARDED:
        for wrong in ("", KEY[:-1]):
            assert status_of(server.port, method, path, wrong) == 401, path
        assert status_of(server.port, method, path, KEY) != 401, path
    for path in ("/liveness", "/readiness", "/health", "/v1/models"):
        assert status_of(server.port, "GET", path, "") == 200, path


def test_the_ready_message_shows_how_to_send_the_key(server: HttpServer):
    command = re.search(r"HTTP: +(curl .*)", server.log.read_text())
    assert command is not None
    answer = subprocess.run(["bash", "-c", f"{command[1]} --silent"], capture_output=True, timeout=60, check=True)
    assert json.loads(answer.stdout)["usage"]["completion_tokens"] > 0


def test_the_key_is_on_no_command_line(server: HttpServer):
    lines = [" ".join(command_line(pid)) for pid in descendants(server.service.process.pid)]
    assert any("smg::router" in line for line in lines)
    assert not any(KEY in line for line in lines)


def canary(server: HttpServer) -> str:
    whole = server.complete("a canary", **CANARY)["choices"][0]["text"]
    assert server.stream("a canary", **CANARY) == whole
    return str(whole)


@contextlib.asynccontextmanager
async def canaries(server: HttpServer) -> AsyncIterator[None]:
    """Meanwhile a short request is sent again and again, streamed and not, whose answer is known."""
    expected = await asyncio.to_thread(canary, server)
    is_over = False

    async def send() -> int:
        num_sent = 0
        while not is_over:
            assert await asyncio.to_thread(canary, server) == expected
            num_sent += 1
        return num_sent

    sending = asyncio.create_task(send())
    try:
        yield
    finally:
        is_over = True
        num_sent = await sending
    assert num_sent


@contextlib.asynccontextmanager
async def cut_short(server: HttpServer) -> AsyncIterator[None]:
    """What is asked for meanwhile leaves nothing behind, long before it would have ended, but for a few sequences whose
    Abort the gateway lost with its connection."""
    before = read_metrics(server.metrics_port)["albireo_output_tokens_total"]
    async with canaries(server):
        yield
    await wait_for_metrics(server.metrics_port, EMPTY)
    num_tokens = read_metrics(server.metrics_port)["albireo_output_tokens_total"] - before
    assert num_tokens < NUM_CLIENTS * NUM_TOKENS / 4


async def stream_a_while(server: HttpServer, index: int) -> None:
    """Leaves after some chunks; every fourth client has asked for two completions."""
    body = {**LONG, "prompt": f"client {index}", "stream": True, "n": 2 if index % 4 == 0 else 1}
    async with posted(server, "/v1/completions", body) as reader:
        for _ in range(1 + index % 12):
            await reader.readuntil(b"data:")


async def test_streaming_clients_that_leave_are_forgotten(server: HttpServer):
    async with cut_short(server):
        await asyncio.gather(*(stream_a_while(server, index) for index in range(NUM_CLIENTS)))


async def test_clients_that_leave_before_their_answer_are_forgotten(server: HttpServer):
    def num_sequences() -> float:
        metrics = read_metrics(server.metrics_port)
        return metrics["albireo_running_sequences"] + metrics["albireo_waiting_sequences"]

    async with cut_short(server), contextlib.AsyncExitStack() as clients:
        for index in range(NUM_CLIENTS):
            body = {**LONG, "prompt": f"client {index}"}
            await clients.enter_async_context(posted(server, "/v1/completions", body))
        await wait_until(lambda: num_sequences() >= NUM_CLIENTS, "all are there")


@pytest.mark.soak
async def test_no_client_notices_a_rolling_restart(tmp_path: Path, stub_model: Path):
    """Streams and whole answers, before, during and after; the gateway's own connection moves on as well."""
    flags = ("--frontends", "2", "--drain-timeout", "14")
    with http_server(tmp_path, str(stub_model), *STUB, *flags) as server:
        names = [("scheduler_svc", "planner"), ("--name", "frontend-0"), ("--name", "frontend-1")]

        def parts() -> list[list[int]]:
            return [server.service.pids(*words) for words in names]

        before = parts()
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(4):
                await stack.enter_async_context(canaries(server))
            server.service.process.send_signal(signal.SIGUSR2)
            await wait_until(
                lambda: all(len(now) == 1 and now != old for now, old in zip(parts(), before, strict=True)),
                "all processes are new",
                90,
            )
        await wait_for_metrics(server.metrics_port, {**EMPTY, "albireo_frontends": 2.0})
