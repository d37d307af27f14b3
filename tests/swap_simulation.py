"""The simulation with a KV store: modelled, with delays, losses, refusals and damage at the test's hands."""

import random
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from albireo.arrays import UInt64Array
from albireo.plan import StepPlan, decode_plan, decode_result, encode_plan, encode_result, transfers_result
from albireo.transfers import KvLease, Transfer, TransferKind, TransferResult
from scheduler_svc.planner.answers import apply_reply, apply_result, lose_store
from scheduler_svc.planner.state import PlannerState
from scheduler_svc.planner.store_messages import (
    Abort,
    Acquire,
    Acquired,
    BlockState,
    Commit,
    Denied,
    Release,
    Reply,
    Request,
    Reserve,
    Reserved,
)
from scheduler_svc.planner.swap_policy import SwapMode
from scheduler_svc.planner.transfers import TransferLimits, Transfers
from simulation import FenceChecker, Simulation
from worker_svc.stub.engine import StubEngine

MAX_BLOCKS = 3  # of one request


@dataclass(eq=False)
class StoredBlock:
    offset: int
    is_ready: bool = False
    num_pins: int = 0
    name: bytes = b""
    content: list[UInt64Array] = field(default_factory=list)  # by rank


class ModelStore:
    """Does what the planner's requests say, in their order, and checks that they make sense.

    ``p_trouble``: how likely it refuses a request, offers less than it has, fails to write, or damages what is read.
    """

    def __init__(self, rng: random.Random, capacity: int, p_trouble: float) -> None:
        self._rng, self._capacity, self._p_trouble = rng, capacity, p_trouble
        self.num_losses = 0
        self.forget()

    def forget(self) -> None:
        """A new one takes its place."""
        self.num_losses += 1
        self.lease = KvLease(b"%16d" % self.num_losses, self._capacity, self.num_losses)
        self.blocks: dict[bytes, StoredBlock] = {}
        self.places: dict[int, StoredBlock] = {}
        self._held: dict[int, list[StoredBlock]] = {}
        self._new: dict[int, tuple[list[bytes], bool]] = {}
        self._free = list(range(self._capacity))

    def end_session(self) -> None:
        """What it held is given back; so is what it had reserved, for its ranks have let go."""
        for request_id in list(self._new):
            self.take(Abort(request_id))
        for request_id in list(self._held):
            self.take(Release(request_id))
        self.lease = self.lease._replace(lease=self.lease.lease + 1000)

    @property
    def is_at_rest(self) -> bool:
        return not self._held and not self._new and all(each.is_ready for each in self.blocks.values())

    def take(self, request: Request) -> Reply | None:
        match request:
            case Reserve():
                return self._reserve(request)
            case Acquire():
                return self._acquire(request)
            case Commit():
                hashes, keeps = self._new.pop(request.request_id)
                for name, succeeded in zip(hashes, request.succeeded, strict=True):
                    self._settle(name, succeeded, request.request_id if keeps else None)
                if not keeps:
                    self._unpin(request.request_id)
            case Abort():
                for name in self._new.pop(request.request_id)[0]:
                    self._settle(name, succeeded=False, keeps_for=None)
                self._unpin(request.request_id)
            case Release():
                assert request.request_id not in self._new, "released before it was complete"
                self._unpin(request.request_id)
        return None

    def _reserve(self, request: Reserve) -> Reply:
        new = [name for name in request.hashes if name not in self.blocks]
        if self._has_trouble() or not self._make_room(len(new), set(request.hashes)):
            return Denied(request.request_id)
        states = []
        for name in request.hashes:
            block = self.blocks.get(name)
            states.append(BlockState(is_new=block is None, is_ready=block is not None and block.is_ready))
            if block is not None and request.keeps:
                self._pin(request.request_id, block)
        offsets = []
        for name in new:
            block = self.blocks[name] = StoredBlock(self._free.pop())
            self.places[block.offset] = block
            offsets.append([block.offset])
        self._new[request.request_id] = new, request.keeps
        self._held.setdefault(request.request_id, [])
        return Reserved(request.request_id, states, np.array(offsets, dtype=np.uint64).reshape(-1, 1))

    def _acquire(self, request: Acquire) -> Reply:
        if self._has_trouble():
            return Denied(request.request_id)
        offsets = []
        for name in request.hashes:
            block = self.blocks.get(name)
            if block is None or not block.is_ready or self._has_trouble():
                break
            self._pin(request.request_id, block)
            offsets.append([block.offset])
        return Acquired(request.request_id, np.array(offsets, dtype=np.uint64).reshape(-1, 1))

    def write(self, transfer: Transfer, index: int, content: list[UInt64Array]) -> bool:
        """Ranks write a block of ``transfer``."""
        if transfer.lease.arena_id != self.lease.arena_id:
            return False
        block = self.places[int(transfer.offsets[index, 0])]
        assert not block.is_ready, "a block is written where another one is"
        assert self.blocks[transfer.hashes[index]] is block
        block.name, block.content = transfer.hashes[index], content
        return not self._has_trouble()

    def read(self, transfer: Transfer, index: int) -> list[UInt64Array] | None:
        """What ranks read of a block of ``transfer``; None when it does not pass their checks."""
        if transfer.lease != self.lease or self._has_trouble():
            return None
        block = self.places[int(transfer.offsets[index, 0])]
        assert block.num_pins, "a block is read that nobody holds"
        return block.content if block.name == transfer.hashes[index] else None

    def _has_trouble(self) -> bool:
        return self._rng.random() < self._p_trouble

    def _pin(self, request_id: int, block: StoredBlock) -> None:
        block.num_pins += 1
        self._held.setdefault(request_id, []).append(block)

    def _unpin(self, request_id: int) -> None:
        for block in self._held.pop(request_id):
            block.num_pins -= 1

    def _settle(self, name: bytes, succeeded: bool, keeps_for: int | None) -> None:
        block = self.blocks[name]
        block.is_ready = succeeded
        if not succeeded:
            self._drop(name)
        elif keeps_for is not None:
            self._pin(keeps_for, block)

    def _make_room(self, num: int, wanted: set[bytes]) -> bool:
        idle = [name for name, block in self.blocks.items() if block.is_ready and not block.num_pins]
        idle = [name for name in idle if name not in wanted]
        if num > len(self._free) + len(idle):
            return False
        for name in self._rng.sample(idle, max(0, num - len(self._free))):
            self._drop(name)
        return True

    def _drop(self, name: bytes) -> None:
        block = self.blocks.pop(name)
        del self.places[block.offset]
        self._free.append(block.offset)


