"""The load of `albireo bench host`: what it is told, what it counts, how it fails."""

import asyncio
import itertools
import json
from pathlib import Path

import pytest
from grpc import aio

from albireo.errors import GroupUnavailable
from albireo.v1 import generation_pb2 as pb
from albireo.v1 import generation_pb2_grpc
from albireo.watchdog import Watchdog
from scheduler_svc.load.config import LoadConfig
from scheduler_svc.load.main import main
from scheduler_svc.load.record import Record, write_report
from scheduler_svc.load.streams import StreamLoad


class Echo(generation_pb2_grpc.GenerationServicer):
    """Answers with the tokens that were asked for, two in a response; the fifth call on fails if that is wanted."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails
        self.lengths: list[int] = []

    async def GetModelInfo(self, request, context):
        return pb.ModelInfo(vocab_size=100)

    async def Generate(self, request, context):
        assert len(request.token_ids.ids) == 5
        assert all(token < 100 for token in request.token_ids.ids)
        self.lengths.append(request.sampling_params.max_tokens)
        if self.fails and len(self.lengths) > 4:
            context.set_code(8)
            context.set_details("no room")
            return
        for chunk in _pairs(self.lengths[-1]):
            await asyncio.sleep(0.002)
            yield pb.GenerateResponse(token_ids=chunk)
        yield pb.GenerateResponse(finish=pb.Finish())


def _pairs(num: int) -> list[list[int]]:
    return [list(range(start, min(start + 2, num))) for start in range(0, num, 2)]


async def serve(tmp_path: Path, fails: bool) -> tuple[Echo, aio.Server, str]:
    echo, server = Echo(fails), aio.server()
    generation_pb2_grpc.add_GenerationServicer_to_server(echo, server)
    address = f"unix:{tmp_path}/front.sock"
    server.add_insecure_port(address)
    await server.start()
    return echo, server, address


def config(address: str, **more: object) -> LoadConfig:
    return LoadConfig(target=address, streams=4, prompt_tokens=5, output_tokens=8, channels=2, **more)


async def test_clients_keep_their_streams_open(tmp_path: Path) -> None:
    """The first outputs are shorter and shorter, so that sequences end one by one; all later ones are whole."""
    echo, server, address = await serve(tmp_path, fails=False)
    record = Record()
    running = asyncio.create_task(StreamLoad(config(address), record).run(Watchdog()))
    while len(echo.lengths) < 12:
        await asyncio.sleep(0.01)
    report = record.turn()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await server.stop(None)
    assert sorted(echo.lengths[:4]) == [1, 3, 5, 7]
    assert set(echo.lengths[4:]) == {8}
    assert report["num_sequences"] >= 7
    assert 1 < report["num_tokens"] / report["num_responses"] <= 2
    assert 0 < report["itl_p50_ms"] <= report["itl_p99_ms"]
    assert 0 < report["ttft_p50_ms"] <= report["ttft_p99_ms"]


async def test_a_call_that_fails_ends_the_load(tmp_path: Path) -> None:
    _, server, address = await serve(tmp_path, fails=True)
    with pytest.raises(GroupUnavailable, match="RESOURCE_EXHAUSTED: no room"):
        await asyncio.wait_for(StreamLoad(config(address), Record()).run(Watchdog()), 10)
    await server.stop(None)


def test_nobody_is_there(tmp_path: Path) -> None:
    flags = ["--streams", "1", "--startup-timeout", "0.3"]
    assert main(["--target", f"unix:{tmp_path}/none.sock", *flags], Watchdog()) == 1
    assert main(["--planner", f"unix:{tmp_path}/none.sock", *flags], Watchdog()) == 1


def test_windows(tmp_path: Path) -> None:
    """Each report holds what came since the one before; latencies only where there were some."""
    record = Record()
    record.took(3)
    record.took(1)
    record.waited(0.010)
    record.waited(0.020)
    record.ended()
    report = record.turn()
    assert (report["window"], report["num_tokens"], report["num_responses"], report["num_sequences"]) == (0, 4, 2, 1)
    assert report["itl_p50_ms"] == pytest.approx(15)
    assert "ttft_p50_ms" not in report
    empty = record.turn()
    assert (empty["window"], empty["num_tokens"]) == (1, 0)
    write_report(tmp_path / "report.json", report)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    "wrong", [{}, {"planner": "a", "target": "b"}, {"target": "a", "streams": 0}, {"target": "a", "channels": 0}]
)
def test_wrong_configuration(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="--"):
        LoadConfig(**wrong)


@pytest.mark.parametrize(("streams", "tokens"), [(8, 8), (256, 256), (3, 10), (10, 3)])
def test_sequences_end_at_an_even_pace(streams: int, tokens: int) -> None:
    each = LoadConfig(target="a", streams=streams, output_tokens=tokens)
    lengths = [each.first_output_tokens(stream) for stream in range(streams)]
    assert lengths[0] == 1
    assert lengths[-1] <= tokens
    steps = [after - before for before, after in itertools.pairwise(lengths)]
    assert max(steps) - min(steps) <= 1
