"""The front end's ledger, by albireo.v1.Ledger, with the planner's pages or without."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from grpc import aio

from albireo.ledger import FRONTEND_COLUMNS, rows_of
from albireo.rpc import make_server
from albireo.v1 import frontend_pb2_grpc, ledger_pb2, ledger_pb2_grpc
from albireo.v1.generation_pb2 import GenerateRequest, SamplingParams, TokenIds

Ids = Callable[..., list[int]]
pytestmark = pytest.mark.timeout(30)


class FakeLedger(ledger_pb2_grpc.LedgerServicer):
    """The planner's: pages of a planner and a rank; ``answering`` cleared, it hangs."""

    def __init__(self) -> None:
        self.answering = asyncio.Event()
        self.answering.set()
        self.num_rows = -1  # as asked for

    async def Read(self, request: Any, context: Any) -> ledger_pb2.LedgerPages:
        self.num_rows = request.num_rows
        await self.answering.wait()
        return ledger_pb2.LedgerPages(pages=[ledger_pb2.LedgerPage(process=name) for name in ("planner", "rank-0")])


@pytest.fixture
async def planner_ledger() -> FakeLedger:
    return FakeLedger()


@pytest.fixture
async def planner_server(planner: Any, planner_ledger: FakeLedger, tmp_path: Path) -> AsyncIterator[aio.Server]:
    server = make_server()
    frontend_pb2_grpc.add_PlannerServicer_to_server(planner, server)
    ledger_pb2_grpc.add_LedgerServicer_to_server(planner_ledger, server)
    server.add_insecure_port(f"unix:{tmp_path}/planner.sock")
    await server.start()
    yield server
    await server.stop(None)


async def read(world: Any, num_rows: int = 0) -> dict[str, ledger_pb2.LedgerPage]:
    """Pages by process."""
    stub: Any = ledger_pb2_grpc.LedgerStub(world.channel)
    answer = await stub.Read(ledger_pb2.ReadLedgerRequest(num_rows=num_rows))
    return {page.process: page for page in answer.pages}


async def test_a_row_for_each_message_that_has_tokens(world: Any, ids: Ids) -> None:
    """In the order of the messages, also with tokens of sequences that are over here."""
    params = SamplingParams(n=2)
    call = world.native.Generate(GenerateRequest(token_ids=TokenIds(ids=[1, 2]), sampling_params=params))
    _ = [await world.planner.submits.get() for _ in range(2)]
    before_ns = time.monotonic_ns()
    await world.planner.send((1, ids("a")[0]), (2, ids("a")[0]), (2, ids("b")[0]))
    await world.planner.send(started=((1, 0), (2, 0)))
    await world.planner.say_serving(True)
    for sequence_id in (1, 2):
        await world.planner.run(sequence_id, ids("a"))
    async for _ in call:
        pass
    page = (await read(world))["frontend-0"]
    assert tuple(page.columns) == FRONTEND_COLUMNS
    rows = rows_of(page)
    assert list(zip(rows["num_sequences"], rows["num_tokens"], strict=True)) == [(2, 3), (1, 1), (1, 1)]
    times = [t for row in zip(rows["received_at_ns"], rows["dispatched_at_ns"], strict=True) for t in row]
    times = [before_ns, *times, time.monotonic_ns()]
    assert times == sorted(times)


async def test_the_planners_pages_come_with_it(world: Any, planner_ledger: FakeLedger, ids: Ids) -> None:
    call = world.native.Generate(GenerateRequest(token_ids=TokenIds(ids=[1, 2])))
    submit = await world.planner.submits.get()
    await world.planner.run(submit.sequence_id, ids("a", "b", "a"))
    async for _ in call:
        pass
    pages = await read(world, num_rows=2)
    assert list(pages) == ["frontend-0", "planner", "rank-0"]
    assert planner_ledger.num_rows == 2
    assert rows_of(pages["frontend-0"])["num_tokens"].tolist() == [1, 1]


async def test_a_planner_that_does_not_answer_is_left_out(
    world: Any, planner_ledger: FakeLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scheduler_svc.frontend.link._LEDGER_TIMEOUT_S", 0.1)
    planner_ledger.answering.clear()
    assert list(await read(world)) == ["frontend-0"]


async def test_a_planner_that_is_gone_is_left_out(world: Any) -> None:
    await world.planner_server.stop(None)
    assert list(await read(world)) == ["frontend-0"]


async def test_a_planner_that_keeps_no_ledger_is_left_out(world: Any, planner: Any, tmp_path: Path) -> None:
    """It answers with UNIMPLEMENTED."""
    await world.planner_server.stop(None)
    server = make_server()
    frontend_pb2_grpc.add_PlannerServicer_to_server(planner, server)
    server.add_insecure_port(f"unix:{tmp_path}/planner.sock")
    await server.start()
    async with asyncio.timeout(10):
        await world.wait_until_ready()
    assert list(await read(world)) == ["frontend-0"]
    await server.stop(None)
