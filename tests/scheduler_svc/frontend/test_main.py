"""The process: flags, signals, exit status."""

import asyncio
import json
import os
import signal
import socket
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from grpc import aio

from albireo.rpc import make_channel
from albireo.v1.generation_pb2 import GetModelInfoRequest
from albireo.v1.generation_pb2_grpc import GenerationStub

pytestmark = pytest.mark.timeout(60)


async def start(tmp_path: Path, *argv: str, port: str = "0", **env: str) -> asyncio.subprocess.Process:
    flags = ["--planner", f"unix:{tmp_path}/planner.sock", "--port", port, *argv]
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "scheduler_svc",
        "frontend",
        *flags,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **env},
    )


async def end_of(process: asyncio.subprocess.Process) -> tuple[int | None, list[dict[str, Any]]]:
    async with asyncio.timeout(30):
        _, stderr = await process.communicate()
    return process.returncode, [json.loads(line) for line in stderr.decode().splitlines() if line.startswith("{")]


async def wait_until_serving(own: str) -> str:
    channel = make_channel(own)
    stub: Any = GenerationStub(channel)
    async with asyncio.timeout(30):
        while True:
            try:
                info = await stub.GetModelInfo(GetModelInfoRequest(), wait_for_ready=True)
                break
            except aio.AioRpcError:
                await asyncio.sleep(0.05)
    await channel.close()
    return str(info.name)


async def test_sigterm_ends_it_with_status_0(planner_server: Any, model_path: Path, tmp_path: Path) -> None:
    own = f"unix:{tmp_path}/frontend.sock"
    argv = ["--model", str(model_path), "--listen", own, "--served-model-name", "mine", "--metrics-port", "0"]
    process = await start(tmp_path, *argv)
    assert await wait_until_serving(own) == "mine"
    process.send_signal(signal.SIGTERM)
    status, events = await end_of(process)
    assert status == 0
    assert {"listening", "attached to the planner", "stopping"} <= {event["event"] for event in events}
    assert {event["process"] for event in events} == {"frontend-0"}


async def test_sigterm_ends_it_while_it_waits_for_the_planner(model_path: Path, tmp_path: Path) -> None:
    process = await start(tmp_path, "--model", str(model_path), "--listen", f"unix:{tmp_path}/frontend.sock")
    while b"waiting for the planner" not in await process.stderr.readline():
        pass
    process.send_signal(signal.SIGTERM)
    assert (await end_of(process))[0] == 0


async def test_it_tells_its_supervisor_that_it_lives_and_when_it_serves(
    planner: Any, planner_server: Any, model_path: Path, tmp_path: Path, unused_tcp_port: int
) -> None:
    """It beats while the model loads; metrics are served from the start. A lost planner does not end it."""
    planner.ready.clear()
    own = f"unix:{tmp_path}/frontend.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(f"{tmp_path}/notify")
        supervisor.setblocking(False)
        argv = ["--model", str(model_path), "--listen", own, "--metrics-port", str(unused_tcp_port)]
        process = await start(tmp_path, *argv, NOTIFY_SOCKET=f"{tmp_path}/notify")

        async def hear() -> bytes:
            return await asyncio.get_running_loop().sock_recv(supervisor, 100)

        async with asyncio.timeout(30):
            assert [await hear() for _ in range(5)] == [b"WATCHDOG=1"] * 5
            planner.ready.set()
            while await hear() != b"READY=1":
                pass
    await wait_until_serving(own)
    url = f"http://127.0.0.1:{unused_tcp_port}/metrics"
    page = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
    assert "albireo_frontend_streams_open" in page
    await planner_server.stop(None)
    assert await wait_until_serving(own) == "tiny"
    process.send_signal(signal.SIGTERM)
    status, events = await end_of(process)
    assert status == 0
    assert "the link to the planner is lost" in {event["event"] for event in events}


@pytest.mark.parametrize(
    ("argv", "status", "reason"),
    [
        (["--model", "./no-such-model"], 2, "no such directory"),
        (["--startup-timeout", "0.2"], 1, "not ready within 0.2 s"),
    ],
)
async def test_what_keeps_it_from_serving_is_in_its_exit_status(
    model_path: Path, tmp_path: Path, argv: list[str], status: int, reason: str
) -> None:
    """2: starting it again cannot help."""
    process = await start(tmp_path, "--listen", f"unix:{tmp_path}/frontend.sock", "--model", str(model_path), *argv)
    got, events = await end_of(process)
    assert got == status
    assert any(reason in event.get("reason", "") for event in events)


async def test_a_rolling_restart_is_free_of_client_errors(
    planner_server: Any, model_path: Path, tmp_path: Path, unused_tcp_port: int
) -> None:
    """A successor listens on the same port and path, the predecessor ends. Clients keep their channels, and call."""
    own = f"unix:{tmp_path}/frontend.sock"
    port = str(unused_tcp_port)
    argv = ["--model", str(model_path), "--listen", own, "--drain-timeout", "4"]
    num_calls, ended = 0, asyncio.Event()

    async def call_on(stub: Any) -> None:
        nonlocal num_calls
        while not ended.is_set():
            await stub.GetModelInfo(GetModelInfoRequest())
            num_calls += 1

    first = await start(tmp_path, *argv, port=port)
    await wait_until_serving(own)
    targets = [f"127.0.0.1:{port}"] * 4 + [own] * 2
    channels = [make_channel(target) for target in targets]
    calling = [asyncio.create_task(call_on(GenerationStub(channel))) for channel in channels for _ in range(3)]
    second = await start(tmp_path, *argv, port=port)
    while b'"listening"' not in await second.stderr.readline():
        pass
    first.send_signal(signal.SIGTERM)
    status, events = await end_of(first)
    num_before = num_calls
    while num_calls < num_before + 100:
        assert not any(each.done() for each in calling), calling
        await asyncio.sleep(0.01)
    ended.set()
    await asyncio.gather(*calling)
    for channel in channels:
        await channel.close()
    assert (status, events[-1]["event"]) == (0, "stopped")
    second.send_signal(signal.SIGTERM)
    assert (await end_of(second))[0] == 0
    assert not Path(f"{tmp_path}/frontend.sock").exists()
