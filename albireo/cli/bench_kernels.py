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
    status, _ = _start(argv)
    return status


def measure_rates(*flags: str) -> dict[str, Any]:
    """The report of ``--rates-only``, with further flags: what this machine reads and multiplies.

    Raises ConfigError when it cannot be measured; the child has said why.
    """
    status, output = _start(["--rates-only", "--json", "-", *flags], subprocess.PIPE)
    if status != 0:
        raise ConfigError("what this machine can do could not be measured")
    report: dict[str, Any] = json.loads(output)
    return report


def _start(argv: Sequence[str], stdout: int | None = None) -> tuple[int, bytes]:
    for module in _NEEDED:
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"{module} is not installed: the kernels need albireo's extra `worker`")
    child = subprocess.run([*python_module(_MODULE), *argv], stdout=stdout, check=False)
    if child.returncode < 0:
        raise GroupError(f"{_MODULE} was killed by {signal.Signals(-child.returncode).name}")
    return child.returncode, child.stdout or b""
