"""Keeps a session with a KV store that may come and go; while it is away, all is a miss."""

import asyncio
import time
from collections.abc import Callable

import structlog

from albireo.errors import StoreUnavailable
from albireo.kv.fingerprint import Namespace
from albireo.kv.session import KvSession, open_session
from albireo.rpc import make_channel
from albireo.security import OPEN, Security

_RETRY_AFTER_S = 0.2

log = structlog.get_logger()


class KvLink:
    """One planner's way to its store.

    Args:
        on_change: called with the new session, or None when the last one has ended: its places mean nothing any more.

    Attributes:
        session: None while the store is away.
    """

    def __init__(
        self,
        target: str,
        name: str,
        namespace: Namespace,
        on_change: Callable[[KvSession | None], None] = lambda _: None,
        security: Security = OPEN,
    ) -> None:
        self.session: KvSession | None = None
        self._name = name
        self._namespace = namespace
        self._on_change = on_change
        self._channel = make_channel(target, to_peer=True, security=security)
        self._epoch = 0

    async def run(self) -> None:
        """Runs until it is cancelled, which ends the session. Raises InvalidRequest: the store does not take us."""
        told = ""
        try:
            while True:
                try:
                    await self._hold_one()
                    told = ""
                except StoreUnavailable as error:
                    if str(error) != told:  # else the log would have it five times a second
                        told = str(error)
                        log.warning("no session with the KV store", reason=told)
                await asyncio.sleep(_RETRY_AFTER_S)
        finally:
            await self._channel.close(grace=None)

    async def _hold_one(self) -> None:
        # Epochs grow over restarts of this process as well.
        self._epoch = max(self._epoch + 1, time.time_ns())
        session = self.session = await open_session(self._channel, self._name, self._epoch, self._namespace)
        self._on_change(session)
        try:
            reason = await session.wait_until_ended()
            log.warning("the KV store's session ended", reason=reason, epoch=self._epoch)
        finally:
            self.session = None
            self._on_change(None)
            await session.close()
