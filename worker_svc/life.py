"""The life of a rank: its weights are loaded once; then it belongs to one group after another.

    meet the other ranks -> join their collectives -> allocate -> ready -> steps until it breaks -> leave -> meet ...

A group breaks when any of its ranks is lost. The survivors keep their processes and weights and form the next one; a
survivor that cannot get out of the broken one in time ends itself, and its supervisor starts it again.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import structlog

from albireo.errors import GroupError
from albireo.ledger import Ledger
from albireo.plan import StepResult
from albireo.transfers import TransferResult
from albireo.v1 import plan_pb2
from albireo.watchdog import Watchdog
from worker_svc.compute import StepQueue, run_steps
from worker_svc.engine import Engine
from worker_svc.transfers import KvStore, Transfers

_LEAVE_WITHIN_S = 4.0
_FORM_WITHIN_S = 120.0  # from the meeting on; a large cache takes its time
_STOP_WITHIN_S = 3.0
_MAX_PAUSE_S = 2.0

log = structlog.get_logger()


class Deadlines:
    """What must be over in time. Else this process ends with status 1, whatever its threads wait for."""

    def __init__(self) -> None:
        self._ends: dict[str, float] = {}

    def start(self, what: str, seconds: float) -> None:
        self._ends[what] = time.monotonic() + seconds

    def stop(self, what: str) -> None:
        self._ends.pop(what, None)

    @contextmanager
    def within(self, seconds: float, what: str) -> Iterator[None]:
        self.start(what, seconds)
        try:
            yield
        finally:
            self.stop(what)

    def check(self) -> bool:
        """Called again and again by the watchdog's thread."""
        now = time.monotonic()
        for what, end in list(self._ends.items()):
            if now > end:
                log.error("this rank is stuck and ends", doing=what)
                os._exit(1)
        return True


class Membership:
    """This rank's part in one group, from before the meeting to the break. `break_up` may be called by any thread."""

    def __init__(self, engine: Engine, deadlines: Deadlines, on_break: Callable[[str], None]) -> None:
        self.steps = StepQueue(engine if engine.is_asynchronous else None)
        self.transfers: Transfers | None = None  # from `begin_transfers` on, where there is a KV store
        self._engine = engine
        self._deadlines = deadlines
        self._on_break = on_break
        self._lock = threading.Lock()
        self._has_left = False
        self._reason = ""

    @property
    def is_broken(self) -> bool:
        return bool(self._reason)

    def check(self) -> None:
        """Raises GroupError when the group is broken."""
        if self._reason:
            raise GroupError(self._reason)

    def begin_transfers(self, store: KvStore, num_blocks: int, report: Callable[[TransferResult], None]) -> None:
        """Called by the compute thread, once the cache is there."""
        with self._lock:
            self.check()
            self.transfers = Transfers(store, self._engine.copies(), num_blocks, report, self.break_up)

    def break_up(self, reason: str) -> None:
        """The group is broken: gets the compute thread out of it. The first reason counts."""
        with self._lock:
            if self._reason or self._has_left:
                return
            self._reason = reason
            log.warning("the group is broken", reason=reason)
            self._deadlines.start("leaving a broken group", _LEAVE_WITHIN_S)
            self.steps.end()
            if self.transfers is not None:
                self.transfers.end()
            self._on_break(reason)  # before the abort: an aborted step may complete with wrong tokens
            self._engine.abort()

    def leave(self) -> None:
        """Called by the compute thread, which is out of the group's steps."""
        with self._lock:
            self._has_left = True  # a late abort would hit the next group
        if self.transfers is not None:  # this rank writes nothing any more when it meets the others again
            self.transfers.end()
            self.transfers.wait_until_ended()
        self._engine.leave()
        self._deadlines.stop("leaving a broken group")


@dataclass(frozen=True, slots=True)
class Meeting:
    """What the leader tells the ranks that it forms a group of; ``name`` is of this forming alone."""

    name: int
    num_blocks: int


class Role(Protocol):
    """What a leader and the other ranks do differently. Called by the compute thread, but for `part`."""

    def meet(self, membership: Membership, info: plan_pb2.GroupInfo) -> Meeting:
        """Waits until all ranks are there. GroupError: start over. ``info`` has this rank's own num_blocks."""

    def become_ready(self, membership: Membership, info: plan_pb2.GroupInfo) -> None:
        """This rank can run steps; ``info`` has the group's num_blocks. GroupError: start over."""

    def report(self, result: StepResult) -> None:
        """A step has run."""

    def report_transfer(self, result: TransferResult) -> None:
        """This rank is through with a transfer. Called by the copying thread."""

    def part(self, reason: str) -> None:
        """Tells the others that the group is broken. Any thread; must not wait."""


class Life:
    """Runs one rank until SIGTERM."""

    def __init__(self, watchdog: Watchdog, deadlines: Deadlines, step_timeout_s: float, ledger: Ledger) -> None:
        self._watchdog = watchdog
        self._deadlines = deadlines
        self._step_timeout_s = step_timeout_s
        self._ledger = ledger
        self._membership: Membership | None = None
        self._is_stopping = False
        call_at_sigterm(self._stop)

    def run(self, engine: Engine, role: Role, info: plan_pb2.GroupInfo, store: KvStore | None = None) -> None:
        num_failures = 0
        while True:
            membership = self._membership = Membership(engine, self._deadlines, role.part)
            if self._is_stopping:  # looked at after the membership is there to be broken
                return
            try:
                self._form(engine, role, membership, info, store)
                num_failures = 0
                transfers = membership.transfers
                step_completed = transfers.step_completed if transfers is not None else _no_transfers
                run_steps(engine, membership.steps, role.report, self._step_guard, self._ledger, step_completed)
            except GroupError as error:
                membership.break_up(str(error))
                num_failures += 1
            membership.leave()
            if num_failures > 1:  # a broken group is formed again at once, but not over and over
                time.sleep(min(0.05 * 2**num_failures, _MAX_PAUSE_S))

    def _form(
        self, engine: Engine, role: Role, membership: Membership, info: plan_pb2.GroupInfo, store: KvStore | None
    ) -> None:
        meeting = role.meet(membership, info)
        agreed = plan_pb2.GroupInfo()
        agreed.CopyFrom(info)
        agreed.num_blocks = meeting.num_blocks
        with self._deadlines.within(_FORM_WITHIN_S, "forming a group"):
            engine.join(meeting.name)
            engine.allocate(meeting.num_blocks)
            if store is not None:
                membership.begin_transfers(store, meeting.num_blocks, role.report_transfer)
            role.become_ready(membership, agreed)
        self._watchdog.ready()
        log.info("group is ready", num_blocks=meeting.num_blocks, tp_size=info.tp_size, engine=info.engine)

    def _step_guard(self) -> AbstractContextManager[None]:
        return self._deadlines.within(self._step_timeout_s, "a step")

    def _stop(self) -> None:
        self._is_stopping = True
        if self._membership is not None:  # else still loading: there is nothing to end in order
            self._membership.break_up("asked to stop")
            time.sleep(_STOP_WITHIN_S)  # the process may end meanwhile
        os._exit(0)


def _no_transfers() -> int:
    return 0


def call_at_sigterm(stop: Callable[[], None]) -> None:
    """Calls ``stop`` in a thread of its own: the main thread may be deep in a library, where Python handlers wait."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)  # written to by the C handler, in whatever thread it runs
    signal.signal(signal.SIGTERM, lambda _signal, _frame: None)

    def wait() -> None:
        os.read(reader, 1)
        stop()

    threading.Thread(target=wait, name="sigterm", daemon=True).start()
