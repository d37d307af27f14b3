"""The ``albireo`` command: picks the subcommand, turns errors into one line and an exit status.

Exit status: 0 done · 1 a request was refused, or a service died again and again · 2 wrong usage, configuration or model
· 130 Ctrl-C (the second one, for `serve`). What starts `albireo serve` again should do so for 1 only.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

import albireo
from albireo.cli import bench, generate, health, serve, trace
from albireo.cli.client import CallFailed
from albireo.errors import AlbireoError, GroupError

# Each takes the arguments after its name and returns the exit status.
_COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "serve": (serve.run, "serve a model on this machine"),
    "generate": (generate.run, "complete a prompt, or a file of prompts, on a running server"),
    "bench": (bench.run, "measure a running server, or this host"),
    "health": (health.run, "ask one service whether it serves"),
    "trace": (trace.run, "write a picture of a running server's latest steps"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns the exit status of the process."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Only what comes before the subcommand is parsed here: each subcommand has a parser of its own.
    command: str = _parser().parse_args(arguments[:1]).command
    run, _ = _COMMANDS[command]
    try:
        return run(arguments[1:])
    except (CallFailed, GroupError) as error:
        return _complain(error, 1)
    except AlbireoError as error:
        return _complain(error, 2)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of stdout is gone (`| head`); what is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _complain(error: AlbireoError, status: int) -> int:
    print(f"albireo: {error}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    commands = "\n".join(f"  {name:10}{what}" for name, (_, what) in _COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="albireo",
        usage="albireo [-h] [--version] COMMAND ...",
        description="Serve large language models over gRPC.",
        epilog=f"commands:\n{commands}\n\n`albireo COMMAND --help` shows the flags of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"albireo {albireo.__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=list(_COMMANDS), help="what to do")
    return parser
