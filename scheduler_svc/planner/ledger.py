"""albireo.v1.Ledger: the planner's page, and those of its group."""

from typing import Any

from grpc import aio

from albireo.v1 import ledger_pb2, ledger_pb2_grpc
from scheduler_svc.planner.group import GroupLink
from scheduler_svc.planner.timeline import Timeline

SERVICE_NAME = ledger_pb2.DESCRIPTOR.services_by_name["Ledger"].full_name


class LedgerServicer(ledger_pb2_grpc.LedgerServicer):
    def __init__(self, timeline: Timeline, group: GroupLink) -> None:
        self._timeline = timeline
        self._group = group

    async def Read(
        self, request: ledger_pb2.ReadLedgerRequest, context: "aio.ServicerContext[Any, Any]"
    ) -> ledger_pb2.LedgerPages:
        # The ranks' first: their steps are in the planner's page a moment later.
        pages = await self._group.read_ledger(request)
        pages.pages.append(self._timeline.ledger.page(request.num_rows))
        return pages
