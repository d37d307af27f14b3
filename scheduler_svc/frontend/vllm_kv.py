"""Messages of vllm.grpc.engine: what changes in the prefix cache."""

from collections.abc import Iterable
from itertools import count, repeat
from typing import Any

import numpy as np
from smg_grpc_proto.generated import common_pb2

from albireo.arrays import unpack_int32
from albireo.cache_events import HASH_BYTES, Change, Removed, Reset, Stored, runs


def kv_events(changes: Iterable[Change], first_id: int | None) -> list[Any]:
    """KvCacheEvents in order, with ids from ``first_id`` on; None: they tell a state, and have id 0."""
    ids = repeat(0) if first_id is None else count(first_id)
    return [_event(run, event_id) for run, event_id in zip(runs(changes), ids, strict=False)]


def _event(run: list[Stored] | list[Removed] | Reset, event_id: int) -> Any:
    if isinstance(run, Reset):
        return common_pb2.KvCacheEvent(event_id=event_id, cleared=common_pb2.KvCacheCleared())
    hashes = _short(b"".join(each.block_hash for each in run))
    stored = [each for each in run if isinstance(each, Stored)]
    if not stored:
        return common_pb2.KvCacheEvent(event_id=event_id, removed=common_pb2.KvBlocksRemoved(block_hashes=hashes))
    tokens = [unpack_int32(block.token_ids).tolist() for block in stored]
    blocks = [
        common_pb2.KvBlock(block_hash=short, token_ids=token_ids, block_size=len(token_ids))
        for short, token_ids in zip(hashes, tokens, strict=True)
    ]
    parents = _short(stored[0].parent_hash)
    return common_pb2.KvCacheEvent(
        event_id=event_id,
        stored=common_pb2.KvBlocksStored(blocks=blocks, parent_block_hash=parents[0] if parents else None),
    )


def _short(hashes: bytes) -> list[int]:
    """Each hash's first eight bytes, as a signed number."""
    short: list[int] = np.frombuffer(hashes, dtype="<i8").reshape(-1, HASH_BYTES // 8)[:, 0].tolist()
    return short
