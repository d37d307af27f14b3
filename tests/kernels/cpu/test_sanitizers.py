"""Address, undefined-behaviour and thread sanitizers have nothing to say about a decoder on two ranks (driver.cpp)."""

import os
import subprocess
from pathlib import Path

import pytest

from albireo_kernels.cpu import Isa, NoCompilerError, detect_isa, library_path
from albireo_kernels.cpu.build import Sanitizer, build_program

DRIVER = Path(__file__).parent / "driver.cpp"


def run_driver(directory: Path, isa: Isa, emulate: bool, sanitize: Sanitizer) -> None:
    program = directory / "driver"
    try:
        library = library_path(isa, emulate=emulate, sanitize=sanitize)
        build_program(DRIVER, library, program, sanitize)
    except NoCompilerError as error:
        pytest.fail(f"sanitizers (libasan, libubsan, libtsan) come with g++ and must be installed: {error}")
    # Thread sanitizers of gcc 12 know no address space that is laid out as randomly as Linux 6.6 does.
    command = ["setarch", "-R", str(program)] if sanitize == "thread" else [str(program)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=os.environ)
    assert (result.returncode, result.stdout, result.stderr) == (0, "ok\n", "")


def emulated(isa: Isa) -> bool:
    return detect_isa() < isa


@pytest.mark.parametrize("isa", [Isa.AVX2, pytest.param(Isa.AMX, marks=pytest.mark.soak)])
def test_addresses_and_behaviour_are_defined(tmp_path: Path, isa: Isa) -> None:
    run_driver(tmp_path, isa, emulated(isa), "address")


def test_threads_do_not_race(tmp_path: Path) -> None:
    run_driver(tmp_path, Isa.AVX2, False, "thread")
