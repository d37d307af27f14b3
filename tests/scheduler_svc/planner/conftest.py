"""A planner over real sockets, between front-end links and a leader whose messages tests may lose."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from albireo.arrays import pack_int32
from albireo.errors import AlbireoError
from albireo.plan import Rows, StepPlan, StepResult, decode_plan, decode_rows, encode_result
from albireo.rpc import Health, add_health, make_server
from albireo.v1 import frontend_pb2, frontend_pb2_grpc, plan_pb2
from scheduler_svc.frontend.link import PlannerLink
from scheduler_svc.planner.group import GroupLink
from scheduler_svc.planner.service import Planner
from scheduler_svc.planner.state import Limits

VOCAB_SIZE = 101
MAX_MODEL_LEN = 64


def next_token(history: list[int]) -> int:
    """The fake group's model. Never 0 or 1."""
    return 2 + (31 * sum(history) + 7 * len(history)) % (VOCAB_SIZE - 2)


def output_of(prompt: list[int], num: int) -> list[int]:
    history = list(prompt)
    for _ in range(num):
        history.append(next_token(history))
    return history[len(prompt) :]


class FakeLeader:
    """Plays a worker group, by slots and histories alone.

    Attributes:
        lose_plan, double_plan, lose_result, double_result: asked with each step id, whether that happens to it.
        poison: a plan with a new sequence that begins with this token breaks the stream.
        open: cleared, results wait.
        ready: whether the group is complete.
    """

    def __init__(self) -> None:
        never: Callable[[int], bool] = lambda step_id: False  # noqa: E731  # four names for one
        self.lose_plan = self.double_plan = self.lose_result = self.double_result = never
        self.poison = -1
        self.ready = True
        self.open = asyncio.Event()
        self.open.set()
        self.status = plan_pb2.GroupStatus(
            info=plan_pb2.GroupInfo(
                engine="stub",
                vocab_size=VOCAB_SIZE,
                eos_token_ids=[1],
                block_size=4,
                num_blocks=40,
                max_num_seqs=4,
                max_model_len=MAX_MODEL_LEN,
                max_num_batched_tokens=16,
            )
        )
        self.num_streams = 0
        self._stop = asyncio.Event()
        self._writing = asyncio.Lock()
        self._end_with = grpc.StatusCode.UNAVAILABLE

    def handlers(self) -> Any:
        return grpc.method_handlers_generic_handler(
            "albireo.v1.WorkerGroup",
            {
                "GetStatus": grpc.unary_unary_rpc_method_handler(
                    self.get_status, plan_pb2.GetStatusRequest.FromString, plan_pb2.GroupStatus.SerializeToString
                ),
                "Run": grpc.stream_stream_rpc_method_handler(self.run),
            },
        )

    def break_stream(self, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> None:
        self._end_with = code
        self._stop.set()

    async def get_status(self, _request: Any, _context: Any) -> plan_pb2.GroupStatus:
        state = plan_pb2.GroupStatus.STATE_READY if self.ready else plan_pb2.GroupStatus.STATE_LOADING
        self.status.state = state
        return self.status

    async def run(self, plans: Any, context: Any) -> None:
        if not self.ready:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not complete")
        self.num_streams += 1
        self.status.num_queued = 0
        self._stop.clear()
        self._end_with = grpc.StatusCode.UNAVAILABLE
        results: asyncio.Queue[StepResult] = asyncio.Queue()
        tasks = [
            asyncio.create_task(self._take_plans(plans, results)),
            asyncio.create_task(self._send_results(results, context)),
            asyncio.create_task(self._stop.wait()),
        ]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        async with self._writing:  # gRPC loses the status of a call whose write is cancelled
            for task in tasks:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await context.abort(self._end_with, "the stream ends")

    async def _take_plans(self, plans: Any, results: "asyncio.Queue[StepResult]") -> None:
        histories: dict[int, list[int]] = {}
        computed: dict[int, int] = {}
        row_slots = np.zeros(0, dtype=np.int32)
        expected: int | None = None
        async for data in plans:
            plan = decode_plan(data)
            if self.lose_plan(plan.step_id):
                continue
            for _ in range(1 + self.double_plan(plan.step_id)):
                if expected not in (None, plan.step_id):
                    return
                expected = plan.step_id + 1
                self.status.epoch, self.status.next_step_id = plan.epoch, expected
                tokens, row_slots = self._step(plan, histories, computed, row_slots)
                if tokens is None:
                    return
                self.status.num_queued += 1
                result = StepResult(plan.epoch, plan.step_id, np.array(tokens, np.int32), plan_pb2.StepTimings())
                results.put_nowait(result)

    async def _send_results(self, results: "asyncio.Queue[StepResult]", context: Any) -> None:
        while True:
            result = await results.get()
            await self.open.wait()
            self.status.num_queued -= 1
            if not self.lose_result(result.step_id):
                for _ in range(1 + self.double_result(result.step_id)):
                    async with self._writing:
                        await context.write(encode_result(result))

    def _step(
        self, plan: StepPlan, histories: dict[int, list[int]], computed: dict[int, int], row_slots: np.ndarray
    ) -> tuple[list[int] | None, np.ndarray]:
        for new in plan.new_sequences:
            if new.token_ids[0] == self.poison:
                return None, row_slots
            histories[new.slot], computed[new.slot] = new.token_ids.tolist(), new.num_computed_tokens
        rows: Rows = decode_rows(row_slots) if plan.rows is None else plan.rows
        tokens = []
        for slot, count, samples in zip(rows.slots.tolist(), rows.num_scheduled_tokens, rows.samples, strict=True):
            computed[slot] += int(count)
            if samples:
                tokens.append(next_token(histories[slot][: computed[slot]]))
                histories[slot].append(tokens[-1])
        return tokens, rows.slots


class Inbox:
    """What came for one sequence."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended: frontend_pb2.Ended | None = None
        self.error: AlbireoError | None = None
        self.over = asyncio.Event()

    def start(self, num_cached_tokens: int) -> None:
        self.num_cached_tokens = num_cached_tokens

    def receive(self, token_ids: list[int], now: float, logprobs: list[Any]) -> None:
        self.tokens += token_ids

    def end(self, ended: frontend_pb2.Ended) -> None:
        self.ended = ended
        self.over.set()

    def fail(self, error: AlbireoError) -> None:
        self.error = error
        self.over.set()


class World:
    """A leader, a planner and a front end's link to it."""

    def __init__(self, tmp_path: Path) -> None:
        self.leader = FakeLeader()
        self.leader_address = f"unix:{tmp_path}/group.sock"
        self.planner_address = f"unix:{tmp_path}/planner.sock"
        self.link = PlannerLink(self.planner_address, "f")
        self.planner: Planner = None  # type: ignore[assignment]  # until start
        self.health: Health = None  # type: ignore[assignment]
        self.running: asyncio.Task[None] = None  # type: ignore[assignment]
        self._tasks: list[asyncio.Task[Any]] = []
        self._servers: list[Any] = []

    async def start(self, recovery_timeout_s: float = 30.0, max_waiting: int = 100) -> None:
        await self.start_leader()
        group = GroupLink(self.leader_address)

        def limits_of(info: plan_pb2.GroupInfo) -> Limits:
            return Limits(
                block_size=info.block_size,
                num_blocks=info.num_blocks,
                max_num_seqs=info.max_num_seqs,
                max_model_len=info.max_model_len,
                max_num_batched_tokens=info.max_num_batched_tokens,
                vocab_size=info.vocab_size,
                eos_token_ids=frozenset(info.eos_token_ids),
                depth=2,
                max_waiting=max_waiting,
            )

        self.planner = Planner(group, await group.wait_until_ready(), limits_of, recovery_timeout_s)
        server = make_server(for_peers=True)
        frontend_pb2_grpc.add_PlannerServicer_to_server(self.planner.frontends, server)
        self.health = await add_health(server, [])
        server.add_insecure_port(self.planner_address)
        await server.start()
        self._servers.append(server)
        self.running = asyncio.create_task(self.planner.run(self.health))
        await self.link.connect(10)
        self._tasks.append(asyncio.create_task(self.link.run()))

    async def start_leader(self) -> None:
        server = make_server(for_peers=True)
        server.add_generic_rpc_handlers((self.leader.handlers(),))
        server.add_insecure_port(self.leader_address)
        await server.start()
        self._servers.append(server)

    def submit(self, prompt: list[int], max_tokens: int = 20, **fields: Any) -> Inbox:
        inbox = Inbox()
        sampling = plan_pb2.Sampling(top_p=1)
        fields = {"ignore_eos": True, **fields}
        submit = frontend_pb2.Submit(token_ids=pack_int32(prompt), max_tokens=max_tokens, sampling=sampling, **fields)
        self.link.submit(submit, inbox)
        return inbox

    async def exact(self, *sent: tuple[list[int], Inbox]) -> None:
        """Every sequence comes to its end with the right tokens."""
        for prompt, inbox in sent:
            async with asyncio.timeout(20):
                waiting = asyncio.ensure_future(inbox.over.wait())
                await asyncio.wait({waiting, self.running}, return_when=asyncio.FIRST_COMPLETED)
                if self.running.done():
                    self.running.result()
            assert inbox.ended is not None, inbox.error
            assert not inbox.ended.HasField("refusal"), inbox.ended
            assert inbox.tokens == output_of(prompt, len(inbox.tokens))
            assert len(inbox.tokens) == inbox.ended.num_output_tokens

    async def stop(self) -> None:
        await self.link.close()
        for task in [*self._tasks, self.running]:
            task.cancel()
        await asyncio.gather(*self._tasks, self.running, return_exceptions=True)
        for server in reversed(self._servers):
            await server.stop(None)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    yield world
    await world.stop()
