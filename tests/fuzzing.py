"""Strategies for client messages, built from their descriptors: every field, with any value that its type can have."""

from collections.abc import Callable, Iterator
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

# A field and the way to it from the top.
Path = tuple[FieldDescriptor, ...]

# Deeper, recursive types only repeat themselves.
_MAX_DEPTH = 4

# Well above every limit on the number of entries that a request has.
_MANY = (65, 1025, 10_001)
_MANY_BYTES = 1 << 20  # of one field, about

_MARKER = "marker:marker:marker"

_INT_BITS = {
    FieldDescriptor.CPPTYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, (1 << 64) - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-(1 << 31), (1 << 31) - 1),  # enums are open: any number is one
}
_FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 1e-6, 1e-45, 99.9, 100.5, 3.4e38, float("inf"), float("-inf"), float("nan"))
_STRINGS = (
    "",
    "a",
    " ",
    "\0",
    "\n",
    "x" * 257,
    "x" * 1025,
    "word " * 9000,
    "\U0001f600",
    "\ufeff",
    "\u202e",
    "e\u0301",
)


def paths(descriptor: Descriptor, above: Path = ()) -> Iterator[Path]:
    """To every field of a message type, those of messages in it included."""
    for field in descriptor.fields:
        yield (*above, field)
        inner = _map_value(field) if is_map(field) else field
        if inner is not None and inner.message_type is not None and len(above) + 1 < _MAX_DEPTH:
            yield from paths(inner.message_type, (*above, field))


def is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def values(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    """For `put`: a scalar, a list, a dict; for messages the number of empty ones."""
    if is_map(field):
        value = _map_value(field)
        one = st.none() if value.message_type is not None else _scalars(value)
        return st.dictionaries(_scalars(field.message_type.fields_by_name["key"]), one, max_size=3)
    if field.message_type is not None:
        return st.integers(0, 3) if field.is_repeated else st.just(1)
    scalars = _scalars(field)
    if not field.is_repeated:
        return scalars
    many = st.builds(_repeated, scalars, st.sampled_from(_MANY))
    return st.one_of(st.lists(scalars, max_size=4), many)


def put(message: Message, path: Path, value: Any) -> None:
    """Sets the field at the end of ``path`` to one of its `values`; messages on the way appear."""
    for field in path[:-1]:
        inner = getattr(message, field.name)
        if is_map(field):
            message = inner["key"]
        elif field.is_repeated:
            message = inner[-1] if len(inner) else inner.add()
        else:
            message = inner
            message.SetInParent()
    field = path[-1]
    if is_map(field):
        _put_map(getattr(message, field.name), value)
    elif field.message_type is not None and field.is_repeated:
        for _ in range(value):
            getattr(message, field.name).add()
    elif field.message_type is not None:
        getattr(message, field.name).SetInParent()
    elif field.is_repeated:
        del getattr(message, field.name)[:]
        getattr(message, field.name).extend(value)
    else:
        setattr(message, field.name, value)


@st.composite
def mutated(draw: st.DrawFn, base: st.SearchStrategy[Message], max_fields: int = 2) -> Message:
    """A message of ``base`` in which some fields have any value of their type."""
    original = draw(base)
    message = type(original).FromString(original.SerializeToString())
    all_paths = list(paths(message.DESCRIPTOR))
    if all_paths:
        # The deep ones are many: most of the time, a field near the top.
        near = [path for path in all_paths if len(path) <= 2]
        any_path = weighted((4, st.sampled_from(near)), (1, st.sampled_from(all_paths)))
        for path in draw(st.lists(any_path, max_size=max_fields)):
            put(message, path, draw(values(path[-1])))
    return message


def weighted(*choices: tuple[int, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """Like st.one_of, each strategy as often as its number says."""
    flat = [strategy for weight, strategy in choices for _ in range(weight)]
    return st.integers(0, len(flat) - 1).flatmap(lambda index: flat[index])


def any_message(message_class: Callable[[], Message]) -> st.SearchStrategy[Message]:
    """Fields set at random, many at once."""
    return mutated(st.builds(message_class), max_fields=12)


@st.composite
def damaged(draw: st.DrawFn, messages: st.SearchStrategy[Message]) -> bytes:
    """The bytes of a message, broken on the way."""
    message = draw(messages)
    kind = draw(st.sampled_from(["cut", "flip", "insert", "text", "noise"]))
    if kind == "noise":
        return draw(st.binary(max_size=200))
    if kind == "text":
        return _with_invalid_utf8(draw, message)
    data = bytearray(message.SerializeToString())
    if kind == "insert":
        at = draw(st.integers(0, len(data)))
        return bytes(data[:at]) + draw(st.binary(min_size=1, max_size=20)) + bytes(data[at:])
    if not data:
        return b""
    if kind == "cut":
        return bytes(data[: draw(st.integers(0, len(data) - 1))])
    for at, bit in draw(st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 7)), min_size=1, max_size=8)):
        data[at] ^= 1 << bit
    return bytes(data)


def _with_invalid_utf8(draw: st.DrawFn, message: Message) -> bytes:
    """Puts bytes that are no UTF-8 into a string field."""
    of_strings = [path for path in paths(message.DESCRIPTOR) if path[-1].type == FieldDescriptor.TYPE_STRING]
    if not of_strings:
        return b"\xff"
    path = draw(st.sampled_from(of_strings))
    put(message, path, [_MARKER] if path[-1].is_repeated else _MARKER)
    bad = draw(st.sampled_from([b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\xc0\x80"]))
    return message.SerializeToString().replace(_MARKER.encode(), bad.ljust(len(_MARKER), b"a"))


def _repeated(value: Any, num: int) -> list[Any]:
    size = len(value) if isinstance(value, str | bytes) else 1
    return [value] * min(num, _MANY_BYTES // max(1, size))


def _map_value(field: FieldDescriptor) -> FieldDescriptor:
    return field.message_type.fields_by_name["value"]


def _put_map(target: Any, value: dict[Any, Any]) -> None:
    for key, one in value.items():
        if one is None:
            target[key].SetInParent()
        else:
            target[key] = one


def _scalars(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.cpp_type in _INT_BITS:
        low, high = _INT_BITS[field.cpp_type]
        edges = [i for i in (low, -2, -1, 0, 1, 2, 63, 64, 65, 127, 128, 129, 511, 512, 1002, 1003, high) if i >= low]
        return st.one_of(st.sampled_from(edges), st.integers(0, 16), st.integers(low, high))
    if field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return st.one_of(st.sampled_from(_FLOATS), st.floats(width=32))
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.one_of(st.binary(max_size=20), st.sampled_from([b"", b"\0" * 100_000]))
    return st.one_of(st.sampled_from(_STRINGS), st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
