from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GroupStatus(_message.Message):
    __slots__ = ("state", "stage", "progress", "info", "epoch", "next_step_id", "num_queued")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[GroupStatus.State]
        STATE_LOADING: _ClassVar[GroupStatus.State]
        STATE_READY: _ClassVar[GroupStatus.State]
    STATE_UNSPECIFIED: GroupStatus.State
    STATE_LOADING: GroupStatus.State
    STATE_READY: GroupStatus.State
    STATE_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    INFO_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NEXT_STEP_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_QUEUED_FIELD_NUMBER: _ClassVar[int]
    state: GroupStatus.State
    stage: str
    progress: float
    info: GroupInfo
    epoch: int
    next_step_id: int
    num_queued: int
    def __init__(self, state: _Optional[_Union[GroupStatus.State, str]] = ..., stage: _Optional[str] = ..., progress: _Optional[float] = ..., info: _Optional[_Union[GroupInfo, _Mapping]] = ..., epoch: _Optional[int] = ..., next_step_id: _Optional[int] = ..., num_queued: _Optional[int] = ...) -> None: ...

class GroupInfo(_message.Message):
    __slots__ = ("engine", "device", "dtype", "tp_size", "vocab_size", "eos_token_ids", "block_size", "num_blocks", "max_num_seqs", "max_model_len", "max_num_batched_tokens", "kv_layout")
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    TP_SIZE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_BATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    engine: str
    device: str
    dtype: str
    tp_size: int
    vocab_size: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_model_len: int
    max_num_batched_tokens: int
    kv_layout: KvLayout
    def __init__(self, engine: _Optional[str] = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ..., tp_size: _Optional[int] = ..., vocab_size: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., block_size: _Optional[int] = ..., num_blocks: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., max_model_len: _Optional[int] = ..., max_num_batched_tokens: _Optional[int] = ..., kv_layout: _Optional[_Union[KvLayout, _Mapping]] = ...) -> None: ...

class KvLayout(_message.Message):
    __slots__ = ("fingerprint", "num_parts", "part_bytes", "arena")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUM_PARTS_FIELD_NUMBER: _ClassVar[int]
    PART_BYTES_FIELD_NUMBER: _ClassVar[int]
    ARENA_FIELD_NUMBER: _ClassVar[int]
    fingerprint: bytes
    num_parts: int
    part_bytes: int
    arena: str
    def __init__(self, fingerprint: _Optional[bytes] = ..., num_parts: _Optional[int] = ..., part_bytes: _Optional[int] = ..., arena: _Optional[str] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "seed", "min_tokens", "suppressed_token_ids", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "bias_token_ids", "biases", "allowed_token_ids", "bad_words", "num_logprobs", "allowed_mask")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SUPPRESSED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    BIAS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BIASES_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    NUM_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_MASK_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    seed: int
    min_tokens: int
    suppressed_token_ids: bytes
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    bias_token_ids: bytes
    biases: bytes
    allowed_token_ids: bytes
    bad_words: _containers.RepeatedScalarFieldContainer[bytes]
    num_logprobs: int
    allowed_mask: bytes
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., seed: _Optional[int] = ..., min_tokens: _Optional[int] = ..., suppressed_token_ids: _Optional[bytes] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., bias_token_ids: _Optional[bytes] = ..., biases: _Optional[bytes] = ..., allowed_token_ids: _Optional[bytes] = ..., bad_words: _Optional[_Iterable[bytes]] = ..., num_logprobs: _Optional[int] = ..., allowed_mask: _Optional[bytes] = ...) -> None: ...

class Logprobs(_message.Message):
    __slots__ = ("indices", "logprobs", "ranks", "num_top", "top_token_ids", "top_logprobs")
    INDICES_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOP_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    indices: bytes
    logprobs: bytes
    ranks: bytes
    num_top: bytes
    top_token_ids: bytes
    top_logprobs: bytes
    def __init__(self, indices: _Optional[bytes] = ..., logprobs: _Optional[bytes] = ..., ranks: _Optional[bytes] = ..., num_top: _Optional[bytes] = ..., top_token_ids: _Optional[bytes] = ..., top_logprobs: _Optional[bytes] = ...) -> None: ...

class NewSequence(_message.Message):
    __slots__ = ("slot", "token_ids", "num_prompt_tokens", "num_computed_tokens", "block_table", "sampling", "num_prompt_logprobs", "trace_parent")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TABLE_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TRACE_PARENT_FIELD_NUMBER: _ClassVar[int]
    slot: int
    token_ids: bytes
    num_prompt_tokens: int
    num_computed_tokens: int
    block_table: bytes
    sampling: Sampling
    num_prompt_logprobs: int
    trace_parent: str
    def __init__(self, slot: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., num_prompt_tokens: _Optional[int] = ..., num_computed_tokens: _Optional[int] = ..., block_table: _Optional[bytes] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., num_prompt_logprobs: _Optional[int] = ..., trace_parent: _Optional[str] = ...) -> None: ...

