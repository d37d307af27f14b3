"""One rank's process: an I/O thread that receives and prepares steps, and the compute thread (the main one)."""

import signal
from pathlib import Path

import structlog

from albireo.errors import ConfigError
from albireo.ledger import RANK_COLUMNS, Ledger
from albireo.model_spec import resolve_model
from albireo.placement import may_have_gpu
from albireo.security import load_security
from albireo.tracing import Tracer, open_tracer
from albireo.v1 import plan_pb2
from albireo.watchdog import Watchdog
from worker_svc.config import WorkerConfig
from worker_svc.engine import BLOCK_SIZE, Engine, EngineConfig, EngineInfo, Progress
from worker_svc.follower import Follower
from worker_svc.kv_store import make_kv_store
from worker_svc.leader import Leader
from worker_svc.ledgers import GroupLedgers, ledger_path
from worker_svc.life import Deadlines, Life
from worker_svc.relay import NoLeaderError
from worker_svc.transfers import KvStore

log = structlog.get_logger()


def run_rank(config: WorkerConfig, run_dir: Path, watchdog: Watchdog) -> int:
    """Runs rank ``config.rank`` until SIGTERM; returns the process's exit status."""
    # Of the group only the leader traces: all ranks do the same.
    with open_tracer("rank-0", config.otlp_endpoint if config.rank == 0 else "") as tracer:
        return _run(config, run_dir, watchdog, tracer)


def _run(config: WorkerConfig, run_dir: Path, watchdog: Watchdog, tracer: Tracer | None) -> int:
    deadlines = Deadlines()
    watchdog.start_thread(deadlines.check)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started the group decides when it ends
    ledger = Ledger(f"rank-{config.rank}", RANK_COLUMNS, path=ledger_path(run_dir, config.rank))
    life = Life(watchdog, deadlines, config.step_timeout, ledger)
    role = _make_role(config, run_dir, ledger, tracer)
    engine_config, engine = make_engine(config, run_dir, role.report_progress)
    info = engine.load(role.report_progress)
    log.info("weights are loaded", num_blocks=info.num_blocks)
    store = None
    if config.kv_store:
        store = make_kv_store(config.kv_store, engine_config, info, load_security(config), role.loop)
    try:
        life.run(engine, role, _group_info(engine.name, engine_config, info, config.kv_store, store), store)
    except NoLeaderError as error:
        log.error("this rank ends", error=str(error))
        return 1
    role.close()
    engine.close()
    log.info("this rank ends, as it was asked to")
    return 0


def _make_role(config: WorkerConfig, run_dir: Path, ledger: Ledger, tracer: Tracer | None) -> Leader | Follower:
    """Made before the weights are loaded: a leader tells how far that is, and those that survived the last one wait."""
    relay_path = run_dir / "relay.sock"
    if config.rank == 0:
        ledgers = GroupLedgers(run_dir, config.tp, ledger)
        security = load_security(config)
        return Leader(config.tp, config.listen, relay_path, config.metrics_port, ledgers, security, tracer)
    return Follower(config.rank, relay_path)


def make_engine(config: WorkerConfig, run_dir: Path, report: Progress) -> tuple[EngineConfig, Engine]:
    """The engine that the flags name, and its configuration with all defaults resolved."""
    device = "cpu" if config.engine == "stub" else _choose_device(config.device)
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
        quantize=config.quantize,
        sampler=config.sampler,
        stub_mode=config.stub_mode,
        stub_step_ms=config.stub_step_ms,
        stub_device=config.stub_device,
        stub_model=config.stub_model,
    )
    runs_compiled = config.engine == "torch" and not on_gpu and not config.eager
    if config.quantize != "none" and not runs_compiled:
        raise ConfigError(f"--quantize {config.quantize}: compiled kernels do that, on a CPU and without --eager")
    if config.engine == "stub":
        from worker_svc.stub.engine import StubEngine

        return engine_config, StubEngine(engine_config)
    return engine_config, _compiled_engine(engine_config, report) if runs_compiled else _eager_engine(engine_config)


def _choose_device(wanted: str) -> str:
    """cpu or cuda. Torch, which takes seconds to import, is asked only where there may be a GPU."""
    if wanted == "cpu" or (wanted == "auto" and not may_have_gpu()):
        return "cpu"
    from worker_svc.torch_engine.engine import choose_device

    return choose_device(wanted)


def _compiled_engine(config: EngineConfig, report: Progress) -> Engine:
    """The compiled engine; where its kernels cannot be compiled, the eager one."""
    from albireo_kernels.cpu import NoCompilerError, load_library
    from worker_svc.cpu_engine.engine import CpuEngine

    try:
        return CpuEngine(config, load_library(report=report))
    except NoCompilerError as error:
        if config.quantize != "none":
            raise ConfigError(f"--quantize {config.quantize}: {error}") from error
        log.warning("the model runs op by op in torch, many times slower than compiled kernels", reason=str(error))
        return _eager_engine(config)


def _eager_engine(config: EngineConfig) -> Engine:
    from worker_svc.torch_engine.engine import TorchEngine

    return TorchEngine(config)


def _group_info(
    engine: str, config: EngineConfig, info: EngineInfo, arena: str, store: KvStore | None
) -> plan_pb2.GroupInfo:
    kv_layout = None
    if store is not None:
        kv_layout = plan_pb2.KvLayout(
            fingerprint=store.fingerprint, num_parts=info.kv.num_parts, part_bytes=info.kv.part_bytes, arena=arena
        )
    return plan_pb2.GroupInfo(
        engine=engine,
        device=info.device,
        dtype=info.dtype,
        tp_size=config.tp_size,
        vocab_size=info.vocab_size,
        eos_token_ids=info.eos_token_ids,
        block_size=BLOCK_SIZE,
        num_blocks=info.num_blocks,
        max_num_seqs=config.max_num_seqs,
        max_model_len=info.max_model_len,
        max_num_batched_tokens=config.max_num_batched_tokens,
        kv_layout=kv_layout,
    )
