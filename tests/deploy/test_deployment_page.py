"""docs/deployment.md: its commands and flags are those of what they start, its numbers follow from the shapes."""

import argparse
import dataclasses
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from smg.launch_router import parse_router_args
from smg.router_args import RouterArgs

from albireo.cli.client import add_server_flags
from albireo.cli.gateway import GatewayConfig
from albireo.cli.serve import ServeConfig, parse_config
from albireo.config import from_namespace, parser_for
from albireo.kv.fingerprint import Namespace
from kvstore_svc.config import StoreConfig
from scheduler_svc.__main__ import SchedulerConfig
from scheduler_svc.frontend.config import FrontendConfig
from scheduler_svc.planner.config import PlannerConfig
from worker_svc.config import WorkerConfig
from worker_svc.kv_parts import cut_blocks

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "deployment.md").read_text()
CONFIGS = {
    "python -m scheduler_svc planner": PlannerConfig,
    "python -m scheduler_svc frontend": FrontendConfig,
    "python -m scheduler_svc": SchedulerConfig,
    "python -m worker_svc": WorkerConfig,
    "python -m kvstore_svc": StoreConfig,
    "python -m albireo.cli.gateway": GatewayConfig,
}
# Of programs that are not Python.
OTHERS = {
    "--build",
    "--detach",
    "--scale",
    "--project-name",
    "--maxmemory",
    "--maxmemory-policy",
    "--save",
    "--appendonly",
}
BLOCK_SIZE, BFLOAT16_BYTES = 32, 2
SEGMENT_BYTES, NODE_GIB = 64 << 20, 56


def config_parser(config_class: type) -> Callable[[list[str]], Any]:
    return lambda argv: from_namespace(config_class, parser_for(config_class, "", "").parse_args(argv))


def server_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_server_flags(parser)
    return parser


def commands() -> list[str]:
    """One line each."""
    blocks = re.findall(r"(?:^    .*\n)+", PAGE, re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines]


PARSERS = {
    **{prefix: config_parser(config_class) for prefix, config_class in CONFIGS.items()},
    "albireo serve": parse_config,
    "albireo health": lambda argv: server_parser().parse_args(argv),
    "smg launch": parse_router_args,
    "docker compose -f deploy/compose.yaml": None,
    "MODEL=": None,
    "redis-server": None,
}


@pytest.mark.parametrize("command", commands())
def test_commands_are_understood(command: str) -> None:
    """An unknown flag would end this with SystemExit."""
    prefix = next(prefix for prefix in PARSERS if command.startswith(prefix))
    parse = PARSERS[prefix]
    if parse is not None:
        assert parse(shlex.split(command.removeprefix(prefix)))


def test_flags_exist() -> None:
    """Those that stand in sentences and tables as well."""
    fields = [field.name for config in (*CONFIGS.values(), ServeConfig) for field in dataclasses.fields(config)]
    smg = argparse.ArgumentParser()
    RouterArgs.add_cli_args(smg, use_router_prefix=False)
    known = {"--" + name.replace("_", "-") for name in fields} | OTHERS
    known |= {*smg._option_string_actions, *server_parser()._option_string_actions}
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE)) - {"--redis-"}
    assert len(used) > 30
    assert used <= known


def test_variables_are_those_of_the_compose_file() -> None:
    compose = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", (ROOT / "deploy" / "compose.yaml").read_text()))
    table = PAGE.split("| variable |")[1].split("\n\n")[0]
    told = dict(re.findall(r"^\| `(\w+)` \| `?([^`|, ]+)", table, re.MULTILINE))
    assert told == compose


def rows(heading: str) -> list[list[str]]:
    table = PAGE.split(heading)[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_sizes_follow_from_the_shapes() -> None:
    sizes = rows("| model | layers x KV heads x head size")
    for _, shape, token, block, parts, in_redis, in_arena, per_gib in sizes:
        layers, heads, head_size = map(int, shape.split(" x "))
        head_bytes = 2 * BLOCK_SIZE * head_size * BFLOAT16_BYTES
        cut = cut_blocks("", layers, heads, head_bytes, range(heads), writes=True)
        frame_bytes = Namespace(bytes(32), cut.num_parts, cut.part_bytes).frame_bytes
        assert token == f"{layers * heads * head_bytes // BLOCK_SIZE / 1024:g} KiB"
        assert block == f"{layers * heads * head_bytes / 2**20:g} MiB"
        assert parts == f"{cut.num_parts} x {cut.part_bytes / 1024:g} KiB"
        assert int(in_arena) == 2**30 // SEGMENT_BYTES * (SEGMENT_BYTES // frame_bytes) * BLOCK_SIZE
        assert int(per_gib) == pytest.approx(1024 / float(in_redis.split()[0]) * BLOCK_SIZE, rel=2e-3)
    for tokens, *cells in rows("| tokens to remember |"):
        for cell, size in zip(cells, sizes, strict=True):
            gib = int(tokens.replace(",", "")) / int(size[-1])
            num_nodes = math.ceil(gib / NODE_GIB)
            assert cell == f"{math.ceil(gib)} GiB, {num_nodes} node{'s' * (num_nodes > 1)}"
