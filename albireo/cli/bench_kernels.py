"""``albireo bench kernels``: starts ``python -m albireo_kernels.bench``, which this package must not import."""

import importlib.util
import json
import signal
import subprocess
from collections.abc import Sequence
from typing import Any

from albireo.child import python_module
from albireo.errors import ConfigError, GroupError

_MODULE = "albireo_kernels.bench"
_NEEDED = ("albireo_kernels", "ml_dtypes")


def run(argv: Sequence[str]) -> int:
    """Passes the arguments on, and returns the child's exit status."""
    status, _ = start(_MODULE, argv)
    return status


def measure_rates(*flags: str) -> dict[str, Any]:
    """The report of ``--rates-only``, with further flags: what this machine reads and multiplies.

    Raises ConfigError when it cannot be measured; the child has said why.
    """
    status, output = start(_MODULE, ["--rates-only", "--json", "-", *flags], subprocess.PIPE)
    if status != 0:
        raise ConfigError("what this machine can do could not be measured")
    report: dict[str, Any] = json.loads(output)
    return report


def start(module: str, argv: Sequence[str], stdout: int | None = None) -> tuple[int, bytes]:
    """Runs a module that measures kernels; its exit status, and what it wrote to ``stdout`` if that is a pipe.

    Raises ConfigError where the kernels cannot run, GroupError when the child was killed.
    """
    for needed in _NEEDED:
        if importlib.util.find_spec(needed) is None:
            raise ConfigError(f"{needed} is not installed: the kernels need albireo's extra `worker`")
    child = subprocess.run([*python_module(module), *argv], stdout=stdout, check=False)
    if child.returncode < 0:
        raise GroupError(f"{module} was killed by {signal.Signals(-child.returncode).name}")
    return child.returncode, child.stdout or b""
