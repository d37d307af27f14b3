"""How a planner uses a KV store: flags that `albireo serve` and the scheduler hand on to it."""

from dataclasses import dataclass, fields
from pathlib import Path

from albireo.config import flag
from albireo.errors import ConfigError

_SECRET_BYTES = (16, 64)


@dataclass(frozen=True)
class KvFlags:
    """Without a store nothing else counts but the secret, which keys the names of blocks in any case."""

    kv_store: str = flag("", "KV store for prefixes and preempted sequences: host:port or unix:path; empty: none")
    swap: str = flag(
        "auto",
        "preempted sequences go to the KV store: where that is measured to be quicker than computing, always, or never",
        ("auto", "always", "never"),
    )
    kv_secret_file: str = flag("", "16 to 64 bytes that key the names of blocks, so that nobody else can work them out")


KV_FLAGS = tuple(each.name for each in fields(KvFlags))


def load_secret(flags: KvFlags) -> bytes:
    """Empty: none. Raises ConfigError where the file cannot be used."""
    file = flags.kv_secret_file
    if not file:
        return b""
    try:
        secret = Path(file).read_bytes()
    except OSError as error:
        raise ConfigError(f"--kv-secret-file {file}: {error.strerror}") from error
    least, most = _SECRET_BYTES
    if not least <= len(secret) <= most:
        raise ConfigError(f"--kv-secret-file {file}: {len(secret)} bytes; {least} to {most}")
    return secret
