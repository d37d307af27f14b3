"""The planner's process."""

import asyncio
import functools
import socket

import structlog
import uvloop

from albireo import rpc
from albireo.allowances import Allowances, load_allowances
from albireo.config import parse
from albireo.errors import AlbireoError, ConfigError
from albireo.kv.flags import load_secret
from albireo.logging import set_up_logging
from albireo.metrics import serve_metrics
from albireo.security import Security, load_security
from albireo.stopping import run_until_stopped
from albireo.tracing import Tracer, open_tracer
from albireo.v1 import frontend_pb2_grpc, ledger_pb2_grpc, plan_pb2
from albireo.watchdog import Watchdog
from scheduler_svc.planner.config import PlannerConfig
from scheduler_svc.planner.frontends import SERVICE_NAME
from scheduler_svc.planner.group import GroupLink
from scheduler_svc.planner.ledger import SERVICE_NAME as LEDGER_NAME
from scheduler_svc.planner.ledger import LedgerServicer
from scheduler_svc.planner.service import Planner
from scheduler_svc.planner.state import Limits
from scheduler_svc.planner.swap_policy import SwapMode

log = structlog.get_logger()


def main(argv: list[str] | None, watchdog: Watchdog) -> int:
    """Runs the planner until SIGTERM; its front ends keep what runs and go on with its successor.

    Exit status: 0 asked to stop, 1 failed while running, 2 the configuration does not work.
    """
    config = parse(PlannerConfig, "python -m scheduler_svc planner", "Schedules sequences on one worker group.", argv)
    set_up_logging("planner", config.log_level)
    try:
        with open_tracer("planner", config.otlp_endpoint) as tracer:
            if uvloop.run(run_until_stopped(_serve(config, load_security(config), watchdog, tracer))):
                log.info("planner ends")
    except AlbireoError as error:
        log.error("planner ends", error=str(error), kind=type(error).__name__)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


async def _serve(config: PlannerConfig, security: Security, watchdog: Watchdog, tracer: Tracer | None) -> None:
    beating = asyncio.create_task(watchdog.keep_beating())
    group = GroupLink(config.group, security)
    server = rpc.make_server(for_peers=True, security=security)
    try:
        status = await group.wait_until_ready()
        limits_of = functools.partial(_limits, config, load_allowances(config), load_secret(config))
        planner = Planner(group, status, limits_of, config.recovery_timeout, config.max_itl_ms / 1e3, tracer)
        if config.kv_store:
            name = f"{socket.gethostname()} {config.planner}"
            planner.use_store(config.kv_store, name, SwapMode(config.swap), security)
        frontend_pb2_grpc.add_PlannerServicer_to_server(planner.frontends, server)  # type: ignore[arg-type]  # async
        ledger_pb2_grpc.add_LedgerServicer_to_server(LedgerServicer(planner.timeline, group), server)
        health = await rpc.add_health(server, [SERVICE_NAME, LEDGER_NAME])
        rpc.listen(server, config.planner, security)
        serve_metrics(config.metrics_port, security)
        await server.start()
        log.info("planner is ready", group=config.group, listen=config.planner, depth=config.depth)
        watchdog.ready()
        await planner.run(health)
    finally:
        beating.cancel()
        await server.stop(grace=0.2)
        await group.close()


def _limits(config: PlannerConfig, allowances: Allowances, kv_secret: bytes, info: plan_pb2.GroupInfo) -> Limits:
    return Limits(
        block_size=info.block_size,
        num_blocks=info.num_blocks,
        max_num_seqs=info.max_num_seqs,
        max_model_len=info.max_model_len,
        max_num_batched_tokens=min(
            config.max_num_batched_tokens or info.max_num_batched_tokens, info.max_num_batched_tokens
        ),
        vocab_size=info.vocab_size,
        eos_token_ids=frozenset(each for each in info.eos_token_ids if each < info.vocab_size),
        depth=config.depth,
        max_waiting=config.max_waiting,
        caches_prefixes=config.prefix_cache == "on",
        allowances=allowances,
        kv_secret=kv_secret,
    )
