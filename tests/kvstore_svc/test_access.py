"""Who may talk to the store: with a token file, our own services and nobody else."""

from pathlib import Path

import pytest

from albireo.errors import StoreUnavailable
from albireo.kv.session import open_session
from albireo.rpc import make_channel
from albireo.security import SecurityFlags, load_security
from kv_stores import NAMESPACE
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