class TransferChecker(FenceChecker):
    """Watches transfers as well: until its result is in, nobody writes a block that is stored, and nobody has one that
    is loaded."""

    def __init__(self, block_size: int) -> None:
        super().__init__(block_size)
        self.transfers: deque[Transfer] = deque()
        self._moving: dict[int, set[int]] = {}

    def see_plan(self, plan: StepPlan) -> None:
        self.see_transfers(plan, plan.finished_slots.tolist())
        super().see_plan(plan)

    def see_transfers(self, plan: StepPlan, finished_slots: list[int]) -> None:
        """``finished_slots``: which the group may not have been told of yet."""
        for transfer in plan.transfers:
            blocks = set(transfer.blocks.tolist())
            assert len(blocks) == len(transfer.blocks)
            if transfer.kind is TransferKind.LOAD:
                tables = [table for slot, table in self._tables.items() if slot not in finished_slots]
                owned = {block for table in tables for block in table}
                busy = {block for _, touched in self._touched for block in touched}
                busy |= {block for moving in self._moving.values() for block in moving}
                assert not blocks & (owned | busy), "a load writes blocks that are in use"
                for block in blocks:
                    self._content.pop(block, None)
            self._moving[transfer.transfer_id] = blocks
            self.transfers.append(transfer)

    def see_transfer_result(self, result: TransferResult) -> None:
        del self._moving[result.transfer_id]

    def _hand_out(self, slot: int, blocks: list[int], busy: set[int]) -> None:
        moving = {block for moving in self._moving.values() for block in moving}
        assert not moving & set(blocks), f"blocks {moving & set(blocks)} are handed out while they move"
        super()._hand_out(slot, blocks, busy)


