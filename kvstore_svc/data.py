"""Parts for ranks on other hosts: header and payload as bytes on a stream, checked against the session's lease.

Bytes are copied on the event loop, a part at a time: between the check of a lease and the copy nothing else happens.
"""

import struct
from collections.abc import AsyncIterator, Mapping

import numpy as np

from albireo.kv.part import HEADER_BYTES, Bytes
from albireo.kv.wire import DATA_REPLY, DATA_REQUEST, Operation, Status
from kvstore_svc.blocks import Session
from kvstore_svc.counts import Counts
from kvstore_svc.index import Index


class DataStream:
    """The handler of KvStore/Data. Frames come and go in order."""

    def __init__(self, index: Index, memory: Bytes, counts: Counts) -> None:
        self._index = index
        self._memory = memory
        self._counts = counts

    async def run(self, requests: AsyncIterator[bytes], _context: object) -> AsyncIterator[bytes]:
        async for request in requests:
            yield self._answer(request, self._index.sessions)

    def _answer(self, request: bytes, sessions: Mapping[int, Session]) -> bytes:
        try:
            request_id, lease, offset, num_bytes, operation = DATA_REQUEST.unpack_from(request)
        except struct.error:
            return DATA_REPLY.pack(0, Status.REFUSED)
        session = sessions.get(lease)
        if session is None:
            return DATA_REPLY.pack(request_id, Status.ENDED)
        writes = operation == Operation.WRITE
        payload = memoryview(request)[DATA_REQUEST.size :]
        is_allowed = (
            operation in (Operation.READ, Operation.WRITE)
            and num_bytes >= HEADER_BYTES
            and len(payload) == (num_bytes if writes else 0)
            and self._index.covers(session, offset, num_bytes, writes)
        )
        if not is_allowed:
            self._counts.num_refused += 1
            return DATA_REPLY.pack(request_id, Status.REFUSED)
        slot = self._memory[offset : offset + num_bytes]
        reply = DATA_REPLY.pack(request_id, Status.OK)
        if not writes:
            self._counts.data_read_bytes += num_bytes
            return reply + slot.tobytes()
        self._counts.data_written_bytes += num_bytes
        slot[:] = np.frombuffer(payload, dtype=np.uint8)
        return reply
