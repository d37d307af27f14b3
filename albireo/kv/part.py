"""A part of a block as it lies in the arena, travels to other hosts, and is kept in Redis: a header, then the payload.

The header, 64 bytes, little-endian:

    0   magic "AKVP", version (uint16), index of the part (uint16)
    8   first 8 bytes of the fingerprint
    16  block hash, 32 bytes
    48  payload length (uint32), 4 bytes of zero
    56  xxh3-64 of the 56 bytes before and the payload

Whoever reads checks all of it: what is lost, torn, stale or damaged is a miss.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

Bytes = npt.NDArray[np.uint8]
Piece = npt.NDArray[Any]

HEADER_BYTES = 64
_MAGIC, _VERSION = b"AKVP", 1
_FIELDS = struct.Struct("<4sHH8s32sI4x")
_CHECKSUM = struct.Struct("<Q")
_ALIGNMENT = 64
_CHUNK_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class PartName:
    """Which part of which block. ``fingerprint`` and ``block_hash``: 32 bytes."""

    fingerprint: bytes
    block_hash: bytes
    index: int


def slot_bytes(part_bytes: int) -> int:
    """Room for a part with its header."""
    return HEADER_BYTES + -(-part_bytes // _ALIGNMENT) * _ALIGNMENT


def write_part(slot: Bytes, name: PartName, pieces: Sequence[Piece]) -> None:
    """Gathers ``pieces``, in order, behind a header that tells what they are.

    Args:
        slot: [at least HEADER_BYTES + bytes of all pieces]; nobody else writes there.
        pieces: of any shape and strides.
    """
    num_bytes = _num_bytes(pieces)
    fields = _fields(name, num_bytes)
    slot[:HEADER_BYTES] = 0  # whoever reads meanwhile finds no part
    checksum = xxhash.xxh3_64(fields)
    for place, piece in _in_chunks(slot, pieces):
        np.copyto(place, piece)
        checksum.update(place.data)
    header = fields + _CHECKSUM.pack(checksum.intdigest())
    slot[:HEADER_BYTES] = np.frombuffer(header, dtype=np.uint8)


def read_part(slot: Bytes, expected: PartName, pieces: Sequence[Piece]) -> bool:
    """Scatters the payload over ``pieces`` if the slot holds the expected part, whole.

    Returns:
        Whether it did. If not, the pieces' contents must not be used.
    """
    num_bytes = _num_bytes(pieces)
    header, fields = slot[:HEADER_BYTES].tobytes(), _fields(expected, num_bytes)
    if not _begins(header, fields, slot, num_bytes):
        return False
    checksum = xxhash.xxh3_64(fields)
    for place, piece in _in_chunks(slot, pieces):
        np.copyto(piece, place)
        checksum.update(place.data)
    # A writer clears the header first: where one has come between, it shows.
    return _ends(header, checksum) and slot[:HEADER_BYTES].tobytes() == header


def holds_part(slot: Bytes, expected: PartName, num_bytes: int) -> bool:
    """Whether the slot begins with the expected part, with an undamaged payload of ``num_bytes``."""
    header, fields = slot[:HEADER_BYTES].tobytes(), _fields(expected, num_bytes)
    if not _begins(header, fields, slot, num_bytes):
        return False
    checksum = xxhash.xxh3_64(fields)
    checksum.update(slot[HEADER_BYTES : HEADER_BYTES + num_bytes].data)
    return _ends(header, checksum)


def _begins(header: bytes, fields: bytes, slot: Bytes, num_bytes: int) -> bool:
    return len(slot) >= HEADER_BYTES + num_bytes and header[: _FIELDS.size] == fields


def _ends(header: bytes, checksum: xxhash.xxh3_64) -> bool:
    return header[_FIELDS.size :] == _CHECKSUM.pack(checksum.intdigest())


def _in_chunks(slot: Bytes, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Piece]]:
    """Each piece beside its place in the slot; large ones bit by bit, so that what was copied is still in the
    processor's cache when its checksum is taken."""
    start = HEADER_BYTES
    for piece in pieces:
        place = slot[start : start + piece.nbytes]
        start += piece.nbytes
        if piece.nbytes <= _CHUNK_BYTES or not piece.flags.c_contiguous:
            yield place.view(piece.dtype).reshape(piece.shape), piece
            continue
        flat = piece.reshape(-1).view(np.uint8)
        for at in range(0, len(flat), _CHUNK_BYTES):
            yield place[at : at + _CHUNK_BYTES], flat[at : at + _CHUNK_BYTES]


def _fields(name: PartName, num_bytes: int) -> bytes:
    return _FIELDS.pack(_MAGIC, _VERSION, name.index, name.fingerprint[:8], name.block_hash, num_bytes)


def _num_bytes(pieces: Sequence[Piece]) -> int:
    return sum(piece.nbytes for piece in pieces)
