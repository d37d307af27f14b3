"""albireo.v1.Ledger: this front end's page, and what its planner tells."""

from albireo.v1 import ledger_pb2, ledger_pb2_grpc
from scheduler_svc.frontend.calls import Context
from scheduler_svc.frontend.link import PlannerLink

SERVICE_NAME = ledger_pb2.DESCRIPTOR.services_by_name["Ledger"].full_name


class LedgerServicer(ledger_pb2_grpc.LedgerServicer):
    def __init__(self, link: PlannerLink) -> None:
        self._link = link

    async def Read(self, request: ledger_pb2.ReadLedgerRequest, context: Context) -> ledger_pb2.LedgerPages:
        return await self._link.read_ledger(request.num_rows)
