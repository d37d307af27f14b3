from albireo.v1 import generation_pb2 as _generation_pb2
from albireo.v1 import plan_pb2 as _plan_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FrontendMessage(_message.Message):
    __slots__ = ("hello", "submits", "truncates", "cancels", "abort_labels", "flushes_cache")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMITS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATES_FIELD_NUMBER: _ClassVar[int]
    CANCELS_FIELD_NUMBER: _ClassVar[int]
    ABORT_LABELS_FIELD_NUMBER: _ClassVar[int]
    FLUSHES_CACHE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    submits: _containers.RepeatedCompositeFieldContainer[Submit]
    truncates: _containers.RepeatedCompositeFieldContainer[Truncate]
    cancels: _containers.RepeatedScalarFieldContainer[int]
    abort_labels: _containers.RepeatedScalarFieldContainer[str]
    flushes_cache: bool
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., submits: _Optional[_Iterable[_Union[Submit, _Mapping]]] = ..., truncates: _Optional[_Iterable[_Union[Truncate, _Mapping]]] = ..., cancels: _Optional[_Iterable[int]] = ..., abort_labels: _Optional[_Iterable[str]] = ..., flushes_cache: _Optional[bool] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("sequence_id", "request_id", "token_ids", "max_tokens", "sampling", "stop_token_ids", "ignore_eos", "priority", "tenant", "is_resumed", "output_token_ids", "remaining_s", "min_output_tokens")
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
    def __init__(self, sequence_id: _Optional[int] = ..., request_id: _Optional[str] = ..., token_ids: _Optional[bytes] = ..., max_tokens: _Optional[int] = ..., sampling: _Optional[_Union[_plan_pb2.Sampling, _Mapping]] = ..., stop_token_ids: _Optional[bytes] = ..., ignore_eos: _Optional[bool] = ..., priority: _Optional[int] = ..., tenant: _Optional[str] = ..., is_resumed: _Optional[bool] = ..., output_token_ids: _Optional[bytes] = ..., remaining_s: _Optional[float] = ..., min_output_tokens: _Optional[int] = ...) -> None: ...

class Truncate(_message.Message):
    __slots__ = ("sequence_id", "num_kept")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_KEPT_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    num_kept: int
    def __init__(self, sequence_id: _Optional[int] = ..., num_kept: _Optional[int] = ...) -> None: ...

class PlannerMessage(_message.Message):
    __slots__ = ("welcome", "token_sequence_ids", "token_ids", "ended", "load", "started_sequence_ids", "started_num_cached_tokens", "logprobs")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    TOKEN_SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    STARTED_SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    STARTED_NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    token_sequence_ids: bytes
    token_ids: bytes
    ended: _containers.RepeatedCompositeFieldContainer[Ended]
    load: Load
    started_sequence_ids: bytes
    started_num_cached_tokens: bytes
    logprobs: _plan_pb2.Logprobs
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., token_sequence_ids: _Optional[bytes] = ..., token_ids: _Optional[bytes] = ..., ended: _Optional[_Iterable[_Union[Ended, _Mapping]]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., started_sequence_ids: _Optional[bytes] = ..., started_num_cached_tokens: _Optional[bytes] = ..., logprobs: _Optional[_Union[_plan_pb2.Logprobs, _Mapping]] = ...) -> None: ...

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
    __slots__ = ("num_running", "num_waiting", "num_used_blocks", "is_serving")
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_USED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    IS_SERVING_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    num_waiting: int
    num_used_blocks: int
    is_serving: bool
    def __init__(self, num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_used_blocks: _Optional[int] = ..., is_serving: _Optional[bool] = ...) -> None: ...
