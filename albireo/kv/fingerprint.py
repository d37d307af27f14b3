"""What the bytes of blocks mean: blocks of different meaning never meet."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from albireo.kv.part import slot_bytes

FINGERPRINT_BYTES = 32
MAX_PARTS = 4096
MAX_PART_BYTES = 4 << 20


def fingerprint_of(facts: Mapping[str, str | int | float | bool | None]) -> bytes:
    """32 bytes that name the bytes of a model's blocks.

    Args:
        facts: all that the bytes depend on (weights, KV dtype and scales, heads, rope, layout and its version, tokens
            of a block), and nothing that they do not, as the TP degree.
    """
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).digest()


@dataclass(frozen=True, slots=True)
class Namespace:
    """Blocks of one meaning and one shape.

    Raises:
        ValueError: a field is out of its range; the message names it.
    """

    fingerprint: bytes
    num_parts: int
    part_bytes: int

    def __post_init__(self) -> None:
        if len(self.fingerprint) != FINGERPRINT_BYTES:
            raise ValueError(f"fingerprint of {len(self.fingerprint)} bytes: {FINGERPRINT_BYTES}")
        if not 1 <= self.num_parts <= MAX_PARTS:
            raise ValueError(f"num_parts {self.num_parts}: 1 to {MAX_PARTS}")
        if not 1 <= self.part_bytes <= MAX_PART_BYTES:
            raise ValueError(f"part_bytes {self.part_bytes}: 1 to {MAX_PART_BYTES}")

    @property
    def slot_bytes(self) -> int:
        """A part with its header."""
        return slot_bytes(self.part_bytes)

    @property
    def frame_bytes(self) -> int:
        """A block: the slots of its parts, side by side."""
        return self.num_parts * self.slot_bytes
