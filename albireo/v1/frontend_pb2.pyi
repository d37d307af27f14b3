from albireo.v1 import generation_pb2 as _generation_pb2
from albireo.v1 import plan_pb2 as _plan_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FrontendMessage(_message.Message):
    __slots__ = ("hello", "submits", "truncates", "cancels", "aborts", "flushes_cache", "follows_cache")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMITS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATES_FIELD_NUMBER: _ClassVar[int]
    CANCELS_FIELD_NUMBER: _ClassVar[int]
    ABORTS_FIELD_NUMBER: _ClassVar[int]
    FLUSHES_CACHE_FIELD_NUMBER: _ClassVar[int]
    FOLLOWS_CACHE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    submits: _containers.RepeatedCompositeFieldContainer[Submit]
    truncates: _containers.RepeatedCompositeFieldContainer[Truncate]
    cancels: _containers.RepeatedScalarFieldContainer[int]
    aborts: _containers.RepeatedCompositeFieldContainer[Abort]
    flushes_cache: bool
    follows_cache: bool
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., submits: _Optional[_Iterable[_Union[Submit, _Mapping]]] = ..., truncates: _Optional[_Iterable[_Union[Truncate, _Mapping]]] = ..., cancels: _Optional[_Iterable[int]] = ..., aborts: _Optional[_Iterable[_Union[Abort, _Mapping]]] = ..., flushes_cache: _Optional[bool] = ..., follows_cache: _Optional[bool] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("request_id", "tenant")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    tenant: str
    def __init__(self, request_id: _Optional[str] = ..., tenant: _Optional[str] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("sequence_id", "request_id", "token_ids", "max_tokens", "sampling", "stop_token_ids", "ignore_eos", "priority", "tenant", "is_resumed", "output_token_ids", "remaining_s", "min_output_tokens", "num_prompt_logprobs", "num_scored_tokens", "trace_parent")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    IS_RESUMED_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    REMAINING_S_FIELD_NUMBER: _ClassVar[int]
    MIN_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    NUM_SCORED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRACE_PARENT_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    request_id: str
    token_ids: bytes
    max_tokens: int
    sampling: _plan_pb2.Sampling
    stop_token_ids: bytes
    ignore_eos: bool
    priority: int
    tenant: str
    is_resumed: bool
    output_token_ids: bytes
    remaining_s: float
    min_output_tokens: int
    num_prompt_logprobs: int
    num_scored_tokens: int
    trace_parent: str
    def __init__(self, sequence_id: _Optional[int] = ..., request_id: _Optional[str] = ..., token_ids: _Optional[bytes] = ..., max_tokens: _Optional[int] = ..., sampling: _Optional[_Union[_plan_pb2.Sampling, _Mapping]] = ..., stop_token_ids: _Optional[bytes] = ..., ignore_eos: _Optional[bool] = ..., priority: _Optional[int] = ..., tenant: _Optional[str] = ..., is_resumed: _Optional[bool] = ..., output_token_ids: _Optional[bytes] = ..., remaining_s: _Optional[float] = ..., min_output_tokens: _Optional[int] = ..., num_prompt_logprobs: _Optional[int] = ..., num_scored_tokens: _Optional[int] = ..., trace_parent: _Optional[str] = ...) -> None: ...

class Truncate(_message.Message):
    __slots__ = ("sequence_id", "num_kept")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_KEPT_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    num_kept: int
    def __init__(self, sequence_id: _Optional[int] = ..., num_kept: _Optional[int] = ...) -> None: ...

class PlannerMessage(_message.Message):
    __slots__ = ("welcome", "token_sequence_ids", "token_ids", "ended", "load", "started_sequence_ids", "started_num_cached_tokens", "logprobs", "prompt_logprobs", "cache_events")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    TOKEN_SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    STARTED_SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    STARTED_NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    CACHE_EVENTS_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    token_sequence_ids: bytes
    token_ids: bytes
    ended: _containers.RepeatedCompositeFieldContainer[Ended]
    load: Load
    started_sequence_ids: bytes
    started_num_cached_tokens: bytes
    logprobs: _plan_pb2.Logprobs
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[PromptLogprobs]
    cache_events: _containers.RepeatedCompositeFieldContainer[CacheEvent]
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., token_sequence_ids: _Optional[bytes] = ..., token_ids: _Optional[bytes] = ..., ended: _Optional[_Iterable[_Union[Ended, _Mapping]]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., started_sequence_ids: _Optional[bytes] = ..., started_num_cached_tokens: _Optional[bytes] = ..., logprobs: _Optional[_Union[_plan_pb2.Logprobs, _Mapping]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[PromptLogprobs, _Mapping]]] = ..., cache_events: _Optional[_Iterable[_Union[CacheEvent, _Mapping]]] = ...) -> None: ...

