"""``albireo health``: one question, one exit status."""

import asyncio
from pathlib import Path

from albireo import rpc
from albireo.cli.main import main


async def test_the_exit_status_follows_the_service(tmp_path: Path) -> None:
    """1 where nothing listens, and until the service says that it serves."""
    target = f"unix:{tmp_path}/service.sock"
    ask = ["health", "--target", target]
    assert await asyncio.to_thread(main, ask) == 1
    server = rpc.make_server()
    health = await rpc.add_health(server, [])
    server.add_insecure_port(target)
    await server.start()
    try:
        assert await asyncio.to_thread(main, ask) == 1
        await health.set_serving(True)
        assert await asyncio.to_thread(main, ask) == 0
    finally:
        await server.stop(None)
