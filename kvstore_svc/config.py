"""Configuration of the KV store."""

from dataclasses import dataclass, fields

from albireo.config import flag
from albireo.security import SecurityFlags

_MIB, _GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class RedisFlags:
    """How to reach Redis. Without a URL nothing else counts."""

    redis: str = flag("", "redis://, rediss:// or unix:// URL of the second tier, ACL user included; empty: none")
    redis_cluster: bool = flag(False, "the URL names a node of a Redis Cluster")
    redis_password_file: str = flag("", "its password, in place of one in the URL")
    redis_ca: str = flag("", "authority of Redis's certificate, PEM (rediss://)")
    redis_cert: str = flag("", "certificate shown to Redis, PEM")
    redis_key: str = flag("", "its private key, PEM")
    redis_mac_key_file: str = flag("", "16 to 64 bytes: what Redis holds is signed with them, and nothing else is read")
    redis_timeout: float = flag(1.0, "seconds after which an operation counts as failed")
    redis_connections: int = flag(4, "connections of each worker")


REDIS_FLAGS = tuple(each.name for each in fields(RedisFlags))


@dataclass(frozen=True)
class StoreConfig(SecurityFlags, RedisFlags):
    """Flags of ``python -m kvstore_svc``."""

    listen: str = flag("127.0.0.1:50054", "address of the store: host:port or unix:path")
    arena_gib: float = flag(1.0, "memory for blocks, GiB; the system gives pages when they are first used")
    segment_mib: float = flag(64.0, "the arena is handed to models in pieces of this size, MiB; a block fits into one")
    credit_gib: float = flag(0.0, "what one planner may keep from eviction, GiB; 0: three quarters of the arena")
    tenant_gib: float = flag(0.0, "what one tenant may have, GiB; 0: the arena")
    ttl: float = flag(86_400.0, "seconds after which a block is forgotten, in Redis as well; 0: never")
    redis_workers: int = flag(1, "processes that talk to Redis")
    redis_queue: float = flag(2.0, "seconds of writing that may wait for Redis; what comes past it is not written")
    run_dir: str = flag("", "directory for the arena's socket; default: a temporary one")
    metrics_port: int = flag(0, "Prometheus metrics on this port of 127.0.0.1; 0: none")
    log_level: str = flag("info", "least level that is logged", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        if not 0 < self.segment_mib <= self.arena_gib * 1024:
            raise ValueError(f"--segment-mib {self.segment_mib:g}: more than 0, at most --arena-gib {self.arena_gib:g}")
        for name in ("credit_gib", "tenant_gib", "ttl", "redis_queue"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name):g}: not negative")
        if not 0 < self.redis_timeout <= 60:
            raise ValueError(f"--redis-timeout {self.redis_timeout:g}: more than 0, at most 60")
        for name, limit in (("redis_workers", 16), ("redis_connections", 64)):
            if not 1 <= getattr(self, name) <= limit:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: 1 to {limit}")

    @property
    def segment_bytes(self) -> int:
        return int(self.segment_mib * _MIB) & -4096

    @property
    def arena_bytes(self) -> int:
        """Whole segments."""
        return int(self.arena_gib * _GIB) // self.segment_bytes * self.segment_bytes

    @property
    def credit_bytes(self) -> int:
        return int(self.credit_gib * _GIB) or self.arena_bytes * 3 // 4


@dataclass(frozen=True)
class WorkerConfig(RedisFlags):
    """Flags of ``python -m kvstore_svc redis-worker``, which the store starts."""

    name: str = flag("redis-0", "for logs")
    socket_fd: int = flag(-1, "descriptor of the socket to the store")
    arena_fd: int = flag(-1, "descriptor of the arena")
    log_level: str = flag("info", "least level that is logged", choices=("debug", "info", "warning", "error"))
