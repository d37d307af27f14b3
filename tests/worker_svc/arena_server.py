"""An arena that ranks attach to, without the rest of a KV store: its places are handed out by the test."""

import asyncio
import itertools
import os
import threading
from pathlib import Path
from types import TracebackType

import numpy as np

from albireo.kv.part import slot_bytes
from albireo.transfers import KvLease, Transfer, TransferKind
from kvstore_svc.memory import Memory
from kvstore_svc.ranks import Ranks

_transfer_ids = itertools.count()


class ArenaServer:
    """A context manager; leaving it is the store's death. ``gone`` counts leases that no rank holds any more."""

    def __init__(self, path: Path, num_bytes: int = 64 << 20) -> None:
        self.address = f"unix:{path}"
        self.memory = Memory.create(num_bytes)
        self._path = path
        self._arena_id = os.urandom(16)
        self._leases = itertools.count(1)
        self._loop = asyncio.new_event_loop()
        self._ranks = Ranks(self.memory, self._arena_id, lambda _lease: self.gone.release())
        self.gone = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "ArenaServer":
        self._serving = self._loop.create_task(self._ranks.serve(self._path))
        self._thread.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._serving.cancel)
        self._thread.join()

    @property
    def num_attached(self) -> int:
        return self._ranks.num_attached

    def open_lease(self) -> KvLease:
        lease = next(self._leases)
        self._call(self._ranks.open, lease)
        return KvLease(self._arena_id, len(self.memory.bytes), lease)

    def close_lease(self, lease: KvLease) -> None:
        self._call(self._ranks.close, lease.lease)

    def _call(self, function, *args) -> None:  # type: ignore[no-untyped-def]
        async def call() -> None:
            function(*args)

        asyncio.run_coroutine_threadsafe(call(), self._loop).result(10)

    def _run(self) -> None:
        self._loop.run_until_complete(asyncio.gather(self._serving, return_exceptions=True))
        self._loop.close()


def places(first: int, num_blocks: int, num_parts: int, part_bytes: int) -> np.ndarray:
    """Offsets [num_blocks, num_parts], from the arena's block ``first`` on."""
    indices = np.arange(first * num_parts, (first + num_blocks) * num_parts, dtype=np.uint64)
    return (indices * np.uint64(slot_bytes(part_bytes))).reshape(num_blocks, num_parts)


def transfer(
    kind: TransferKind, blocks: list[int], names: list[int], offsets: np.ndarray, lease: KvLease, after_step: int = -1
) -> Transfer:
    """Of blocks that are called by numbers."""
    hashes = tuple(name.to_bytes(32, "little") for name in names)
    return Transfer(next(_transfer_ids), kind, np.array(blocks, np.int32), hashes, offsets, after_step, lease)
