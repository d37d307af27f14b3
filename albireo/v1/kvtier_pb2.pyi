from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TierJob(_message.Message):
    __slots__ = ("id", "kind", "fingerprint", "num_parts", "part_bytes", "hashes", "anchors", "frames", "ttl_s")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[TierJob.Kind]
        KIND_PROBE: _ClassVar[TierJob.Kind]
        KIND_LOAD: _ClassVar[TierJob.Kind]
        KIND_STORE: _ClassVar[TierJob.Kind]
    KIND_UNSPECIFIED: TierJob.Kind
    KIND_PROBE: TierJob.Kind
    KIND_LOAD: TierJob.Kind
    KIND_STORE: TierJob.Kind
    ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUM_PARTS_FIELD_NUMBER: _ClassVar[int]
    PART_BYTES_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    ANCHORS_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    id: int
    kind: TierJob.Kind
    fingerprint: bytes
    num_parts: int
    part_bytes: int
    hashes: bytes
    anchors: bytes
    frames: bytes
    ttl_s: float
    def __init__(self, id: _Optional[int] = ..., kind: _Optional[_Union[TierJob.Kind, str]] = ..., fingerprint: _Optional[bytes] = ..., num_parts: _Optional[int] = ..., part_bytes: _Optional[int] = ..., hashes: _Optional[bytes] = ..., anchors: _Optional[bytes] = ..., frames: _Optional[bytes] = ..., ttl_s: _Optional[float] = ...) -> None: ...

class TierReport(_message.Message):
    __slots__ = ("id", "succeeded", "num_damaged", "error")
    ID_FIELD_NUMBER: _ClassVar[int]
    SUCCEEDED_FIELD_NUMBER: _ClassVar[int]
    NUM_DAMAGED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: int
    succeeded: bytes
    num_damaged: int
    error: str
    def __init__(self, id: _Optional[int] = ..., succeeded: _Optional[bytes] = ..., num_damaged: _Optional[int] = ..., error: _Optional[str] = ...) -> None: ...
