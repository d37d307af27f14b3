"""Profiles of steps that are made by hand."""

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from albireo.errors import AlbireoError, ConfigError, GroupUnavailable, InvalidRequest
from albireo.ledger import FRONTEND_COLUMNS, PLANNER_COLUMNS, RANK_COLUMNS, make_page
from albireo.v1 import ledger_pb2
from scheduler_svc.frontend import profiler as module
from scheduler_svc.frontend.profiler import Profiler

STEP_NS = 1_000_000


class Server:
    """Ledgers of a planner, a rank and a front end, which keep ``capacity`` rows each."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.capacity = 64
        self.answers = True
        self.was_read = asyncio.Event()

    async def read(self, num_rows: int) -> ledger_pb2.LedgerPages:
        self.was_read.set()
        first = max(0, self.num_steps - min(num_rows or self.capacity, self.capacity))
        n = np.arange(first, self.num_steps)
        at = 10**12 + n * STEP_NS
        ones = np.ones_like(n)
        planner = [n, at - 900_000, at - 850_000, at + 900_000, at + 910_000, at + 920_000, at + 930_000, at + 940_000]
        planner += [70_000 * ones, ones, ones]
        rank = [n, at - 800_000, at - 700_000, at - 600_000, at, at + 800_000, 700_000 * ones, 100_000 * ones]
        rank += [0 * ones, 0 * ones, ones, ones]
        frontend = [at + 935_000, at + 939_000, ones, ones]
        pages = [("frontend-0", FRONTEND_COLUMNS, frontend)]
        if self.answers:
            pages += [("planner", PLANNER_COLUMNS, planner), ("rank-0", RANK_COLUMNS, rank)]
        return ledger_pb2.LedgerPages(pages=[make_page(name, of, np.stack(rows, axis=1)) for name, of, rows in pages])


@pytest.fixture
async def server() -> Server:
    return Server()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "profiles"


@pytest.fixture
async def profiler(server: Server, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(module, "_POLL_S", 0.01)
    monkeypatch.setattr(module, "DEFAULT_ROWS", server.capacity)
    profiler = Profiler(str(directory), "frontend-0", server.read)
    yield profiler
    profiler.close()


def steps(file: str, name: str = "T3 forward") -> list[int]:
    events = json.loads(Path(file).read_text())["traceEvents"]
    return [event["args"]["step"] for event in events if event["name"] == name]


async def refusal(call: Any) -> tuple[type[AlbireoError], str]:
    with pytest.raises(AlbireoError) as caught:
        await call
    return type(caught.value), str(caught.value)


async def test_a_profile_shows_the_steps_between_start_and_stop(
    profiler: Profiler, server: Server, directory: Path
) -> None:
    server.num_steps = 10
    assert str(directory) in await profiler.start(None, None)
    server.num_steps = 17
    file = await profiler.stop()
    assert Path(file).parent == directory
    assert directory.stat().st_mode & 0o777 == 0o700
    for name in ("T1 plan", "T3 forward", "T5 commit"):
        assert steps(file, name) == list(range(10, 17))
    events = json.loads(Path(file).read_text())["traceEvents"]
    assert sum(event["name"] == "T5 dispatch" for event in events) == 1 + 7, "step 9's came when 10 had been planned"


async def test_a_server_that_has_run_nothing_is_profiled_from_its_first_step(
    profiler: Profiler, server: Server
) -> None:
    await profiler.start("", None)
    server.num_steps = 3
    assert steps(await profiler.stop()) == [0, 1, 2]


async def test_a_profile_ends_by_itself(profiler: Profiler, server: Server, directory: Path) -> None:
    """After so many steps; what comes before StopProfile is not in it."""
    server.num_steps = 10
    await profiler.start(str(directory), 4)
    server.num_steps = 13
    for _ in range(2):
        server.was_read.clear()
        await server.was_read.wait()
    assert not directory.exists(), "three steps are not four"
    server.num_steps = 15
    async with asyncio.timeout(10):
        await asyncio.shield(profiler._profile)  # type: ignore[arg-type]  # it is being made
    server.num_steps = 40
    assert steps(await profiler.stop()) == [10, 11, 12, 13]


async def test_a_profile_may_be_stopped_before_its_end(profiler: Profiler, server: Server) -> None:
    await profiler.start(None, 50)
    server.num_steps = 5
    assert steps(await profiler.stop()) == list(range(5))


@pytest.mark.parametrize("num_before", [0, 10])
async def test_what_ledgers_no_longer_keep_is_said_to_be_lost(
    profiler: Profiler, server: Server, num_before: int
) -> None:
    server.num_steps = num_before
    await profiler.start(None, None)
    server.num_steps = num_before + server.capacity - 1
    assert "lost" not in await profiler.stop()
    server.num_steps = num_before
    await profiler.start(None, None)
    server.num_steps = num_before + 100
    file, _, message = (await profiler.stop()).partition("; ")
    assert message == "its beginning is lost, ledgers keep 64 steps"
    assert steps(file) == list(range(num_before + 36, num_before + 100))


async def test_one_profile_at_a_time(profiler: Profiler, server: Server) -> None:
    await profiler.start(None, None)
    assert await refusal(profiler.start(None, None)) == (
        InvalidRequest,
        "a profile is being made already; StopProfile ends it",
    )
    server.num_steps = 1
    await profiler.stop()
    assert await refusal(profiler.stop()) == (
        InvalidRequest,
        "no profile is being made at frontend-0; StartProfile begins one",
    )


async def test_a_profile_without_steps_is_none(profiler: Profiler, server: Server, directory: Path) -> None:
    server.num_steps = 5
    await profiler.start(None, None)
    kind, message = await refusal(profiler.stop())
    assert (kind, "no steps have run" in message) == (InvalidRequest, True)
    assert not directory.exists()


async def test_clients_choose_no_paths(profiler: Profiler, server: Server, directory: Path, tmp_path: Path) -> None:
    kind, message = await refusal(profiler.start(str(tmp_path / "other"), None))
    assert kind is InvalidRequest
    assert f"--profile-dir {directory}" in message
    kind, message = await refusal(Profiler("", "f", server.read).start(None, None))
    assert (kind, "--profile-dir" in message) == (ConfigError, True)


@pytest.mark.parametrize("num_steps", [0, -1, 65])
async def test_more_steps_than_ledgers_keep_cannot_be_asked_for(profiler: Profiler, num_steps: int) -> None:
    kind, message = await refusal(profiler.start(None, num_steps))
    assert (kind, message) == (InvalidRequest, f"num_steps is {num_steps}; 1 to 64, as many as ledgers keep")


async def test_without_the_planner_there_is_no_profile(profiler: Profiler, server: Server) -> None:
    """It may be gone when the profile ends, too."""
    server.answers = False
    assert await refusal(profiler.start(None, None)) == (GroupUnavailable, "the planner does not answer")
    server.answers = True
    await profiler.start(None, None)
    server.answers = False
    assert await refusal(profiler.stop()) == (GroupUnavailable, "the planner does not answer")


async def test_a_directory_that_cannot_be_written_to_is_named(
    profiler: Profiler, server: Server, directory: Path
) -> None:
    directory.write_text("a file")
    await profiler.start(None, None)
    server.num_steps = 1
    kind, message = await refusal(profiler.stop())
    assert kind is ConfigError
    assert message.startswith(f"--profile-dir {directory}: ")


async def test_profiles_do_not_fill_the_disk(
    profiler: Profiler, server: Server, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_FILES", 2)
    for num_steps in (1, 2):
        await profiler.start(None, None)
        server.num_steps = num_steps
        await profiler.stop()
    await profiler.start(None, None)
    server.num_steps = 3
    assert await refusal(profiler.stop()) == (
        ConfigError,
        f"--profile-dir {directory} has 2 files, which is all that are kept there",
    )
