"""Who may talk to the store: with a token file, our own services and nobody else."""

import asyncio
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from albireo.errors import StoreUnavailable
from albireo.kv.link import KvLink
from albireo.kv.session import open_session
from albireo.rpc import make_channel
from albireo.security import SecurityFlags, load_security
from kv_stores import NAMESPACE, until
from services import process

SERVICE, TENANT = "service-token-0123456789", "tenant-token-0123456789"


async def test_sessions_need_a_services_token(tmp_path: Path):
    tokens = tmp_path / "tokens"
    tokens.write_text(f"albireo service {SERVICE}\nsomebody tenant {TENANT}\n")
    address = f"unix:{tmp_path}/kv.sock"
    argv = ["kvstore_svc", "--listen", address, "--run-dir", str(tmp_path), "--arena-gib", "0.1"]
    with process([*argv, "--auth-token-file", str(tokens)], tmp_path / "kv.log"):
        own = load_security(SecurityFlags(auth_token_file=str(tokens)))
        async with make_channel(address, to_peer=True, security=own) as channel:
            await channel.channel_ready()
            session = await open_session(channel, "p", 1, NAMESPACE)
            assert session.is_open
            await session.close()
        for token in ("", TENANT):
            other = load_security(SecurityFlags(), token)
            async with make_channel(address, to_peer=True, security=other) as channel:
                with pytest.raises(StoreUnavailable, match=r"UNAUTHENTICATED|PERMISSION_DENIED"):
                    await open_session(channel, "q", 1, NAMESPACE)
        await check_that_the_log_says_so(KvLink(address, "q", NAMESPACE, security=other))


async def check_that_the_log_says_so(link: KvLink) -> None:
    """Of a planner that is not let in; it goes on trying, for tokens may change."""
    with capture_logs() as lines:
        running = asyncio.create_task(link.run())

        async def is_told() -> bool:
            return bool(lines)

        await until(is_told, "the log says nothing")
        assert [line["event"] for line in lines] == ["no session with the KV store"]
        assert "PERMISSION_DENIED: /albireo.v1.KvStore/Session is not for the role tenant" in lines[0]["reason"]
        assert not running.done()
        running.cancel()
        await asyncio.wait({running})
