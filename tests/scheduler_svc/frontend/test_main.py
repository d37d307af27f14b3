"""The process: flags, signals, exit status."""

import asyncio
import json
import signal
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
_RUN = "import sys; from scheduler_svc.frontend.main import main; sys.exit(main(sys.argv[1:]))"


async def start(tmp_path: Path, *argv: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", _RUN, "--planner", f"unix:{tmp_path}/planner.sock", "--port", "0", *argv, stderr=-1
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


async def test_a_lost_planner_ends_it_with_status_1(
    planner_server: Any, model_path: Path, tmp_path: Path, unused_tcp_port: int
) -> None:
    """Metrics are served until then."""
    own = f"unix:{tmp_path}/frontend.sock"
    process = await start(tmp_path, "--model", str(model_path), "--listen", own, "--metrics-port", str(unused_tcp_port))
    await wait_until_serving(own)
    url = f"http://127.0.0.1:{unused_tcp_port}/metrics"
    page = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
    assert "albireo_frontend_streams_open" in page
    await planner_server.stop(None)
    status, events = await end_of(process)
    assert status == 1
    assert "the link to the planner is lost" in events[-1]["reason"]


async def test_a_model_that_is_not_there_ends_it_with_status_1(tmp_path: Path) -> None:
    process = await start(tmp_path, "--model", "./no-such-model")
    status, events = await end_of(process)
    assert status == 1
    assert "no such directory" in events[-1]["reason"]
