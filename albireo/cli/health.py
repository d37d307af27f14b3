"""``albireo health``: asks one service once whether it serves; for container engines and orchestrators."""

import argparse
import asyncio
from collections.abc import Sequence

from albireo.cli import client, ready

_DESCRIPTION = """Ask the service at --target whether it serves (grpc.health.v1): a front end, planner, worker group or
KV store. Exit status 0: it does; 1: it does not, or does not answer."""


def run(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="albireo health", description=_DESCRIPTION)
    client.add_server_flags(parser)
    server = client.server_of(parser.parse_args(argv))
    return 0 if asyncio.run(ready.is_serving(server)) else 1
