"""One rank's process: an I/O thread that receives and prepares steps, and the compute thread (the main one)."""

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import structlog
import uvloop
from grpc import aio

from albireo import rpc
from albireo.errors import ConfigError, GroupError
from albireo.metrics import serve_metrics
from albireo.model_spec import resolve_model
from albireo.plan import StepResult, decode_plan
from albireo.v1 import plan_pb2
from worker_svc.batch import BatchState
from worker_svc.compute import StepQueue, prepare, run_steps
from worker_svc.config import WorkerConfig
from worker_svc.engine import BLOCK_SIZE, Engine, EngineConfig, EngineInfo
from worker_svc.leader import SERVICE_NAME, Ranks, WorkerGroup
from worker_svc.relay import Kind, RelayClient, to_int

Result = TypeVar("Result")

# A rank that has lost its leader is gone after so long, whatever its compute thread waits for.
_LEAVE_WITHIN_S = 4.0

log = structlog.get_logger()


def run_rank(config: WorkerConfig, run_dir: Path) -> int:
    """Runs rank ``config.rank`` until SIGTERM; returns the process's exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started the group decides when it ends
    signal.signal(signal.SIGTERM, lambda _signal, _frame: sys.exit(0))  # while loading, or waiting for other ranks
    engine_config, engine = make_engine(config, run_dir)
    steps: StepQueue = StepQueue()
    (_run_leader if config.rank == 0 else _run_follower)(config, engine_config, engine, steps)
    engine.close()
    log.info("rank ends", rank=config.rank)
    return 0


def make_engine(config: WorkerConfig, run_dir: Path) -> tuple[EngineConfig, Engine]:
    """The engine that ``--engine`` names, and its configuration with all defaults resolved."""
    device = "cpu"
    if config.engine == "torch":
        from worker_svc.torch_engine.engine import TorchEngine, choose_device

        device = choose_device(config.device)
    on_gpu = device != "cpu"
    max_num_seqs = config.max_num_seqs or (256 if on_gpu else 64)
    max_num_batched_tokens = config.max_num_batched_tokens or max(max_num_seqs, 4096 if on_gpu else 512)
    if max_num_batched_tokens < max_num_seqs:
        raise ConfigError(
            f"--max-num-batched-tokens {max_num_batched_tokens}: less than --max-num-seqs {max_num_seqs},"
            " so a step could not decode every sequence"
        )
    engine_config = EngineConfig(
        model_path=resolve_model(config.model),
        rank=config.rank,
        tp_size=config.tp,
        run_dir=run_dir,
        device=device,
        dtype=config.dtype,
        max_num_seqs=max_num_seqs,
        max_model_len=config.max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_gib=config.kv_cache_gib,
        stub_step_ms=config.stub_step_ms,
    )
    if config.engine == "torch":
        return engine_config, TorchEngine(engine_config)
    from worker_svc.stub.engine import StubEngine

    return engine_config, StubEngine(engine_config)


def _run_leader(config: WorkerConfig, engine_config: EngineConfig, engine: Engine, steps: StepQueue) -> None:
    io = _LeaderIo(config, engine_config.run_dir, steps)
    info = engine.load(io.report_progress)
    num_blocks = io.call(io.agree_on_blocks(info.num_blocks))
    engine.allocate(num_blocks)
    io.call(io.become_ready(_group_info(config, engine_config, info, num_blocks)))
    log.info("group is ready", rank=0, num_blocks=num_blocks, tp_size=config.tp, engine=config.engine)
    _run_until_sigterm(engine, steps, io.post)
    io.call(io.stop())


class _LeaderIo:
    """The I/O thread of the leader, as its compute thread sees it."""

    def __init__(self, config: WorkerConfig, run_dir: Path, steps: StepQueue) -> None:
        self._config = config
        self._loop = uvloop.new_event_loop()
        self._ranks = Ranks(config.tp - 1, self._lose_rank)
        self._group = WorkerGroup(self._ranks, steps)
        self._stopping = False
        self._server: aio.Server | None = None
        self._health: rpc.Health | None = None
        threading.Thread(target=self._loop.run_forever, name="io", daemon=True).start()
        self.call(self._start(run_dir))

    def call(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Runs ``work`` on the I/O thread and waits for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def post(self, result: StepResult) -> None:
        self._loop.call_soon_threadsafe(self._group.put_result, result)

    def report_progress(self, stage: str, progress: float) -> None:
        self._loop.call_soon_threadsafe(self._group.report_progress, stage, progress)

    async def agree_on_blocks(self, num_blocks: int) -> int:
        """The least number of blocks of any rank; tells it to all."""
        smallest = min([num_blocks, *map(to_int, await self._ranks.gather(Kind.LOADED))])
        self._ranks.send_all(Kind.ALLOCATE, smallest)
        return smallest

    async def become_ready(self, info: plan_pb2.GroupInfo) -> None:
        await self._ranks.gather(Kind.READY)
        self._group.set_ready(info)
        assert self._health is not None
        await self._health.set_serving(True)

    async def stop(self) -> None:
        self._stopping = True
        assert self._server is not None
        await self._server.stop(grace=0.5)

    async def _start(self, run_dir: Path) -> None:
        await self._ranks.listen(run_dir / "relay.sock")
        self._server = rpc.make_server()
        self._server.add_generic_rpc_handlers((self._group.handlers(),))
        self._health = await rpc.add_health(self._server, [SERVICE_NAME])
        self._server.add_insecure_port(self._config.listen)
        await self._server.start()
        serve_metrics(self._config.metrics_port)

    def _lose_rank(self, rank: int) -> None:
        if not self._stopping:
            _break_group(f"rank {rank} is gone")


def _run_follower(config: WorkerConfig, engine_config: EngineConfig, engine: Engine, steps: StepQueue) -> None:
    relay = RelayClient(engine_config.run_dir / "relay.sock", config.rank)
    info = engine.load(lambda _stage, _progress: None)
    relay.send(Kind.LOADED, info.num_blocks)
    answer = relay.receive()
    if answer is None or answer[0] is not Kind.ALLOCATE:
        raise GroupError("the leader went away while the group was loading")
    engine.allocate(to_int(answer[1]))
    relay.send(Kind.READY)
    state = BatchState(engine_config.max_num_seqs, info.max_model_len, BLOCK_SIZE)
    threading.Thread(target=_receive_plans, args=(relay, state, steps), name="io", daemon=True).start()
    _run_until_sigterm(engine, steps, lambda _result: None)


def _run_until_sigterm(engine: Engine, steps: StepQueue, report: Callable[[StepResult], None]) -> None:
    """Runs steps; SIGTERM lets the one that runs complete."""
    signal.signal(signal.SIGTERM, lambda _signal, _frame: steps.put(None))
    run_steps(engine, steps, report)


def _receive_plans(relay: RelayClient, state: BatchState, steps: StepQueue) -> None:
    """The I/O thread of a rank that is not the leader."""
    try:
        while (received := relay.receive()) is not None:
            steps.put(prepare(state, decode_plan(received[1])))
    except (GroupError, OSError) as error:
        _break_group(str(error))
    # The leader left: in order when we are told to stop as well, else the compute thread may wait for it for ever.
    steps.put(None)
    time.sleep(_LEAVE_WITHIN_S)
    _break_group("the leader is gone")


def _break_group(reason: str) -> None:
    """Ends this process at once, whatever its compute thread waits for; the group cannot go on."""
    log.error("the group is broken", reason=reason)
    os._exit(1)


def _group_info(
    config: WorkerConfig, engine_config: EngineConfig, info: EngineInfo, num_blocks: int
) -> plan_pb2.GroupInfo:
    return plan_pb2.GroupInfo(
        engine=config.engine,
        device=info.device,
        dtype=info.dtype,
        tp_size=config.tp,
        vocab_size=info.vocab_size,
        eos_token_ids=info.eos_token_ids,
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        max_num_seqs=engine_config.max_num_seqs,
        max_model_len=info.max_model_len,
        max_num_batched_tokens=engine_config.max_num_batched_tokens,
    )
