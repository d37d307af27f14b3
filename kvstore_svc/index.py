"""The index: which blocks are in the arena, and who holds them.

Pure: no I/O, no clock; ``now`` is in seconds on any clock that the caller keeps to.
"""

import enum
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from albireo.errors import InvalidRequest, Overloaded
from albireo.kv.fingerprint import Namespace
from kvstore_svc.blocks import Block, Hold, Session, Shelf
from kvstore_svc.frames import Frames
from kvstore_svc.room import Room, ready_prefix

_RETRY_AFTER_S = 0.1
_MAX_NAMES = 1024


class BlockState(enum.IntEnum):
    """KvBlockState of the wire."""

    NEW = 0
    READY = 1
    PENDING = 2


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a Reserve comes to: a state for each hash, and the new blocks in order."""

    states: list[BlockState]
    blocks: list[Block]


class Index:
    """All blocks of the store, and the sessions that use them.

    Args:
        arena_bytes, segment_bytes: the arena is used in whole segments.
        tenant_bytes: what one tenant may have; 0: all.
        ttl_s: of blocks that come without one; 0: for ever.

    Attributes:
        num_hits: blocks pinned by `acquire` since the start.
    """

    def __init__(self, arena_bytes: int, segment_bytes: int, tenant_bytes: int = 0, ttl_s: float = 0.0) -> None:
        self.frames = Frames(arena_bytes, segment_bytes)
        self.room = Room(self.frames, tenant_bytes, ttl_s)
        self.sessions: dict[int, Session] = {}  # by lease
        self.num_hits = 0
        self._shelves: dict[bytes, Shelf] = {}  # by fingerprint
        self._quarantine: dict[int, list[int]] = {}  # frames by lease
        self._epochs: OrderedDict[str, int] = OrderedDict()

    # Sessions.

    def open_session(self, lease: int, name: str, epoch: int, namespace: Namespace, credit_bytes: int) -> Session:
        """Begins a lease.

        Raises:
            InvalidRequest: the epoch is not newer than the last of that name, or the namespace does not fit.
        """
        last = self._epochs.get(name, -1)
        if epoch <= last:
            raise InvalidRequest(f"epoch {epoch} of {name!r}: more than {last}")
        if namespace.frame_bytes > self.frames.segment_bytes:
            raise InvalidRequest(
                f"num_parts {namespace.num_parts}, part_bytes {namespace.part_bytes}: blocks of "
                f"{namespace.frame_bytes} bytes with headers; the store's segments have {self.frames.segment_bytes}"
            )
        shelf = self._shelf(namespace)
        self._epochs[name] = epoch
        self._epochs.move_to_end(name)
        if len(self._epochs) > _MAX_NAMES:
            self._epochs.popitem(last=False)
        shelf.num_sessions += 1
        session = self.sessions[lease] = Session(lease, name, epoch, shelf, credit_bytes)
        return session

    def close_session(self, session: Session) -> None:
        """Ends the lease: pins fall; what was being written stays out of use until `end_quarantine`."""
        for hold_id in list(session.holds):
            self._drop_hold(session, hold_id, may_write=True)
        session.shelf.num_sessions -= 1
        del self.sessions[session.lease]
        if session.may_write:
            self._quarantine[session.lease] = session.may_write

    def end_quarantine(self, lease: int) -> None:
        """No rank of that lease writes any longer."""
        for frame in self._quarantine.pop(lease, ()):
            self.frames.give_back(frame)

    # Requests of sessions.

    def lookup(self, session: Session, hashes: Sequence[bytes], now: float) -> tuple[int, int]:
        """How many blocks of a prefix are ready, and how many after those are there or coming."""
        num_ready = sum(1 for _ in ready_prefix(session.shelf, hashes, now))
        num_pending = 0
        for each in hashes[num_ready:]:
            block = session.shelf.blocks.get(each)
            if block is None or (block.is_ready and block.expires_at <= now):
                break
            num_pending += 1
        return num_ready, num_pending

    def acquire(self, session: Session, hold_id: int, hashes: Sequence[bytes], now: float) -> list[Block]:
        """Pins the longest prefix that is ready; called again with the same arguments, what came after it as well.

        Raises:
            Overloaded: the session would hold more than its credit.
            InvalidRequest: the id is in use for something else.
        """
        hold = session.holds.get(hold_id) or Hold()
        if hold.is_open or hold.keeps:
            raise InvalidRequest(f"id {hold_id}: in use for a reservation")
        fresh = list(ready_prefix(session.shelf, hashes[len(hold.blocks) :], now))
        self._check_credit(session, len(fresh))
        for block in fresh:
            self._pin(session, block)
            block.num_hits += 1
        self.num_hits += len(fresh)
        hold.blocks += fresh
        if hold.blocks:
            session.holds[hold_id] = hold
        return hold.blocks

    def release(self, session: Session, hold_id: int) -> None:
        """Unpins; an id that holds nothing is all right.

        Raises:
            InvalidRequest: the id is a reservation that awaits its Commit.
        """
        hold = session.holds.get(hold_id)
        if hold is None:
            return
        if hold.is_open:
            raise InvalidRequest(f"id {hold_id}: a reservation, which ends with commit or abort")
        self._drop_hold(session, hold_id, may_write=False)

    def reserve(
        self,
        session: Session,
        hold_id: int,
        hashes: Sequence[bytes],
        anchors: Sequence[bytes],
        tenant_name: str,
        now: float,
        *,
        keeps: bool = False,
        ttl_s: float = 0.0,
        durable: bool = False,
    ) -> Reservation:
        """Makes room for the blocks that do not exist, all or none, and pins those that are ready.

        Args:
            anchors: one per hash, or none at all.
        Raises:
            Overloaded: the session's credit, the tenant's quota or the arena is full of what is in use.
            InvalidRequest: the id is in use.
        """
        if hold_id in session.holds:
            raise InvalidRequest(f"id {hold_id}: in use")
        shelf = session.shelf
        self._drop_expired(shelf, hashes, now)
        states = _states(shelf, hashes)
        self._check_credit(session, len(states) - states.count(BlockState.PENDING))
        # Before room is made, so that it is not made here.
        for each, state in zip(hashes, states, strict=True):
            if state is BlockState.READY:
                self._pin(session, shelf.blocks[each])
                shelf.blocks[each].num_hits += 1
        shortage = self.room.shortage(shelf, tenant_name, states.count(BlockState.NEW))
        hold = session.holds[hold_id] = Hold(keeps=keeps, is_open=True)
        new: list[Block] = []
        for i, (each, state) in enumerate(zip(hashes, states, strict=True)):
            if state is BlockState.READY:
                hold.blocks.append(shelf.blocks[each])
            elif state is BlockState.NEW and not shortage:
                block = self.room.make(shelf, tenant_name, each, anchors[i] if anchors else b"", now, ttl_s)
                block.durable = durable
                session.writes.add(block)
                session.held_bytes += shelf.namespace.frame_bytes
                hold.blocks.append(block)
                new.append(block)
        if shortage:
            self._drop_hold(session, hold_id, may_write=False)
            raise Overloaded(shortage, _RETRY_AFTER_S)
        return Reservation(states, new)

    def commit(self, session: Session, hold_id: int, succeeded: Sequence[bool]) -> list[Block]:
        """Ends a reservation: the new blocks that succeeded are ready, the others are gone.

        Returns:
            Those that are ready.
        Raises:
            InvalidRequest: there is no such reservation, or ``succeeded`` is not one per new block.
        """
        hold = self._reservation(session, hold_id)
        written = [block for block in hold.blocks if block in session.writes]
        if len(succeeded) != len(written):
            raise InvalidRequest(f"succeeded has {len(succeeded)} entries: {len(written)}, one per new block")
        failed = []
        for block, is_complete in zip(written, succeeded, strict=True):
            if is_complete:
                block.is_ready = True
                session.writes.remove(block)
                session.pins[block] += 1  # the writer's use becomes a pin
            else:
                failed.append(block)
                self._give_up(session, block, may_write=False)
        hold.blocks = [block for block in hold.blocks if block not in failed]
        hold.is_open = False
        if not hold.keeps:
            self._drop_hold(session, hold_id, may_write=False)
        return [block for block in written if block.is_ready]

    def abort(self, session: Session, hold_id: int, may_write: bool) -> None:
        """Gives a reservation up; ``may_write``: its frames stay out of use as long as the session's ranks are there.

        Raises:
            InvalidRequest: there is no such reservation.
        """
        self._reservation(session, hold_id)
        self._drop_hold(session, hold_id, may_write)

    def covers(self, session: Session, offset: int, num_bytes: int, writes: bool) -> bool:
        """Whether the session may write (read) so many bytes there: one part, in a frame reserved (pinned) by it."""
        found = self.frames.block_at(offset)
        if found is None:
            return False
        block, place = found
        slot_bytes = block.shelf.namespace.slot_bytes
        is_held = block in session.writes if writes else block in session.pins
        return is_held and place % slot_bytes == 0 and num_bytes <= slot_bytes

    # The Redis tier.

    def begin_load(
        self, shelf: Shelf, hashes: Sequence[bytes], anchors: Sequence[bytes], tenant_name: str, now: float
    ) -> list[Block]:
        """Room for blocks that Redis has; none for those that are there or on their way, for others while there is
        room."""
        self._drop_expired(shelf, hashes, now)
        blocks: list[Block] = []
        for block_hash, anchor in zip(hashes, anchors, strict=True):
            if block_hash in shelf.blocks:
                continue
            if self.room.shortage(shelf, tenant_name, 1):
                break
            block = self.room.make(shelf, tenant_name, block_hash, anchor, now, 0.0)
            block.is_stored = True
            blocks.append(block)
        return blocks

    def end_load(self, blocks: Sequence[Block], succeeded: Sequence[bool]) -> None:
        """No worker writes there any longer."""
        for block, is_complete in zip(blocks, succeeded, strict=True):
            block.is_ready = is_complete
        for block in reversed(blocks):
            self.room.drop_user(block)

    def begin_store(self, blocks: Sequence[Block]) -> None:
        """Keeps blocks where they are while a worker reads them."""
        for block in blocks:
            block.is_stored = True
            self.room.add_user(block)

    def end_store(self, blocks: Sequence[Block], succeeded: Sequence[bool]) -> None:
        for block, is_stored in zip(blocks, succeeded, strict=True):
            block.is_stored = is_stored
        for block in reversed(blocks):
            self.room.drop_user(block)

    # Operators.

    def flush(self, tenant_name: str | None = None, fingerprint: bytes | None = None) -> int:
        """Forgets the blocks of a tenant, of a namespace, of both, or all; returns how many."""
        chosen = [
            block
            for shelf in self._shelves.values()
            if fingerprint in (None, shelf.namespace.fingerprint)
            for block in shelf.blocks.values()
            if tenant_name in (None, block.tenant.name)
        ]
        for block in chosen:
            self.room.forget(block)
        return len(chosen)

    @property
    def used_bytes(self) -> int:
        return sum(shelf.num_frames * shelf.namespace.frame_bytes for shelf in self._shelves.values())

    @property
    def idle_bytes(self) -> int:
        return sum(tenant.idle_bytes for tenant in self.room.tenants.values())

    @property
    def quarantined_bytes(self) -> int:
        """Given up while a rank may still write there."""
        given_up = [*self._quarantine.values(), *(session.may_write for session in self.sessions.values())]
        return sum(self.frames.frame_bytes_at(frame) for frames in given_up for frame in frames)

    def _shelf(self, namespace: Namespace) -> Shelf:
        for shelf in list(self._shelves.values()):
            if not shelf.num_sessions and not shelf.num_frames:
                del self._shelves[shelf.namespace.fingerprint]
        shelf = self._shelves.setdefault(namespace.fingerprint, Shelf(namespace))
        if shelf.namespace != namespace:
            raise InvalidRequest(
                f"num_parts {namespace.num_parts}, part_bytes {namespace.part_bytes}: this fingerprint has "
                f"{shelf.namespace.num_parts} and {shelf.namespace.part_bytes}"
            )
        return shelf

    def _reservation(self, session: Session, hold_id: int) -> Hold:
        hold = session.holds.get(hold_id)
        if hold is None or not hold.is_open:
            raise InvalidRequest(f"id {hold_id}: no reservation")
        return hold

    def _check_credit(self, session: Session, num: int) -> None:
        need = num * session.namespace.frame_bytes
        if session.held_bytes + need > session.credit_bytes:
            raise Overloaded(
                f"the session holds {session.held_bytes} bytes and asks for {need} more: {session.credit_bytes}",
                _RETRY_AFTER_S,
            )

    def _pin(self, session: Session, block: Block) -> None:
        self.room.add_user(block)
        session.pins[block] += 1
        session.held_bytes += block.shelf.namespace.frame_bytes

    def _drop_hold(self, session: Session, hold_id: int, may_write: bool) -> None:
        """The end of a chain first: it is of no use without its beginning, and goes first."""
        for block in reversed(session.holds.pop(hold_id).blocks):
            if block in session.writes:
                self._give_up(session, block, may_write)
                continue
            session.pins[block] -= 1
            if not session.pins[block]:
                del session.pins[block]
            session.held_bytes -= block.shelf.namespace.frame_bytes
            self.room.drop_user(block)

    def _give_up(self, session: Session, block: Block, may_write: bool) -> None:
        """A block that was not written. What stays out of use still counts against the session's credit."""
        session.writes.remove(block)
        if may_write:
            session.may_write.append(self.room.detach(block))
        else:
            session.held_bytes -= block.shelf.namespace.frame_bytes
            self.room.drop_user(block)

    def _drop_expired(self, shelf: Shelf, hashes: Sequence[bytes], now: float) -> None:
        self.room.drop_expired([shelf.blocks[each] for each in hashes if each in shelf.blocks], now)


def _states(shelf: Shelf, hashes: Sequence[bytes]) -> list[BlockState]:
    """A hash that comes twice is new once."""
    states: list[BlockState] = []
    seen: set[bytes] = set()
    for each in hashes:
        block = shelf.blocks.get(each)
        if block is None:
            states.append(BlockState.PENDING if each in seen else BlockState.NEW)
            seen.add(each)
        else:
            states.append(BlockState.READY if block.is_ready else BlockState.PENDING)
    return states