class PromptLogprobs(_message.Message):
    __slots__ = ("sequence_id", "first_position", "logprobs")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_POSITION_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    first_position: int
    logprobs: _plan_pb2.Logprobs
    def __init__(self, sequence_id: _Optional[int] = ..., first_position: _Optional[int] = ..., logprobs: _Optional[_Union[_plan_pb2.Logprobs, _Mapping]] = ...) -> None: ...

class CacheEvent(_message.Message):
    __slots__ = ("stored", "removed_hashes", "reset")
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_HASHES_FIELD_NUMBER: _ClassVar[int]
    RESET_FIELD_NUMBER: _ClassVar[int]
    stored: StoredBlocks
    removed_hashes: bytes
    reset: bool
    def __init__(self, stored: _Optional[_Union[StoredBlocks, _Mapping]] = ..., removed_hashes: _Optional[bytes] = ..., reset: _Optional[bool] = ...) -> None: ...

class StoredBlocks(_message.Message):
    __slots__ = ("parent_hash", "hashes", "token_ids")
    PARENT_HASH_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    parent_hash: bytes
    hashes: bytes
    token_ids: bytes
    def __init__(self, parent_hash: _Optional[bytes] = ..., hashes: _Optional[bytes] = ..., token_ids: _Optional[bytes] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("group",)
    GROUP_FIELD_NUMBER: _ClassVar[int]
    group: _plan_pb2.GroupInfo
    def __init__(self, group: _Optional[_Union[_plan_pb2.GroupInfo, _Mapping]] = ...) -> None: ...

class Ended(_message.Message):
    __slots__ = ("sequence_id", "reason", "matched_token_id", "num_output_tokens", "timings", "refusal")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MATCHED_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    reason: _generation_pb2.FinishReason
    matched_token_id: int
    num_output_tokens: int
    timings: _generation_pb2.Timings
    refusal: Refusal
    def __init__(self, sequence_id: _Optional[int] = ..., reason: _Optional[_Union[_generation_pb2.FinishReason, str]] = ..., matched_token_id: _Optional[int] = ..., num_output_tokens: _Optional[int] = ..., timings: _Optional[_Union[_generation_pb2.Timings, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("code", "message", "retry_after_s")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    retry_after_s: float
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., retry_after_s: _Optional[float] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("num_running", "num_waiting", "num_used_blocks", "is_serving", "num_waiting_tokens", "tokens_per_s", "cache_hit_rate")
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_USED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    IS_SERVING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    CACHE_HIT_RATE_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    num_waiting: int
    num_used_blocks: int
    is_serving: bool
    num_waiting_tokens: int
    tokens_per_s: float
    cache_hit_rate: float
    def __init__(self, num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_used_blocks: _Optional[int] = ..., is_serving: _Optional[bool] = ..., num_waiting_tokens: _Optional[int] = ..., tokens_per_s: _Optional[float] = ..., cache_hit_rate: _Optional[float] = ...) -> None: ...
