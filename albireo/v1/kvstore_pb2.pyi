from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KvBlockState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KV_BLOCK_STATE_NEW: _ClassVar[KvBlockState]
    KV_BLOCK_STATE_READY: _ClassVar[KvBlockState]
    KV_BLOCK_STATE_PENDING: _ClassVar[KvBlockState]
KV_BLOCK_STATE_NEW: KvBlockState
KV_BLOCK_STATE_READY: KvBlockState
KV_BLOCK_STATE_PENDING: KvBlockState

class KvRequest(_message.Message):
    __slots__ = ("id", "hello", "lookup", "acquire", "reserve", "commit", "abort", "release")
    class Hello(_message.Message):
        __slots__ = ("name", "epoch", "fingerprint", "num_parts", "part_bytes")
        NAME_FIELD_NUMBER: _ClassVar[int]
        EPOCH_FIELD_NUMBER: _ClassVar[int]
        FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
        NUM_PARTS_FIELD_NUMBER: _ClassVar[int]
        PART_BYTES_FIELD_NUMBER: _ClassVar[int]
        name: str
        epoch: int
        fingerprint: bytes
        num_parts: int
        part_bytes: int
        def __init__(self, name: _Optional[str] = ..., epoch: _Optional[int] = ..., fingerprint: _Optional[bytes] = ..., num_parts: _Optional[int] = ..., part_bytes: _Optional[int] = ...) -> None: ...
    class Lookup(_message.Message):
        __slots__ = ("hashes", "anchors", "asks_redis")
        HASHES_FIELD_NUMBER: _ClassVar[int]
        ANCHORS_FIELD_NUMBER: _ClassVar[int]
        ASKS_REDIS_FIELD_NUMBER: _ClassVar[int]
        hashes: bytes
        anchors: bytes
        asks_redis: bool
        def __init__(self, hashes: _Optional[bytes] = ..., anchors: _Optional[bytes] = ..., asks_redis: _Optional[bool] = ...) -> None: ...
    class Acquire(_message.Message):
        __slots__ = ("hashes", "anchors", "tenant", "priority", "wait_s")
        HASHES_FIELD_NUMBER: _ClassVar[int]
        ANCHORS_FIELD_NUMBER: _ClassVar[int]
        TENANT_FIELD_NUMBER: _ClassVar[int]
        PRIORITY_FIELD_NUMBER: _ClassVar[int]
        WAIT_S_FIELD_NUMBER: _ClassVar[int]
        hashes: bytes
        anchors: bytes
        tenant: str
        priority: int
        wait_s: float
        def __init__(self, hashes: _Optional[bytes] = ..., anchors: _Optional[bytes] = ..., tenant: _Optional[str] = ..., priority: _Optional[int] = ..., wait_s: _Optional[float] = ...) -> None: ...
    class Reserve(_message.Message):
        __slots__ = ("hashes", "anchors", "tenant", "keeps", "ttl_s", "durable")
        HASHES_FIELD_NUMBER: _ClassVar[int]
        ANCHORS_FIELD_NUMBER: _ClassVar[int]
        TENANT_FIELD_NUMBER: _ClassVar[int]
        KEEPS_FIELD_NUMBER: _ClassVar[int]
        TTL_S_FIELD_NUMBER: _ClassVar[int]
        DURABLE_FIELD_NUMBER: _ClassVar[int]
        hashes: bytes
        anchors: bytes
        tenant: str
        keeps: bool
        ttl_s: float
        durable: bool
        def __init__(self, hashes: _Optional[bytes] = ..., anchors: _Optional[bytes] = ..., tenant: _Optional[str] = ..., keeps: _Optional[bool] = ..., ttl_s: _Optional[float] = ..., durable: _Optional[bool] = ...) -> None: ...
    class Commit(_message.Message):
        __slots__ = ("succeeded",)
        SUCCEEDED_FIELD_NUMBER: _ClassVar[int]
        succeeded: bytes
        def __init__(self, succeeded: _Optional[bytes] = ...) -> None: ...
    class Abort(_message.Message):
        __slots__ = ("ranks_may_write",)
        RANKS_MAY_WRITE_FIELD_NUMBER: _ClassVar[int]
        ranks_may_write: bool
        def __init__(self, ranks_may_write: _Optional[bool] = ...) -> None: ...
    class Release(_message.Message):
        __slots__ = ()
        def __init__(self) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    LOOKUP_FIELD_NUMBER: _ClassVar[int]
    ACQUIRE_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    id: int
    hello: KvRequest.Hello
    lookup: KvRequest.Lookup
    acquire: KvRequest.Acquire
    reserve: KvRequest.Reserve
    commit: KvRequest.Commit
    abort: KvRequest.Abort
    release: KvRequest.Release
    def __init__(self, id: _Optional[int] = ..., hello: _Optional[_Union[KvRequest.Hello, _Mapping]] = ..., lookup: _Optional[_Union[KvRequest.Lookup, _Mapping]] = ..., acquire: _Optional[_Union[KvRequest.Acquire, _Mapping]] = ..., reserve: _Optional[_Union[KvRequest.Reserve, _Mapping]] = ..., commit: _Optional[_Union[KvRequest.Commit, _Mapping]] = ..., abort: _Optional[_Union[KvRequest.Abort, _Mapping]] = ..., release: _Optional[_Union[KvRequest.Release, _Mapping]] = ...) -> None: ...