class StepPlan(_message.Message):
    __slots__ = ("epoch", "step_id", "finished_slots", "new_sequences", "append_slots", "append_blocks", "row_slots", "row_num_scheduled_tokens", "row_samples", "transfers", "only_transfers")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    FINISHED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    NEW_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    APPEND_SLOTS_FIELD_NUMBER: _ClassVar[int]
    APPEND_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ROW_SLOTS_FIELD_NUMBER: _ClassVar[int]
    ROW_NUM_SCHEDULED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROW_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    ONLY_TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step_id: int
    finished_slots: bytes
    new_sequences: _containers.RepeatedCompositeFieldContainer[NewSequence]
    append_slots: bytes
    append_blocks: bytes
    row_slots: bytes
    row_num_scheduled_tokens: bytes
    row_samples: bytes
    transfers: _containers.RepeatedCompositeFieldContainer[Transfer]
    only_transfers: bool
    def __init__(self, epoch: _Optional[int] = ..., step_id: _Optional[int] = ..., finished_slots: _Optional[bytes] = ..., new_sequences: _Optional[_Iterable[_Union[NewSequence, _Mapping]]] = ..., append_slots: _Optional[bytes] = ..., append_blocks: _Optional[bytes] = ..., row_slots: _Optional[bytes] = ..., row_num_scheduled_tokens: _Optional[bytes] = ..., row_samples: _Optional[bytes] = ..., transfers: _Optional[_Iterable[_Union[Transfer, _Mapping]]] = ..., only_transfers: _Optional[bool] = ...) -> None: ...

class Transfer(_message.Message):
    __slots__ = ("transfer_id", "kind", "blocks", "hashes", "offsets", "after_step", "lease")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[Transfer.Kind]
        KIND_STORE: _ClassVar[Transfer.Kind]
        KIND_LOAD: _ClassVar[Transfer.Kind]
    KIND_UNSPECIFIED: Transfer.Kind
    KIND_STORE: Transfer.Kind
    KIND_LOAD: Transfer.Kind
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    AFTER_STEP_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    transfer_id: int
    kind: Transfer.Kind
    blocks: bytes
    hashes: bytes
    offsets: bytes
    after_step: int
    lease: KvLease
    def __init__(self, transfer_id: _Optional[int] = ..., kind: _Optional[_Union[Transfer.Kind, str]] = ..., blocks: _Optional[bytes] = ..., hashes: _Optional[bytes] = ..., offsets: _Optional[bytes] = ..., after_step: _Optional[int] = ..., lease: _Optional[_Union[KvLease, _Mapping]] = ...) -> None: ...

class KvLease(_message.Message):
    __slots__ = ("arena_id", "arena_bytes", "lease")
    ARENA_ID_FIELD_NUMBER: _ClassVar[int]
    ARENA_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    arena_id: bytes
    arena_bytes: int
    lease: int
    def __init__(self, arena_id: _Optional[bytes] = ..., arena_bytes: _Optional[int] = ..., lease: _Optional[int] = ...) -> None: ...

class TransferResult(_message.Message):
    __slots__ = ("transfer_id", "succeeded", "num_bytes", "duration_ns")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    SUCCEEDED_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    DURATION_NS_FIELD_NUMBER: _ClassVar[int]
    transfer_id: int
    succeeded: bytes
    num_bytes: int
    duration_ns: int
    def __init__(self, transfer_id: _Optional[int] = ..., succeeded: _Optional[bytes] = ..., num_bytes: _Optional[int] = ..., duration_ns: _Optional[int] = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("epoch", "step_id", "token_ids", "timings", "logprobs", "prompt_logprobs", "transfers", "only_transfers")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    ONLY_TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step_id: int
    token_ids: bytes
    timings: StepTimings
    logprobs: Logprobs
    prompt_logprobs: Logprobs
    transfers: _containers.RepeatedCompositeFieldContainer[TransferResult]
    only_transfers: bool
    def __init__(self, epoch: _Optional[int] = ..., step_id: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., timings: _Optional[_Union[StepTimings, _Mapping]] = ..., logprobs: _Optional[_Union[Logprobs, _Mapping]] = ..., prompt_logprobs: _Optional[_Union[Logprobs, _Mapping]] = ..., transfers: _Optional[_Iterable[_Union[TransferResult, _Mapping]]] = ..., only_transfers: _Optional[bool] = ...) -> None: ...

class StepTimings(_message.Message):
    __slots__ = ("prepare_ns", "forward_ns", "sample_ns", "idle_ns")
    PREPARE_NS_FIELD_NUMBER: _ClassVar[int]
    FORWARD_NS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_NS_FIELD_NUMBER: _ClassVar[int]
    IDLE_NS_FIELD_NUMBER: _ClassVar[int]
    prepare_ns: int
    forward_ns: int
    sample_ns: int
    idle_ns: int
    def __init__(self, prepare_ns: _Optional[int] = ..., forward_ns: _Optional[int] = ..., sample_ns: _Optional[int] = ..., idle_ns: _Optional[int] = ...) -> None: ...
