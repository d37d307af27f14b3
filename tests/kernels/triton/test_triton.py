"""The Triton kernels without a GPU: against the oracle in Triton's interpreter, and compiled for GPUs.

Both run in processes of their own: the interpreter must be chosen before triton is imported, and for all kernels.
"""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TESTS = HERE.parent.parent

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is for Linux only")


def run(script: str, **environ: str) -> dict[str, str | None]:
    """What went wrong, by check."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", HERE / script],
        env={**os.environ, "PYTHONPATH": str(TESTS), **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    return {report["name"]: report["error"] for report in reports}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    return run("interpreted.py")


CHECKS = re.findall(r"^def (check_\w+)", (HERE / "interpreted.py").read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", CHECKS)
def test_interpreted(name: str, interpreted: dict[str, str | None]) -> None:
    assert interpreted[name] is None, interpreted[name]


def test_every_kernel_compiles_for_gpus_of_three_generations() -> None:
    """To machine code, by the ptxas that triton brings."""
    errors = run("compiled.py", TRITON_INTERPRET="0")
    assert len(errors) > 3 * 10
    assert {name: error for name, error in errors.items() if error} == {}


def test_without_triton_nothing_else_breaks(tmp_path: Path) -> None:
    """The oracle, the CPU's kernels and the worker are importable, this package is not."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import albireo_kernels.reference, albireo_kernels.cpu, worker_svc.__main__, worker_svc.torch_engine.engine\n"
        "try:\n    import albireo_kernels.triton.draw\n"
        "except ImportError: pass\n"
        "else: raise SystemExit('imported')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_the_benchmark_says_that_there_is_no_gpu() -> None:
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-m", "albireo_kernels.triton.bench"], env=environ, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "no GPU" in result.stderr
