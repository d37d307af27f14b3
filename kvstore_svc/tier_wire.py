"""Frames on the socket between the store and a Redis worker: uint32 length, little-endian, then the message."""

import asyncio
import struct

_LENGTH = struct.Struct("<I")
_MAX_BYTES = 16 << 20


async def read_message(reader: asyncio.StreamReader) -> bytes | None:
    """None: the other side is gone."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > _MAX_BYTES:
            raise ValueError(f"a message of {length} bytes: at most {_MAX_BYTES}")
        return await reader.readexactly(length)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def write_message(writer: asyncio.StreamWriter, message: bytes) -> None:
    writer.write(_LENGTH.pack(len(message)) + message)
