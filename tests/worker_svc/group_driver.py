"""Drives a worker group over its plan stream; and runs its ranks as processes that a test kills and starts again."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import numpy as np

from albireo.errors import GroupUnavailable
from albireo.plan import NewSequence, Rows, StepPlan
from albireo.v1 import plan_pb2
from scheduler_svc.planner.group import GroupLink, PlanStream
from worker_svc.stub.truth import true_tokens

PROMPT = np.arange(5, 50, dtype=np.int32)


def start_plan(epoch: int, step_id: int = 0) -> StepPlan:
    """A plan that computes all of PROMPT in slot 0."""
    new = NewSequence(0, PROMPT, len(PROMPT), 0, np.array([3, 1], dtype=np.int32), plan_pb2.Sampling(top_p=1))
    rows = Rows(np.zeros(1, np.int32), np.array([len(PROMPT)], dtype=np.int32), np.ones(1, dtype=bool))
    return StepPlan(epoch, step_id, rows, new_sequences=(new,))


def send_plans(stream: PlanStream, epoch: int, num: int) -> None:
    """Plans for the first ``num`` tokens after PROMPT."""
    for plan in [start_plan(epoch), *(StepPlan(epoch, step, None) for step in range(1, num))]:
        stream.send(plan)


async def collect(stream: PlanStream, num: int) -> list[int]:
    """Sampled tokens of the next ``num`` results."""
    results: asyncio.Queue = asyncio.Queue()
    running = asyncio.create_task(stream.run(lambda: None, results.put_nowait))
    tokens: list[int] = []
    try:
        while len(tokens) < num:
            getting = asyncio.create_task(results.get())
            await asyncio.wait({getting, running}, timeout=20, return_when=asyncio.FIRST_COMPLETED)
            if not getting.done():
                getting.cancel()
                running.result()  # raises what ended the stream
            tokens.append(int(getting.result().token_ids[0]))
        return tokens
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def true_output(num: int) -> list[int]:
    """What the stub must say after PROMPT."""
    return true_tokens(PROMPT, plan_pb2.Sampling(), frozenset(), num, 1003).tolist()


class Ranks:
    """The ranks of one group, each a process of its own. A context manager."""

    def __init__(self, run_dir: Path, model: Path, tp: int, **flags: object) -> None:
        self.address = f"unix:{run_dir}/group.sock"
        self._run_dir = run_dir
        self._argv = ["--model", str(model), "--tp", str(tp), "--listen", self.address, "--run-dir", str(run_dir)]
        for name, value in flags.items():
            self._argv += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
        self.processes: dict[int, subprocess.Popen] = {}
        self.tp = tp

    def __enter__(self) -> "Ranks":
        for rank in range(self.tp):
            self.start(rank)
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()

    @property
    def pids(self) -> list[int]:
        return [self.processes[rank].pid for rank in range(self.tp)]

    def start(self, rank: int) -> None:
        with self._log(rank).open("ab") as output:
            self.processes[rank] = subprocess.Popen(
                [sys.executable, "-m", "worker_svc", *self._argv, "--rank", str(rank)], stdout=output, stderr=output
            )

    def kill(self, rank: int) -> None:
        self.processes[rank].kill()
        self.processes[rank].wait()

    def restart(self, rank: int) -> None:
        self.kill(rank)
        self.start(rank)

    def signal(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.processes[rank].pid, number)

    def restart_dead(self) -> None:
        """What a supervisor does."""
        for rank, process in self.processes.items():
            if process.poll() is not None:
                self.start(rank)

    def count(self, rank: int, event: str) -> int:
        """How often a rank, all its processes together, has logged an event."""
        path = self._log(rank)
        return path.read_text().count(f'"{event}"') if path.exists() else 0

    async def wait_for(self, rank: int, event: str, times: int, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while self.count(rank, event) < times:
            if time.monotonic() > deadline:
                raise AssertionError(f"rank {rank} has not logged '{event}' {times} times\n{self.logs()}")
            await asyncio.sleep(0.02)

    async def wait_until_ready(self, formings: int, timeout_s: float = 60.0) -> None:
        """Waits until the group has formed so often, on all ranks of ours and in the leader's status."""
        await self.wait_for(0, "group is ready", formings, timeout_s)

    async def generate(self, num: int) -> list[int]:
        """The output after PROMPT, in a new epoch."""
        link = GroupLink(self.address)
        try:
            status = await asyncio.wait_for(link.wait_until_ready(), 30)
            stream = link.open()
            send_plans(stream, status.epoch + 1, num)
            return await collect(stream, num)
        finally:
            await link.close()

    async def generate_until_it_works(self, num: int, timeout_s: float = 60.0) -> list[int]:
        """Restarts what dies meanwhile, as a supervisor would, and tries again, as a planner would."""
        deadline = time.monotonic() + timeout_s
        while True:
            self.restart_dead()
            with contextlib.suppress(GroupUnavailable, TimeoutError):
                return await self.generate(num)
            assert time.monotonic() < deadline, self.logs()
            await asyncio.sleep(0.05)

    def logs(self) -> str:
        return "\n".join(f"rank {rank}:\n{self._log(rank).read_text()[-3000:]}" for rank in range(self.tp))

    def _log(self, rank: int) -> Path:
        return self._run_dir / f"rank-{rank}.log"
