"""Blocks that move between a group's KV cache and the KV store, as arrays, and their form on the wire (plan.proto)."""

from enum import IntEnum
from typing import NamedTuple

import numpy as np

from albireo.arrays import BoolArray, Int32Array, UInt64Array, pack_int32, pack_uint64, unpack_int32, unpack_uint64
from albireo.v1 import plan_pb2

HASH_BYTES = 32


class TransferKind(IntEnum):
    """STORE: from the cache to the store's arena. LOAD: the other way."""

    STORE = plan_pb2.Transfer.KIND_STORE
    LOAD = plan_pb2.Transfer.KIND_LOAD


class KvLease(NamedTuple):
    """A planner's session with the KV store, as the store welcomed it.

    Attributes:
        arena_id: 16 bytes; places in another arena mean nothing.
    """

    arena_id: bytes
    arena_bytes: int
    lease: int


class Transfer(NamedTuple):
    """Blocks that move once a step has completed.

    Attributes:
        transfer_id: growing.
        blocks: [num_blocks], of the cache; none twice.
        hashes: [num_blocks], 32 bytes each.
        offsets: [num_blocks, parts of a block], where each part begins in the arena.
        after_step: of the plan's epoch; one before its first: at once.
    """

    transfer_id: int
    kind: TransferKind
    blocks: Int32Array
    hashes: tuple[bytes, ...]
    offsets: UInt64Array
    after_step: int
    lease: KvLease


class TransferResult(NamedTuple):
    """What became of a transfer.

    Attributes:
        succeeded: [num_blocks], whether all parts of a block were copied, and verified.
        num_bytes: copied.
        duration_ns: of the slowest rank.
    """

    transfer_id: int
    succeeded: BoolArray
    num_bytes: int
    duration_ns: int


def encode_transfer(transfer: Transfer) -> plan_pb2.Transfer:
    return plan_pb2.Transfer(
        transfer_id=transfer.transfer_id,
        kind=plan_pb2.Transfer.Kind.Name(transfer.kind),
        blocks=pack_int32(transfer.blocks),
        hashes=b"".join(transfer.hashes),
        offsets=pack_uint64(transfer.offsets),
        after_step=transfer.after_step,
        lease=plan_pb2.KvLease(**transfer.lease._asdict()),
    )


def decode_transfer(message: plan_pb2.Transfer) -> Transfer:
    """Raises ValueError when the message holds no transfer."""
    lease = message.lease
    blocks, hashes = unpack_int32(message.blocks), message.hashes
    if not len(blocks) or len(hashes) != HASH_BYTES * len(blocks):
        raise ValueError(f"transfer {message.transfer_id}: {len(hashes)} bytes of hashes for {len(blocks)} blocks")
    return Transfer(
        transfer_id=message.transfer_id,
        kind=TransferKind(message.kind),
        blocks=blocks,
        hashes=tuple(hashes[start : start + HASH_BYTES] for start in range(0, len(hashes), HASH_BYTES)),
        offsets=unpack_uint64(message.offsets).reshape(len(blocks), -1),
        after_step=message.after_step,
        lease=KvLease(lease.arena_id, lease.arena_bytes, lease.lease),
    )


def encode_transfer_result(result: TransferResult) -> plan_pb2.TransferResult:
    return plan_pb2.TransferResult(
        transfer_id=result.transfer_id,
        succeeded=result.succeeded.tobytes(),
        num_bytes=result.num_bytes,
        duration_ns=result.duration_ns,
    )


def decode_transfer_result(message: plan_pb2.TransferResult) -> TransferResult:
    succeeded = np.frombuffer(message.succeeded, dtype=np.uint8).astype(np.bool_)
    return TransferResult(message.transfer_id, succeeded, message.num_bytes, message.duration_ns)
