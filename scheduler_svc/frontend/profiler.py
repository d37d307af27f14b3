"""Profiles: what a server's processes did between two calls, from their ledgers, as a trace for Perfetto."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from albireo.errors import ConfigError, GroupUnavailable, InvalidRequest
from albireo.exposure import Page, read_pages
from albireo.ledger import DEFAULT_ROWS
from albireo.perfetto import NoSteps, make_trace, steps_since, write_trace
from albireo.v1 import ledger_pb2

_POLL_S = 0.25
_MAX_FILES = 100

# So many rows of each page, 0 for all.
ReadLedger = Callable[[int], Awaitable[ledger_pb2.LedgerPages]]


class Profiler:
    """One profile at a time.

    Args:
        directory: where profiles are written; empty: nowhere, there are none.
        name: of this front end; a part of the names of files.
    """

    def __init__(self, directory: str, name: str, read_ledger: ReadLedger) -> None:
        self._directory = directory
        self._name = name
        self._read_ledger = read_ledger
        self._profile: asyncio.Task[str] | None = None
        self._ending = asyncio.Event()
        self._starting = asyncio.Lock()

    async def start(self, output_dir: str | None, num_steps: int | None) -> str:
        """Begins a profile, which ends by itself after ``num_steps``; returns what to tell the client.

        Raises ConfigError without a directory, GroupUnavailable without a planner, and InvalidRequest.
        """
        directory = self._checked_directory(output_dir)
        if num_steps is not None and not 1 <= num_steps <= DEFAULT_ROWS:
            raise InvalidRequest(f"num_steps is {num_steps}; 1 to {DEFAULT_ROWS}, as many as ledgers keep")
        async with self._starting:
            if self._profile is not None and not self._profile.done():
                raise InvalidRequest("a profile is being made already; StopProfile ends it")
            began_ns = _latest_ns(await self._read(1))
            self._ending = asyncio.Event()
            self._profile = asyncio.create_task(self._make(directory, began_ns, num_steps, self._ending))
        return f"StopProfile writes a trace for Perfetto to {directory}"

    async def stop(self) -> str:
        """Ends the profile; returns where it is. Raises InvalidRequest when there is none, and what went wrong."""
        if self._profile is None:
            raise InvalidRequest(f"no profile is being made at {self._name}; StartProfile begins one")
        profile, self._profile = self._profile, None
        self._ending.set()
        return await asyncio.shield(profile)

    def close(self) -> None:
        if self._profile is not None:
            self._profile.cancel()

    def _checked_directory(self, output_dir: str | None) -> Path:
        if not self._directory:
            raise ConfigError("there is no --profile-dir, so no profiles are written")
        directory = Path(self._directory).absolute()
        if output_dir and Path(output_dir) != directory:
            raise InvalidRequest(
                f"output_dir is {output_dir!r}; profiles are written to --profile-dir {directory} alone"
            )
        return directory

    async def _make(self, directory: Path, began_ns: int, num_steps: int | None, ending: asyncio.Event) -> str:
        while not ending.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S if num_steps else None):
                    await ending.wait()
            if num_steps and len(_planner(steps_since(await self._read(num_steps), began_ns))) >= num_steps:
                break
        pages = await self._read(0)
        file = directory / f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{self._name}.json"
        await asyncio.to_thread(_write, file, pages, began_ns, num_steps)
        has_lost = _has_lost(_planner(pages), began_ns)
        return f"{file}; its beginning is lost, ledgers keep {DEFAULT_ROWS} steps" if has_lost else str(file)

    async def _read(self, num_rows: int) -> list[Page]:
        """Raises GroupUnavailable when the planner's page is not there."""
        pages = read_pages((await self._read_ledger(num_rows)).pages)
        if not any(page.is_planner for page in pages):
            raise GroupUnavailable("the planner does not answer")
        return pages


def _write(file: Path, pages: Sequence[Page], began_ns: int, num_steps: int | None) -> None:
    try:
        trace = make_trace(steps_since(pages, began_ns, num_steps or 0))
    except NoSteps:
        raise InvalidRequest("no steps have run since StartProfile, so there is nothing to show") from None
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if len(list(file.parent.iterdir())) >= _MAX_FILES:
            raise ConfigError(f"--profile-dir {file.parent} has {_MAX_FILES} files, which is all that are kept there")
        write_trace(file, trace)
    except OSError as error:
        raise ConfigError(f"--profile-dir {file.parent}: {error.strerror}") from error


def _planner(pages: Sequence[Page]) -> Page:
    return next(page for page in pages if page.is_planner)


def _latest_ns(pages: Sequence[Page]) -> int:
    """When the latest step in the planner's ledger was planned; 0: there is none."""
    return int(_planner(pages)["plan_start_at_ns"].max(initial=0))


def _has_lost(planner: Page, began_ns: int) -> bool:
    """Whether steps after ``began_ns`` are no longer in the planner's ledger."""
    kept_ns = planner["plan_start_at_ns"]
    is_full = len(kept_ns) >= DEFAULT_ROWS
    return bool(len(kept_ns)) and int(kept_ns[0]) > began_ns and (is_full or began_ns > 0)