class KvReply(_message.Message):
    __slots__ = ("id", "welcome", "found", "acquired", "reserved", "refused")
    class Welcome(_message.Message):
        __slots__ = ("arena_id", "arena_socket", "credit_bytes", "arena_bytes", "lease", "max_blocks")
        ARENA_ID_FIELD_NUMBER: _ClassVar[int]
        ARENA_SOCKET_FIELD_NUMBER: _ClassVar[int]
        CREDIT_BYTES_FIELD_NUMBER: _ClassVar[int]
        ARENA_BYTES_FIELD_NUMBER: _ClassVar[int]
        LEASE_FIELD_NUMBER: _ClassVar[int]
        MAX_BLOCKS_FIELD_NUMBER: _ClassVar[int]
        arena_id: bytes
        arena_socket: str
        credit_bytes: int
        arena_bytes: int
        lease: int
        max_blocks: int
        def __init__(self, arena_id: _Optional[bytes] = ..., arena_socket: _Optional[str] = ..., credit_bytes: _Optional[int] = ..., arena_bytes: _Optional[int] = ..., lease: _Optional[int] = ..., max_blocks: _Optional[int] = ...) -> None: ...
    class Found(_message.Message):
        __slots__ = ("num_ready", "num_pending", "num_remote", "eta_s")
        NUM_READY_FIELD_NUMBER: _ClassVar[int]
        NUM_PENDING_FIELD_NUMBER: _ClassVar[int]
        NUM_REMOTE_FIELD_NUMBER: _ClassVar[int]
        ETA_S_FIELD_NUMBER: _ClassVar[int]
        num_ready: int
        num_pending: int
        num_remote: int
        eta_s: float
        def __init__(self, num_ready: _Optional[int] = ..., num_pending: _Optional[int] = ..., num_remote: _Optional[int] = ..., eta_s: _Optional[float] = ...) -> None: ...
    class Acquired(_message.Message):
        __slots__ = ("num_blocks", "offsets")
        NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
        OFFSETS_FIELD_NUMBER: _ClassVar[int]
        num_blocks: int
        offsets: bytes
        def __init__(self, num_blocks: _Optional[int] = ..., offsets: _Optional[bytes] = ...) -> None: ...
    class Reserved(_message.Message):
        __slots__ = ("states", "offsets")
        STATES_FIELD_NUMBER: _ClassVar[int]
        OFFSETS_FIELD_NUMBER: _ClassVar[int]
        states: bytes
        offsets: bytes
        def __init__(self, states: _Optional[bytes] = ..., offsets: _Optional[bytes] = ...) -> None: ...
    class Refused(_message.Message):
        __slots__ = ("reason", "retry_after_s")
        REASON_FIELD_NUMBER: _ClassVar[int]
        RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
        reason: str
        retry_after_s: float
        def __init__(self, reason: _Optional[str] = ..., retry_after_s: _Optional[float] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    ACQUIRED_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    id: int
    welcome: KvReply.Welcome
    found: KvReply.Found
    acquired: KvReply.Acquired
    reserved: KvReply.Reserved
    refused: KvReply.Refused
    def __init__(self, id: _Optional[int] = ..., welcome: _Optional[_Union[KvReply.Welcome, _Mapping]] = ..., found: _Optional[_Union[KvReply.Found, _Mapping]] = ..., acquired: _Optional[_Union[KvReply.Acquired, _Mapping]] = ..., reserved: _Optional[_Union[KvReply.Reserved, _Mapping]] = ..., refused: _Optional[_Union[KvReply.Refused, _Mapping]] = ...) -> None: ...

class KvData(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetKvStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class KvStats(_message.Message):
    __slots__ = ("arena_id", "arena_bytes", "used_bytes", "pinned_bytes", "quarantined_bytes", "num_sessions", "num_ranks", "tenants", "num_hits", "num_misses", "num_evicted", "num_redis_workers")
    class Tenant(_message.Message):
        __slots__ = ("tenant", "num_blocks", "num_bytes")
        TENANT_FIELD_NUMBER: _ClassVar[int]
        NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
        NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
        tenant: str
        num_blocks: int
        num_bytes: int
        def __init__(self, tenant: _Optional[str] = ..., num_blocks: _Optional[int] = ..., num_bytes: _Optional[int] = ...) -> None: ...
    ARENA_ID_FIELD_NUMBER: _ClassVar[int]
    ARENA_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PINNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_RANKS_FIELD_NUMBER: _ClassVar[int]
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    NUM_HITS_FIELD_NUMBER: _ClassVar[int]
    NUM_MISSES_FIELD_NUMBER: _ClassVar[int]
    NUM_EVICTED_FIELD_NUMBER: _ClassVar[int]
    NUM_REDIS_WORKERS_FIELD_NUMBER: _ClassVar[int]
    arena_id: bytes
    arena_bytes: int
    used_bytes: int
    pinned_bytes: int
    quarantined_bytes: int
    num_sessions: int
    num_ranks: int
    tenants: _containers.RepeatedCompositeFieldContainer[KvStats.Tenant]
    num_hits: int
    num_misses: int
    num_evicted: int
    num_redis_workers: int
    def __init__(self, arena_id: _Optional[bytes] = ..., arena_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., pinned_bytes: _Optional[int] = ..., quarantined_bytes: _Optional[int] = ..., num_sessions: _Optional[int] = ..., num_ranks: _Optional[int] = ..., tenants: _Optional[_Iterable[_Union[KvStats.Tenant, _Mapping]]] = ..., num_hits: _Optional[int] = ..., num_misses: _Optional[int] = ..., num_evicted: _Optional[int] = ..., num_redis_workers: _Optional[int] = ...) -> None: ...

class FlushKvRequest(_message.Message):
    __slots__ = ("tenant", "fingerprint")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    fingerprint: bytes
    def __init__(self, tenant: _Optional[str] = ..., fingerprint: _Optional[bytes] = ...) -> None: ...

class FlushKvReply(_message.Message):
    __slots__ = ("num_blocks",)
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    def __init__(self, num_blocks: _Optional[int] = ...) -> None: ...
