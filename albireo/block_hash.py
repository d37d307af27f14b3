"""Names of KV blocks: a block is named by all the tokens up to its end and by whose they are.

Hashes chain: a block's is SHA-256 over its parent's hash and its own tokens, so that equal names mean equal histories.
The first parent is the tenant's root: one tenant's text never finds another's blocks.
"""

import hashlib

from albireo.arrays import Int32Array, pack_int32

_ROOT = b"albireo kv blocks 1\0"


def root_hash(tenant: str, secret: bytes = b"") -> bytes:
    """The parent of a tenant's first blocks, 32 bytes.

    Args:
        secret: up to 64 bytes, without which nobody can tell the names of a tenant's blocks from its text; empty: none.
    """
    if secret:
        return hashlib.blake2b(_ROOT + tenant.encode(), key=secret, digest_size=32).digest()
    return hashlib.sha256(_ROOT + tenant.encode()).digest()


def chain_hashes(parent: bytes, token_ids: Int32Array, block_size: int) -> list[bytes]:
    """The hashes of the full blocks of ``token_ids``, which follow a block (or root) with the hash ``parent``."""
    data = memoryview(pack_int32(token_ids))
    stride = 4 * block_size
    hashes = []
    for start in range(0, len(data) - stride + 1, stride):
        parent = hashlib.sha256(parent + data[start : start + stride]).digest()
        hashes.append(parent)
    return hashes
