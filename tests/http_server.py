"""`albireo serve --http` as a user runs it, and raw HTTP requests to it."""

import asyncio
import contextlib
import http.client
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services import START_TIMEOUT_S, Service, fixed_ports

_ANSWER_TIMEOUT_S = 30.0


def authorization(key: str) -> dict[str, str]:
    """The headers that carry a key; an empty one: none."""
    return {"authorization": f"Bearer {key}"} if key else {}


def ask(port: int, path: str, body: object = None, key: str = "") -> tuple[int, Any]:
    """Status and JSON of the answer to a GET, or to a POST of ``body``: text as it is, else as JSON."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=_ANSWER_TIMEOUT_S)) as connection:
        content = body if isinstance(body, str) else json.dumps(body)
        if body is None:
            connection.request("GET", path, headers=authorization(key))
        else:
            connection.request("POST", path, content, {"content-type": "application/json", **authorization(key)})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


@dataclass(frozen=True)
class HttpServer:
    """A running server.

    Attributes:
        service: its address is that of gRPC clients.
        log: what it prints.
        key: what its clients send; empty: nothing.
    """

    port: int
    metrics_port: int
    service: Service
    log: Path
    key: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def complete(self, prompt: str | list[str], **fields: object) -> Any:
        """The answer of /v1/completions; AssertionError when it refuses."""
        status, answer = ask(self.port, "/v1/completions", {"model": "demo", "prompt": prompt, **fields}, self.key)
        assert status == http.client.OK, answer
        return answer

    def stream(self, prompt: str, **fields: object) -> str:
        """The text of a streamed completion; AssertionError unless it ends in order."""
        body = json.dumps({"model": "demo", "prompt": prompt, "stream": True, **fields})
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", self.port, timeout=_ANSWER_TIMEOUT_S)
        ) as connection:
            headers = {"content-type": "application/json", **authorization(self.key)}
            connection.request("POST", "/v1/completions", body, headers)
            *events, last = [line[6:] for line in connection.getresponse() if line.startswith(b"data: ")]
        assert last == b"[DONE]\n", last
        return "".join(json.loads(event)["choices"][0]["text"] for event in events)

    def gateway_pids(self) -> list[int]:
        """One, but while it starts again; smg names its process."""
        return self.service.pids("smg::router")


@contextlib.contextmanager
def http_server(directory: Path, model: str = "demo", *flags: str, key: str = "") -> Iterator[HttpServer]:
    """Starts `albireo serve` and stops it; all ports are its own, also when one of its processes starts again.

    Args:
        key: what it asks of HTTP clients; empty: nothing.
    """
    log, ports = directory / "serve.log", fixed_ports(9)
    argv = [sys.executable, "-m", "albireo", "serve", model, "--port", str(ports), "--http", str(ports + 1)]
    argv += ["--metrics-port", str(ports + 2), "--run-dir", str(directory / "run"), "--drain-timeout", "2", *flags]
    if key:
        (directory / "key").write_text(key + "\n")
        argv += ["--http-api-key-file", str(directory / "key")]
    with log.open("wb") as output:
        process = subprocess.Popen(argv, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_for(log, process, r"\blogs: ")
        yield HttpServer(ports + 1, ports + 2, Service(f"127.0.0.1:{ports}", process, directory / "run"), log, key)
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(30)
    assert status == 0, log.read_text()


@contextlib.asynccontextmanager
async def posted(server: HttpServer, path: str, body: object) -> AsyncIterator[asyncio.StreamReader]:
    """Sends a POST, whose answer can be read; leaving breaks the connection off."""
    content = json.dumps(body).encode()
    fields = {"host": "x", "content-type": "application/json", "content-length": len(content)}
    lines = [f"{name}: {value}\r\n" for name, value in (fields | authorization(server.key)).items()]
    head = f"POST {path} HTTP/1.1\r\n{''.join(lines)}\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(head.encode() + content)
        await writer.drain()
        yield reader
    finally:
        writer.transport.abort()


def _wait_for(log: Path, process: subprocess.Popen, pattern: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not re.search(pattern, log.read_text()):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
