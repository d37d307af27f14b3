"""The planner's link to the KV store: carries requests there and answers back, and never lets the step loop wait."""

import asyncio
import time
from collections.abc import Callable

import structlog

from albireo.errors import InvalidRequest, Overloaded, StoreUnavailable
from albireo.kv.fingerprint import Namespace
from albireo.kv.link import KvLink
from albireo.kv.session import KvSession
from albireo.plan import StepPlan
from albireo.security import Security
from albireo.transfers import KvLease
from albireo.v1 import kvstore_pb2
from scheduler_svc.planner.answers import apply_reply, lose_store
from scheduler_svc.planner.group import PlanStream
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
from scheduler_svc.planner.transfers import Transfers

# Blocks are fenced, and a sequence waits, while the store thinks.
_ANSWER_WITHIN_S = 0.5
_RESULT_WITHIN_S = 30.0
_LOOK_EVERY_S = 1.0

log = structlog.get_logger()


class StoreLink:
    """Changes ``state`` between turns of the step loop; answers in time stand for the store where it does not.

    Args:
        name: the same after a restart: then the store ends the session that was before.
        state: with transfers.
        wake: the step loop has something to do.
    """

    def __init__(
        self,
        address: str,
        name: str,
        namespace: Namespace,
        state: PlannerState,
        transfers: Transfers,
        wake: Callable[[], None],
        security: Security,
    ) -> None:
        self._link = KvLink(address, name, namespace, self._on_change, security)
        self._state, self._transfers, self._wake = state, transfers, wake
        self._holds: dict[int, int] = {}  # by request, the session's names of what it holds for us
        self._asking = asyncio.TaskGroup()

    async def run(self) -> None:
        """Keeps a session until it is cancelled, or the store does not want any."""
        async with self._asking:
            try:
                await self._link.run()
            except InvalidRequest as error:
                log.error("the KV store does not take this group's blocks", error=str(error))

    async def find_lost_transfers(self, fail: Callable[[str], None]) -> None:
        """Calls ``fail`` with the reason when the group says nothing of a transfer, however long it had."""
        oldest, since = None, 0.0
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            now, now_oldest = time.monotonic(), next(iter(self._transfers.moving), None)
            if now_oldest != oldest:
                oldest, since = now_oldest, now
            elif oldest is not None and now - since > _RESULT_WITHIN_S:
                fail(f"transfer {oldest} has no result after {_RESULT_WITHIN_S:g} s")

    def send(self, stream: PlanStream | None) -> None:
        """Sends what a turn of the step loop has left: transfers that no plan has taken along, and requests."""
        if stream is not None and self._transfers.outgoing:
            outgoing = self._transfers.take_outgoing()
            step_id = self._state.next_step_id
            stream.send(StepPlan(self._state.epoch, step_id, None, transfers=outgoing, only_transfers=True))
        for request in self._transfers.take_requests():
            self._send(request)

    def _on_change(self, session: KvSession | None) -> None:
        self._holds.clear()
        if session is None:
            lose_store(self._state, self._transfers)
        else:
            lease = KvLease(session.lease.arena_id, session.lease.arena_bytes, session.lease.lease)
            self._transfers.meet_store(lease, session.max_blocks)
            log.info("the KV store is there", arena_gib=round(lease.arena_bytes / 2**30, 3))
        self._wake()

    def _send(self, request: Request) -> None:
        session = self._link.session
        assert session is not None  # requests go with the session
        match request:
            case Reserve() | Acquire():
                self._asking.create_task(self._ask(session, request))
            case Commit(request_id, succeeded, keeps):
                hold = self._holds[request_id] if keeps else self._holds.pop(request_id)
                session.commit(hold, succeeded)
            case Abort(request_id):
                session.abort(self._holds.pop(request_id))
            case Release(request_id):
                session.release(self._holds.pop(request_id))

    async def _ask(self, session: KvSession, request: Reserve | Acquire) -> None:
        try:
            if isinstance(request, Reserve):
                reply: Reply = await self._reserve(session, request)
            else:
                reply = await self._acquire(session, request)
        except (StoreUnavailable, Overloaded, InvalidRequest, TimeoutError) as error:
            log.debug("the KV store denies a request", error=str(error))
            reply = Denied(request.request_id)
        apply_reply(self._state, self._transfers, reply)
        self._wake()

    async def _reserve(self, session: KvSession, request: Reserve) -> Reserved:
        start = time.monotonic()
        async with asyncio.timeout(_ANSWER_WITHIN_S):
            reserved = await session.reserve(request.hashes, request.anchors, request.tenant, keeps=request.keeps)
        self._transfers.rates.observe_rtt(time.monotonic() - start)
        self._holds[request.request_id] = reserved.hold
        return Reserved(request.request_id, [_block_state(each) for each in reserved.states], reserved.offsets)

    async def _acquire(self, session: KvSession, request: Acquire) -> Acquired:
        async with asyncio.timeout(_ANSWER_WITHIN_S + request.wait_s):
            acquired = await session.acquire(
                request.hashes, request.anchors, request.tenant, priority=request.priority, wait_s=request.wait_s
            )
        if acquired.num_blocks:
            self._holds[request.request_id] = acquired.hold
        return Acquired(request.request_id, acquired.offsets)


def _block_state(state: int) -> BlockState:
    return BlockState(
        is_new=state == kvstore_pb2.KV_BLOCK_STATE_NEW, is_ready=state == kvstore_pb2.KV_BLOCK_STATE_READY
    )
