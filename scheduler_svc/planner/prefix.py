"""The prefix cache: sequences of a tenant that begin alike share the full blocks of what they have in common.

Prompt blocks can be found from the plan after the one that computes them: steps run in order. What a sequence has
written itself is published when it leaves its slot, so that a decode step costs nothing.
"""

from albireo.block_hash import chain_hashes
from scheduler_svc.planner.block_pool import BlockPool
from scheduler_svc.planner.sequence import Sequence

# Hashes of prompt blocks that are planned to be computed but are not yet, by the sequence that does it.
ComingBlocks = dict[bytes, Sequence]


def find_prefix(pool: BlockPool, sequence: Sequence, block_size: int) -> list[int]:
    """Blocks that hold the beginning of ``sequence``, as far as it may take them, whatever their state."""
    _hash_up_to(sequence, len(sequence.token_ids), block_size)
    return pool.find(sequence.block_hashes[: sequence.num_shareable_tokens // block_size])


def is_coming(coming: ComingBlocks, sequence: Sequence, num_found: int, block_size: int) -> bool:
    """Whether the block after the ``num_found`` that were found is about to be computed for another sequence: waiting
    for it takes a step or a few, and saves computing it twice."""
    num_shareable = sequence.num_shareable_tokens // block_size
    return bool(coming) and num_found < num_shareable and sequence.block_hashes[num_found] in coming


def announce(coming: ComingBlocks, sequence: Sequence, num_found: int) -> None:
    """``sequence`` starts: it will compute the blocks after those that were found."""
    for block_hash in sequence.block_hashes[num_found:]:
        coming.setdefault(block_hash, sequence)


def publish_chunk(
    pool: BlockPool, coming: ComingBlocks, sequence: Sequence, blocks: list[int], start: int, block_size: int
) -> None:
    """A plan has been made that completes ``blocks`` of a prompt, from its block ``start`` on."""
    hashes = sequence.block_hashes[start : start + len(blocks)]
    _publish(pool, sequence, blocks, start, block_size)
    for block_hash in hashes:
        if coming.get(block_hash) is sequence:
            del coming[block_hash]


def forget_coming(coming: ComingBlocks, sequence: Sequence) -> None:
    """``sequence`` leaves its slot: what it has not computed, it does not."""
    if coming:
        for block_hash in sequence.block_hashes:
            if coming.get(block_hash) is sequence:
                del coming[block_hash]


def publish_history(pool: BlockPool, sequence: Sequence, blocks: list[int], num_tokens: int, block_size: int) -> int:
    """``sequence`` leaves its slot with KV of ``num_tokens`` committed tokens in ``blocks``. Steps in flight may write
    past them, never over them. Returns how many of its blocks can be found."""
    _hash_up_to(sequence, num_tokens, block_size)
    num_full = min(num_tokens // block_size, len(blocks))
    _publish(pool, sequence, blocks[:num_full], 0, block_size)
    return num_full


def _publish(pool: BlockPool, sequence: Sequence, blocks: list[int], start: int, block_size: int) -> None:
    """``blocks`` hold the sequence's tokens from its block ``start`` on."""
    stop = start + len(blocks)
    parent_hash = sequence.block_hashes[start - 1] if start else b""
    token_ids = sequence.token_ids[start * block_size : stop * block_size]
    share = pool.share_of(sequence.root, sequence.cache_limit) if sequence.cache_limit else None
    pool.publish(blocks, sequence.block_hashes[start:stop], parent_hash, token_ids, share)


def _hash_up_to(sequence: Sequence, num_tokens: int, block_size: int) -> None:
    """Works out the hashes of the first ``num_tokens`` tokens' full blocks, where they are not known yet."""
    num_known = len(sequence.block_hashes)
    if num_tokens // block_size > num_known:
        parent = sequence.block_hashes[-1] if num_known else sequence.root
        token_ids = sequence.token_ids[num_known * block_size : num_tokens]
        sequence.block_hashes += chain_hashes(parent, token_ids, block_size)
