"""Blocks come from the KV store for a sequence that could start: it waits for them, without a slot, as it waits for
what another sequence is about to compute."""

from albireo.kv.chain import anchors_of
from albireo.transfers import TransferKind, TransferResult
from scheduler_svc.planner.prefix import forget_coming, publish_chunk
from scheduler_svc.planner.room import num_missing_blocks, num_needed_blocks
from scheduler_svc.planner.sequence import Sequence
from scheduler_svc.planner.state import PlannerState
from scheduler_svc.planner.store_messages import Acquire, Acquired, Denied, Release
from scheduler_svc.planner.swap_policy import is_quicker, wait_s
from scheduler_svc.planner.transfers import Load, Transfers

OUTCOMES = {
    "loaded": "of which all came",
    "damaged": "of which something was lost on the way",
    "missed": "of which the store had nothing",
    "denied": "that the store refused, or did not answer in time",
    "no_room": "for which no blocks were free",
    "slow": "that would have taken longer than computing",
}


def begin_load(state: PlannerState, sequence: Sequence, found: list[int]) -> bool:
    """Asks the store for the blocks of ``sequence`` after those that the pool has, where that may be quicker than
    computing them. Returns whether it waits for them."""
    transfers, block_size, num_found = state.transfers, state.limits.block_size, len(found)
    if transfers is None or transfers.lease is None:
        return False
    hashes = sequence.block_hashes[num_found : sequence.num_shareable_tokens // block_size]
    hashes = hashes[: transfers.max_blocks]
    if not hashes:
        return False
    if sequence in transfers.loading:
        return True
    if transfers.is_busy or not transfers.may_try(sequence, num_found):
        return False
    if not _is_worth_while(transfers, len(hashes), block_size):
        return False
    load = Load(
        request_id=transfers.next_id(),
        lease=transfers.lease,
        sequence=sequence,
        start=num_found,
        num_asked=len(hashes),
        num_needed=num_needed_blocks(state, sequence, found),
        hashes=hashes,
    )
    transfers.asked[load.request_id] = transfers.loading[sequence] = load
    for block_hash in hashes:
        state.coming.setdefault(block_hash, sequence)
    limits = transfers.limits
    acquire = Acquire(
        request_id=load.request_id,
        hashes=hashes,
        anchors=anchors_of(sequence.block_hashes[: num_found + len(hashes)])[num_found:],
        tenant=state.tenants.name_of(sequence.tenant),
        priority=-sequence.place.negative_priority,
        wait_s=wait_s(
            limits.mode,
            _load_s(transfers, len(hashes)),
            transfers.compute_s(len(hashes) * block_size),
            limits.max_wait_s,
        ),
    )
    transfers.request(acquire, load.lease)
    return True


def fetch_blocks(state: PlannerState, transfers: Transfers, load: Load, reply: Acquired | Denied) -> None:
    """The store says what of it can be read."""
    if isinstance(reply, Denied):
        _end(state, transfers, load, 0, "denied")
        return
    num_ready = len(reply.offsets)
    if load.lease is transfers.lease:
        transfers.remember(load.hashes[:num_ready])
        transfers.forget(load.hashes[num_ready:])
    num, outcome = (0, "void") if load.is_void else _num_to_load(state, transfers, load, num_ready)
    if not num:
        if num_ready:
            transfers.request(Release(load.request_id), load.lease)
        _end(state, transfers, load, 0, outcome)
        return
    load.hashes = load.hashes[:num]
    load.blocks = state.pool.allocate(num)
    state.pool.fence(load.blocks)
    state.pool.give_back(load.blocks, last_step=-1)
    transfers.move(load, TransferKind.LOAD, reply.offsets[:num], after_step=-1)


def finish_load(state: PlannerState, transfers: Transfers, load: Load, result: TransferResult) -> None:
    """The group has read what it could; what can be trusted of it is published, for whoever comes next as well."""
    succeeded = result.succeeded.tolist()
    num_good = succeeded.index(False) if False in succeeded else len(succeeded)
    blocks = load.blocks[:num_good]
    publish_chunk(state.pool, state.coming, load.sequence, blocks, load.start, state.limits.block_size)
    state.pool.unfence(load.blocks)
    if load.lease is transfers.lease:
        transfers.forget(load.hashes[num_good:])
    transfers.counts.num_blocks_in += num_good
    transfers.counts.num_bytes_in += result.num_bytes
    transfers.rates.inward.observe(result.num_bytes, result.duration_ns / 1e9)
    transfers.request(Release(load.request_id), load.lease)
    _end(state, transfers, load, num_good, "loaded" if num_good == len(succeeded) else "damaged")


def _end(state: PlannerState, transfers: Transfers, load: Load, num_blocks: int, outcome: str) -> None:
    """``num_blocks`` have come; the sequence goes on with them."""
    if load.is_void:
        return
    transfers.counts.loads[outcome] += 1
    if outcome != "no_room":  # then it does not start either, and asks again when it could
        transfers.tried(load.sequence, load.start, num_blocks, has_more=num_blocks == load.num_asked)
    del transfers.loading[load.sequence]
    forget_coming(state.coming, load.sequence)


def _num_to_load(state: PlannerState, transfers: Transfers, load: Load, num_ready: int) -> tuple[int, str]:
    """Of the blocks that are ready; and what to call it where that is none. None is preempted for a load: there is room
    only where the sequence could start."""
    if not num_ready:
        return 0, "missed"
    found = state.pool.find(load.sequence.block_hashes[: load.start])
    num = min(num_ready, (transfers.limits.max_bytes - transfers.num_queued_bytes) // transfers.limits.block_bytes)
    if len(found) < load.start or num_missing_blocks(state, load.sequence, found) > 0 or num <= 0:
        return 0, "no_room"
    return (num, "") if _is_worth_while(transfers, num, state.limits.block_size) else (0, "slow")


def _is_worth_while(transfers: Transfers, num_blocks: int, block_size: int) -> bool:
    return is_quicker(
        transfers.limits.mode, _load_s(transfers, num_blocks), transfers.compute_s(num_blocks * block_size)
    )


def _load_s(transfers: Transfers, num_blocks: int) -> float:
    return transfers.rates.load_s(num_blocks * transfers.limits.block_bytes, transfers.num_queued_bytes)
