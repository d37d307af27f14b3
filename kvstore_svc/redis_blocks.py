"""Blocks in Redis: a hash for each, a field for each part, and in it header, payload and, with a key, a MAC.

Redis is storage that anybody may have written to: what comes back is checked before it reaches the arena.
"""

import asyncio
import hashlib
import hmac
import ssl
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from albireo.errors import ConfigError
from albireo.kv.fingerprint import Namespace
from albireo.kv.part import HEADER_BYTES, Bytes, PartName, holds_part
from kvstore_svc.config import RedisFlags

_MAC_BYTES = 32
_MAC_KEY_BYTES = (16, 64)  # BLAKE2b takes no more
_TTL_JITTER = 0.1

FAILURES = (RedisError, OSError, asyncio.TimeoutError)
Client = Redis | RedisCluster


def connect(flags: RedisFlags) -> Client:
    """A client that connects when it is first used. Raises ConfigError where the flags make no sense."""
    options: dict[str, Any] = {"socket_timeout": flags.redis_timeout, "socket_connect_timeout": flags.redis_timeout}
    if flags.redis_password_file:
        options["password"] = _read(flags.redis_password_file, "--redis-password-file").decode().strip()
    options |= _tls_options(flags)
    # Once, for connections that Redis has closed meanwhile; what is slow is a miss now, not a hit later.
    retry = Retry(NoBackoff(), 1, (RedisConnectionError,))
    try:
        if flags.redis_cluster:
            return RedisCluster.from_url(flags.redis, max_connections=flags.redis_connections, **options)
        return Redis.from_url(flags.redis, max_connections=flags.redis_connections, retry=retry, **options)
    except (ValueError, RedisError) as error:
        raise ConfigError(f"--redis: {error}") from error


def _tls_options(flags: RedisFlags) -> dict[str, str]:
    """redis-py's. Raises ConfigError for files that cannot be used."""
    names = {"redis_ca": "ssl_ca_certs", "redis_cert": "ssl_certfile", "redis_key": "ssl_keyfile"}
    files = {name: file for name in names if (file := getattr(flags, name))}
    for name, file in files.items():
        flag = f"--{name.replace('_', '-')}"
        if urlsplit(flags.redis).scheme != "rediss":
            raise ConfigError(f"{flag} {file}: only a rediss:// URL of --redis uses it")
        _read(file, flag)
    if bool(flags.redis_cert) != bool(flags.redis_key):
        raise ConfigError("--redis-cert and --redis-key: one without the other; they go together")
    try:
        context = ssl.create_default_context(cafile=flags.redis_ca or None)
        if flags.redis_cert:
            context.load_cert_chain(flags.redis_cert, flags.redis_key)
    except ssl.SSLError as error:
        shown = ", ".join(files.values())
        raise ConfigError(f"{shown}: not certificates and a key in PEM format ({error.reason})") from error
    return {names[name]: file for name, file in files.items()}


def load_mac_key(flags: RedisFlags) -> bytes:
    """Empty: no MAC. Raises ConfigError where the file cannot be used."""
    if not flags.redis_mac_key_file:
        return b""
    key = _read(flags.redis_mac_key_file, "--redis-mac-key-file")
    least, most = _MAC_KEY_BYTES
    if not least <= len(key) <= most:
        raise ConfigError(f"--redis-mac-key-file {flags.redis_mac_key_file}: {len(key)} bytes; {least} to {most}")
    return key


def key_of(namespace: Namespace, block_hash: bytes, anchor: bytes) -> str:
    """Blocks with one anchor are on one node of a cluster."""
    return f"albireo:{{{anchor.hex()}}}:{namespace.fingerprint[:8].hex()}:{block_hash.hex()}"


class RedisBlocks:
    """Probes, loads and stores single blocks. Every call may raise one of `FAILURES`.

    Args:
        memory: the arena.
        mac_key: empty: no MAC.
    """

    def __init__(self, client: Client, memory: Bytes, mac_key: bytes) -> None:
        self._client = client
        self._memory = memory
        self._mac_key = mac_key

    async def probe(self, namespace: Namespace, hashes: Sequence[bytes], anchors: Sequence[bytes]) -> list[bool]:
        """Which blocks have a key."""
        pipeline = self._client.pipeline(transaction=False)
        for block_hash, anchor in zip(hashes, anchors, strict=True):
            pipeline.exists(key_of(namespace, block_hash, anchor))
        return [bool(each) for each in await pipeline.execute()]

    async def load(self, namespace: Namespace, block_hash: bytes, anchor: bytes, frame: int) -> bool | None:
        """Fetches a block into its frame; False: it is not there, None: it is not what was written."""
        fields = [str(index) for index in range(namespace.num_parts)]
        values = await _awaited(self._client.hmget(key_of(namespace, block_hash, anchor), fields))
        if any(value is None for value in values):
            return False
        for index, value in enumerate(values):
            name = PartName(namespace.fingerprint, block_hash, index)
            slot = self._checked(value, name, namespace.part_bytes)
            if slot is None:
                return None
            start = frame + index * namespace.slot_bytes
            self._memory[start : start + len(slot)] = slot
        return True

    async def store(self, namespace: Namespace, block_hash: bytes, anchor: bytes, frame: int, ttl_s: float) -> None:
        """Writes a block from its frame. ``ttl_s`` 0: for ever."""
        key = key_of(namespace, block_hash, anchor)
        values = {str(index): self._value(frame, index, namespace) for index in range(namespace.num_parts)}
        pipeline = self._client.pipeline(transaction=False)
        pipeline.hset(key, mapping=cast(Any, values))
        if ttl_s:
            pipeline.pexpire(key, int(1000 * ttl_s * (1 - _TTL_JITTER * block_hash[0] / 255)))
        await pipeline.execute()

    def _value(self, frame: int, index: int, namespace: Namespace) -> bytes | memoryview:
        start = frame + index * namespace.slot_bytes
        part = self._memory[start : start + HEADER_BYTES + namespace.part_bytes].data
        return bytes(part) + self._mac(part) if self._mac_key else part

    def _checked(self, value: bytes, name: PartName, part_bytes: int) -> Bytes | None:
        """Header and payload, if they are what was written."""
        num_bytes = HEADER_BYTES + part_bytes
        if len(value) != num_bytes + (_MAC_BYTES if self._mac_key else 0):
            return None
        part = memoryview(value)[:num_bytes]
        if self._mac_key and not hmac.compare_digest(self._mac(part), value[num_bytes:]):
            return None
        slot = np.frombuffer(part, dtype=np.uint8)
        return slot if holds_part(slot, name, part_bytes) else None

    def _mac(self, part: memoryview) -> bytes:
        return hashlib.blake2b(part, key=self._mac_key, digest_size=_MAC_BYTES).digest()


async def _awaited(call: Awaitable[Any] | Any) -> Any:
    """redis-py's types leave open whether a call is asynchronous."""
    return await call


def _read(file: str, name: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise ConfigError(f"{name} {file}: {error.strerror}") from error
