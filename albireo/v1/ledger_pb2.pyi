from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReadLedgerRequest(_message.Message):
    __slots__ = ("num_rows",)
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    num_rows: int
    def __init__(self, num_rows: _Optional[int] = ...) -> None: ...

class LedgerPages(_message.Message):
    __slots__ = ("pages",)
    PAGES_FIELD_NUMBER: _ClassVar[int]
    pages: _containers.RepeatedCompositeFieldContainer[LedgerPage]
    def __init__(self, pages: _Optional[_Iterable[_Union[LedgerPage, _Mapping]]] = ...) -> None: ...

class LedgerPage(_message.Message):
    __slots__ = ("process", "clock", "columns", "rows")
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    process: str
    clock: str
    columns: _containers.RepeatedScalarFieldContainer[str]
    rows: bytes
    def __init__(self, process: _Optional[str] = ..., clock: _Optional[str] = ..., columns: _Optional[_Iterable[str]] = ..., rows: _Optional[bytes] = ...) -> None: ...
