"""``python -m worker_svc``: one worker group on this host, or one of its ranks (``--rank``).

Exit statuses are those of `albireo.supervise`: 1 asks for a restart, 2 says that it cannot help.
"""

import asyncio
import contextlib
import dataclasses
import sys
import tempfile
from pathlib import Path

import structlog

from albireo.child import Child, Roll, python_module
from albireo.config import parse, to_argv
from albireo.errors import AlbireoError, GroupError
from albireo.logging import set_up_logging
from albireo.placement import choose_tp
from albireo.supervise import supervise
from albireo.watchdog import Watchdog
from worker_svc.config import WorkerConfig


def main(argv: list[str] | None = None) -> int:
    config = parse(WorkerConfig, "python -m worker_svc", "Runs a model on the ranks of one worker group.", argv)
    set_up_logging("worker" if config.rank < 0 else f"rank-{config.rank}", config.log_level)
    try:
        tp = config.tp or choose_tp(config.model, config.engine, config.device)
        config = dataclasses.replace(config, tp=tp)
        if config.rank >= 0:
            watchdog = Watchdog()
            watchdog.start_thread()  # importing takes a while
            from worker_svc.rank import run_rank

            return run_rank(config, Path(config.run_dir), watchdog)
        with contextlib.ExitStack() as stack:
            run_dir = config.run_dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="albireo-group-"))
            return _run_group(dataclasses.replace(config, run_dir=run_dir))
    except AlbireoError as error:
        structlog.get_logger().error("worker ends", error=str(error), kind=type(error).__name__)
        return 1 if isinstance(error, GroupError) else 2


def _run_group(config: WorkerConfig) -> int:
    logs = Path(config.run_dir) / "logs"
    logs.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    logs.mkdir(exist_ok=True)
    ranks = [dataclasses.replace(config, rank=rank) for rank in range(config.tp)]
    names = [field.name for field in dataclasses.fields(WorkerConfig)]
    children = [
        Child(
            f"rank-{rank.rank}",
            [*python_module("worker_svc"), *to_argv(rank, *names)],
            logs / f"rank-{rank.rank}.log",
            roll=Roll.KEEP,  # no rank goes on without the others
        )
        for rank in ranks
    ]
    return asyncio.run(supervise(children))


if __name__ == "__main__":
    sys.exit(main())
