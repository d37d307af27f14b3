"""How a block of a rank's KV cache is cut into the parts that the KV store holds, and where their bytes lie.

A part is a block's tokens for one KV head and a group of layers: at most 1 MiB, and the same whatever the TP degree.
Parts go by head, then by layers, so that those of a rank lie side by side; within a part come the keys of its layers,
then their values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from albireo.kv.part import Piece
from albireo.model_spec import ModelSpec
from worker_svc.sharding import ModelShard

MAX_PART_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class KvShape:
    """A block's parts, and which of them are a rank's.

    Attributes:
        layout: names what the bytes of a part mean, with its version.
        num_parts: of a block.
        parts_per_head: each of as many layers.
        layers_per_part: as many in each.
        reads: the parts that the rank holds.
        writes: those of them that no other rank of the group writes.
    """

    layout: str
    num_parts: int
    part_bytes: int
    parts_per_head: int
    layers_per_part: int
    reads: range
    writes: range

    def place(self, part: int) -> tuple[int, slice]:
        """The head of one of the rank's parts, counted from the rank's first, and the layers."""
        head, group = divmod(part - self.reads.start, self.parts_per_head)
        return head, slice(group * self.layers_per_part, (group + 1) * self.layers_per_part)


def cut_blocks(layout: str, num_layers: int, num_heads: int, head_bytes: int, heads: range, writes: bool) -> KvShape:
    """Cuts blocks into as few parts as their limit allows.

    Args:
        num_heads: KV heads of the whole model.
        head_bytes: of one head and one layer: keys and values of a block.
        heads: the rank's.
        writes: whether the rank is the one that stores them, where several hold them.
    """
    divisors = (count for count in range(num_layers, 1, -1) if num_layers % count == 0)
    layers = next((count for count in divisors if count * head_bytes <= MAX_PART_BYTES), 1)
    groups = num_layers // layers
    reads = range(heads.start * groups, heads.stop * groups)
    return KvShape(
        layout=layout,
        num_parts=num_heads * groups,
        part_bytes=layers * head_bytes,
        parts_per_head=groups,
        layers_per_part=layers,
        reads=reads,
        writes=reads if writes else range(0),
    )


def cut_model(layout: str, spec: ModelSpec, shard: ModelShard, head_bytes: int) -> KvShape:
    """Of a model's cache; the first of the ranks that hold the same KV head stores it."""
    ranks_per_head = max(1, shard.tp_size // spec.num_kv_heads)
    writes = shard.rank % ranks_per_head == 0
    return cut_blocks(layout, spec.num_layers, spec.num_kv_heads, head_bytes, shard.kv_heads, writes)


class KvCopies(Protocol):
    """The blocks of a rank's cache in host memory, for transfers. One thread calls, beside the steps.

    Where the cache itself is host memory, `fetch` and `put` do nothing.
    """

    def pieces(self, block: int, part: int) -> Sequence[Piece]:
        """Where a part's bytes lie, in order: after `fetch` of its block, or until `put`."""

    def fetch(self, block: int) -> None:
        """Waits until the block's bytes are in host memory."""

    def put(self, block: int) -> None:
        """Waits until what was written to the block's pieces is in the cache."""


class HostCopies:
    """Of a cache in host memory.

    Args:
        arrays: each [layers, num_blocks, ...], with the rank's KV heads on axis ``head_axis``: keys, then values.
    """

    def __init__(self, shape: KvShape, arrays: Sequence[Piece], head_axis: int) -> None:
        self._shape = shape
        self._arrays = [np.moveaxis(array, head_axis, 2) for array in arrays]

    def pieces(self, block: int, part: int) -> Sequence[Piece]:
        head, layers = self._shape.place(part)
        return [array[layers, block, head] for array in self._arrays]

    def fetch(self, block: int) -> None:
        pass

    def put(self, block: int) -> None:
        pass
