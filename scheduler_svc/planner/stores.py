"""Blocks of sequences that leave their slots go to the KV store: of preempted ones, so that they can come back, and of
ended ones, so that others can begin with them."""

from albireo.kv.chain import anchors_of
from albireo.transfers import TransferKind, TransferResult
from scheduler_svc.planner.block_pool import BlockPool
from scheduler_svc.planner.sequence import Sequence
from scheduler_svc.planner.store_messages import Abort, Commit, Denied, Release, Reserve, Reserved
from scheduler_svc.planner.swap_policy import SwapMode, is_quicker
from scheduler_svc.planner.transfers import Store, Transfers


def store_history(
    transfers: Transfers,
    pool: BlockPool,
    sequence: Sequence,
    num_blocks: int,
    block_size: int,
    tenant: str,
    keeps: bool,
) -> None:
    """``sequence`` leaves its slot, and its first ``num_blocks`` blocks can be found.

    ``keeps``: it is preempted and comes back. Its blocks are not free until they are stored, or it is clear that they
    will not be; the store keeps them until then.
    """
    if transfers.lease is None or not num_blocks:
        return
    hashes = sequence.block_hashes[:num_blocks]
    new = [index for index, block_hash in enumerate(hashes) if not transfers.knows(block_hash)]
    if not _is_worth_while(transfers, keeps, len(new), num_blocks, num_blocks * block_size):
        return
    room = 0 if transfers.is_busy else _room(transfers, keeps)
    transfers.counts.num_blocks_not_stored += max(0, len(new) - room)
    # With those that the store has already: it keeps what is used.
    hashes = hashes[: new[room]] if len(new) > room else hashes
    anchors, blocks = anchors_of(hashes), pool.find(hashes) if keeps else []
    for start in range(0, len(hashes), transfers.max_blocks):
        part = slice(start, start + transfers.max_blocks)
        store = Store(
            request_id=transfers.next_id(),
            lease=transfers.lease,
            hashes=hashes[part],
            blocks=blocks[part],
            after_step=sequence.last_step,
            keeps=keeps,
            keeps_for=sequence if keeps else None,
            num_new=sum(start <= index < start + transfers.max_blocks for index in new),
        )
        pool.fence(store.blocks)
        transfers.asked[store.request_id] = store
        if keeps:
            transfers.kept.setdefault(sequence, []).append(store.request_id)
        reserve = Reserve(store.request_id, store.hashes, anchors[part], tenant, keeps)
        transfers.request(reserve, store.lease)


def place_blocks(transfers: Transfers, pool: BlockPool, store: Store, reply: Reserved | Denied, last_step: int) -> None:
    """The store has room for the blocks, or has not. ``last_step``: the last one planned."""
    if store.is_void:  # and so is its pool
        if isinstance(reply, Reserved):
            transfers.request(Abort(store.request_id), store.lease)
        return
    if isinstance(reply, Denied):
        pool.unfence(store.blocks)
        transfers.counts.num_blocks_not_stored += store.num_new
        if store.keeps_for is not None:
            transfers.kept[store.keeps_for].remove(store.request_id)
        return
    transfers.remember(name for name, state in zip(store.hashes, reply.states, strict=True) if state.is_ready)
    new = [index for index, state in enumerate(reply.states) if state.is_new]
    transfers.forget(store.hashes[index] for index in new)
    if store.blocks:
        pool.unfence([store.blocks[index] for index in set(range(len(store.blocks))).difference(new)])
        blocks = [store.blocks[index] for index in new]
        store.written = list(range(len(new)))
    else:
        found = [pool.find([store.hashes[index]]) for index in new]
        blocks = [block for one in found for block in one]
        store.written = [place for place, one in enumerate(found) if one]
        store.after_step = last_step  # another sequence may have computed them since
        pool.fence(blocks)
    store.num_new, store.blocks = len(new), blocks
    store.hashes = [store.hashes[new[place]] for place in store.written]
    if not blocks:
        _complete(transfers, store, set())
        return
    transfers.move(store, TransferKind.STORE, reply.offsets[store.written], store.after_step)


def finish_store(transfers: Transfers, pool: BlockPool, store: Store, result: TransferResult) -> None:
    """The group has written what it could."""
    pool.unfence(store.blocks)
    succeeded = result.succeeded.tolist()
    if store.lease is transfers.lease:
        transfers.remember(name for name, is_there in zip(store.hashes, succeeded, strict=True) if is_there)
    transfers.counts.num_blocks_out += sum(succeeded)
    transfers.counts.num_bytes_out += result.num_bytes
    transfers.rates.outward.observe(result.num_bytes, result.duration_ns / 1e9)
    _complete(transfers, store, {place for place, is_there in zip(store.written, succeeded, strict=True) if is_there})


def _complete(transfers: Transfers, store: Store, written: set[int]) -> None:
    succeeded = [place in written for place in range(store.num_new)]
    transfers.request(Commit(store.request_id, succeeded, store.keeps), store.lease)
    if store.keeps and store.keeps_for is None:
        transfers.request(Release(store.request_id), store.lease)


def _is_worth_while(transfers: Transfers, keeps: bool, num_new: int, num_blocks: int, num_tokens: int) -> bool:
    """Whether storing ``num_new`` of ``num_blocks`` blocks now, and loading all of them later, is quicker than
    computing them again. What ended sequences leave is stored beside other work: only loading it counts."""
    mode, limits = transfers.limits.mode, transfers.limits
    if keeps and mode is SwapMode.NEVER:
        return False
    transfer_s = transfers.rates.load_s(num_blocks * limits.block_bytes, 0)
    if keeps:
        transfer_s += transfers.rates.store_s(num_new * limits.block_bytes, transfers.num_queued_bytes)
    return is_quicker(mode, transfer_s, transfers.compute_s(num_tokens))


def _room(transfers: Transfers, keeps: bool) -> int:
    """How many more blocks may be on their way to the store. What is kept was found to be worth its time."""
    limits = transfers.limits
    num_bytes = float(limits.max_bytes)
    if not keeps and limits.mode is not SwapMode.ALWAYS:
        num_bytes = min(num_bytes, limits.max_queue_s * transfers.rates.outward.bytes_per_s)
    return max(0, int((num_bytes - transfers.num_queued_bytes) / limits.block_bytes))