class SwapSimulation(Simulation):
    """A planner with a group of stub ranks and a store of ``capacity`` blocks.

    Attributes:
        store_is_there: else nothing is asked of it.
    """

    checker: TransferChecker

    def __init__(
        self,
        *args: int,
        capacity: int = 200,
        mode: SwapMode = SwapMode.ALWAYS,
        p_trouble: float = 0.0,
        seed: int = 0,
        **limits: int,
    ) -> None:
        self._mode = mode
        self._rng = random.Random(seed)
        self.store = ModelStore(self._rng, capacity, p_trouble)
        self.store_is_there = True
        self._replies: list[Reply] = []
        self._transfer_results: deque[bytes] = deque()
        self._executed_step = -1
        self.num_blocks_in = self.num_blocks_out = 0
        super().__init__(*args, **limits)

    @property
    def transfers(self) -> Transfers:
        assert self.state.transfers is not None
        return self.state.transfers

    def make_state(self) -> PlannerState:
        state = super().make_state()
        state.transfers = Transfers(TransferLimits(self._mode, block_bytes=1, max_bytes=64), self.rates)
        if self.store_is_there:
            state.transfers.meet_store(self.store.lease, MAX_BLOCKS)
        return state

    def make_checker(self) -> FenceChecker:
        return TransferChecker(self.limits.block_size)

    # What breaks.

    def lose_store(self) -> None:
        """It is gone, with all that it was asked; a new one comes when told."""
        self.store.forget()
        self.store_is_there = False
        self._replies.clear()
        lose_store(self.state, self.transfers)
        for request_id in list(self.transfers.asked):
            apply_reply(self.state, self.transfers, Denied(request_id))

    def regain_store(self) -> None:
        if not self.store_is_there:
            self.store_is_there = True
            self.transfers.meet_store(self.store.lease, MAX_BLOCKS)

    def lose_group(self) -> None:
        super().lose_group()
        self.transfers.begin_epoch()

    def lose_planner(self) -> None:
        self._count()
        self._replies.clear()
        self._send_requests()
        self._run_zombies()
        self.store.end_session()
        self._replies.clear()
        super().lose_planner()

    def _restart_ranks(self) -> None:
        self._send_requests()
        self._run_zombies()
        self._transfer_results.clear()
        super()._restart_ranks()

    def _run_zombies(self) -> None:
        """Ranks of a lost group go on for a while."""
        for transfer in self.checker.transfers:
            self._copy(transfer, range(self._rng.randrange(len(transfer.blocks) + 1)))
        self.checker.transfers.clear()

    # What time brings.

    def plan(self) -> bool:
        return super().plan() or self._send_transfers()

    def _send_transfers(self) -> bool:
        """Those that no plan has taken along go alone."""
        outgoing = self.transfers.take_outgoing()
        if outgoing:
            plan = StepPlan(self.epoch, self.state.next_step_id, None, transfers=outgoing, only_transfers=True)
            self.checker.see_transfers(decode_plan(encode_plan(plan)), self.state.freed_slots)
        return bool(outgoing)

    def run_device(self) -> bool:
        step_id = self.planned[0][0] if self.planned else -1
        has_run = super().run_device()
        self._executed_step = max(self._executed_step, step_id)
        return has_run

    def commit(self) -> bool:
        return super().commit() or self.answer() or self.run_transfer() or self.commit_transfer()

    def answer(self) -> bool:
        """One of the store's answers comes in, not always the oldest."""
        self._send_requests()
        if not self._replies:
            return False
        reply = self._replies.pop(self._rng.randrange(len(self._replies)))
        apply_reply(self.state, self.transfers, reply)
        return True

    def _send_requests(self) -> None:
        for request in self.transfers.take_requests():
            reply = self.store.take(request)
            if reply is not None:
                self._replies.append(reply)

    def run_transfer(self) -> bool:
        """All ranks run the oldest transfer, if it may run."""
        if not self.checker.transfers or self.checker.transfers[0].after_step > self._executed_step:
            return False
        transfer = self.checker.transfers.popleft()
        succeeded = self._copy(transfer, range(len(transfer.blocks)))
        result = TransferResult(transfer.transfer_id, np.array(succeeded), len(succeeded), 1000)
        self._transfer_results.append(encode_result(transfers_result(self.epoch, (result,))))
        return True

    def commit_transfer(self) -> bool:
        """The oldest result of a transfer comes in."""
        if not self._transfer_results:
            return False
        decoded = decode_result(self._transfer_results.popleft())
        assert decoded.only_transfers
        for result in decoded.transfers:
            self.checker.see_transfer_result(result)
            apply_result(self.state, result)
        return True

    def _copy(self, transfer: Transfer, indices: range) -> list[bool]:
        copy = self._copy_out if transfer.kind is TransferKind.STORE else self._copy_in
        return [copy(transfer, index) for index in indices]

    def _copy_out(self, transfer: Transfer, index: int) -> bool:
        caches = [_cache(engine) for engine in self.engines]
        return self.store.write(transfer, index, [cache[transfer.blocks[index]].copy() for cache in caches])

    def _copy_in(self, transfer: Transfer, index: int) -> bool:
        content = self.store.read(transfer, index)
        for rank, engine in enumerate(self.engines):
            damaged = np.uint64(self._rng.getrandbits(63))
            _cache(engine)[transfer.blocks[index]] = damaged if content is None else content[rank]
        return content is not None

    # What must hold.

    def check_pool(self) -> None:
        super().check_pool()
        fenced = sum(len(job.blocks) for job in self.transfers.moving.values())
        fenced += sum(len(job.blocks) for job in self.transfers.asked.values() if not job.is_void)
        assert sum(self.state.pool._num_transfers) == fenced, "fences that nobody takes down"

    def finish(self) -> None:
        super().finish()
        assert not self.transfers.asked
        assert not self.transfers.moving
        assert not self.transfers.loading
        assert not self.transfers.kept
        self._send_requests()
        assert self.store.is_at_rest, "the store holds what nobody will release"
        self._count()

    def _count(self) -> None:
        self.num_blocks_in += self.transfers.counts.num_blocks_in
        self.num_blocks_out += self.transfers.counts.num_blocks_out


def _cache(engine: StubEngine) -> UInt64Array:
    """[num_blocks, block_size, heads of this rank]"""
    return engine._cache
