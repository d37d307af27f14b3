"""A Redis that asks for TLS, a certificate and an ACL user's password: with these all comes, without them nothing does,
and nobody waits."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from albireo.errors import ConfigError
from certificates import LOOPBACK, Authority
from kv_stores import RedisServer, chain, flush, kv_store, planner, redis_server, until
from kvstore_svc.config import RedisFlags
from kvstore_svc.redis_blocks import connect
from needs import needs_redis
from services import free_port

PASSWORD = "pass word of the store"
# What docs/deployment.md gives to the store's user.
RIGHTS = ["+exists", "+hmget", "+hset", "+pexpire"]


@dataclass(frozen=True)
class Guarded:
    """A Redis, and flags with which the store gets in."""

    redis: RedisServer
    flags: RedisFlags


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"), "ours")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[Guarded]:
    directory, port = tmp_path_factory.mktemp("redis"), free_port()
    own, client = authority.sign("redis", LOOPBACK), authority.sign("store")
    argv = ["--tls-port", str(port), "--tls-auth-clients", "yes", "--tls-ca-cert-file", str(authority.path)]
    argv += ["--tls-cert-file", str(own.cert), "--tls-key-file", str(own.key)]
    (directory / "password").write_text(PASSWORD + "\n")
    with redis_server(directory, *argv) as redis:
        redis.client.acl_setuser("kv", enabled=True, passwords=[f"+{PASSWORD}"], keys=["albireo:*"], commands=RIGHTS)
        flags = RedisFlags(
            redis=f"rediss://kv@127.0.0.1:{port}",
            redis_ca=str(authority.path),
            redis_cert=str(client.cert),
            redis_key=str(client.key),
            redis_password_file=str(directory / "password"),
        )
        yield Guarded(redis, flags)


def flags_of(flags: RedisFlags) -> dict[str, object]:
    """Those that are given."""
    return {name: value for name, value in vars(flags).items() if value and name.startswith("redis")}


@needs_redis
async def test_blocks_come_back_over_tls_as_an_acl_user(tmp_path: Path, guarded: Guarded):
    hashes = chain("a", 20)
    with kv_store(tmp_path, **flags_of(guarded.flags)) as store:
        async with planner(store) as one:
            await one.put(hashes, durable=True)

            async def are_stored() -> bool:
                return guarded.redis.client.dbsize() == len(hashes)

            await until(are_stored, "the blocks are not in Redis")
            await flush(store)
            assert await one.num_remote(hashes) == 20
            assert await one.use(hashes) == 20
        assert "redis failed" not in (tmp_path / "kvstore.log").read_text()


@needs_redis
@pytest.mark.parametrize(
    ("what", "words"),
    [("authority", "CERTIFICATE_VERIFY_FAILED"), ("password", "invalid username-password pair")],
)
async def test_a_wrong_authority_or_password_is_a_miss_and_a_line_in_the_log(
    tmp_path: Path, guarded: Guarded, what: str, words: str
):
    hashes = chain("b", 20)
    wrong = tmp_path / "password"
    wrong.write_text("another password\n")
    change = {"redis_ca": str(Authority(tmp_path, "strange").path)}
    if what == "password":
        change = {"redis_password_file": str(wrong)}
    with kv_store(tmp_path / "kv", **flags_of(replace(guarded.flags, **change))) as store:
        async with planner(store) as one:
            began = time.monotonic()
            assert await one.num_remote(hashes) == 0
            assert await one.use(hashes, wait_s=2.0) == 0
            await one.put(hashes, durable=True)
            assert await one.use(hashes) == 20
            assert time.monotonic() - began < 5.0
        log = (store.run_dir / "kvstore.log").read_text()
        assert "redis failed" in log
        assert words in log
        assert PASSWORD not in log


def test_files_that_cannot_be_used_are_refused_by_name(tmp_path: Path, authority: Authority):
    pair, other = authority.sign("a"), authority.sign("b")
    tls = RedisFlags(redis="rediss://r")
    wrong = {
        "--redis-ca /none: No such file": replace(tls, redis_ca="/none"),
        "--redis-ca .*: only a rediss:// URL": RedisFlags(redis="redis://r", redis_ca=str(authority.path)),
        "--redis-cert and --redis-key: one without": replace(tls, redis_cert=str(pair.cert)),
        "not certificates and a key": replace(tls, redis_cert=str(pair.cert), redis_key=str(other.key)),
        "a.key: not certificates": replace(tls, redis_ca=str(pair.key)),
    }
    for message, flags in wrong.items():
        with pytest.raises(ConfigError, match=message):
            connect(flags)
