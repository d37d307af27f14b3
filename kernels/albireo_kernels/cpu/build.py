"""Compiles the kernels when they are first used: one shared library for each instruction set, kept in a cache.

A library is named by what it is made of (sources, compiler, flags), so an update never meets an old one, and processes
that start at the same time build it once.
"""

import fcntl
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Literal

from albireo.errors import ConfigError

Progress = Callable[[str, float], None]  # what is being done, and which fraction of it is done
Sanitizer = Literal["address", "thread"]  # address includes undefined behaviour

SOURCES = Path(__file__).parent / "src"

_log = logging.getLogger(__name__)


class NoCompilerError(ConfigError):
    """There is no C++ compiler, or it cannot compile the kernels."""


class Isa(IntEnum):
    """Instruction sets, in ascending order (AlbireoIsa)."""

    PORTABLE = 0
    AVX2 = 1
    AVX512 = 2
    AMX = 3


_X86_FEATURES = {
    Isa.AVX2: {"avx2", "fma", "f16c"},
    Isa.AVX512: {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni"},
    Isa.AMX: {"amx_tile", "amx_bf16", "amx_int8"},
}
_AVX2_FLAGS = ["-march=x86-64-v3"]
_AVX512_FLAGS = ["-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni", "-mprefer-vector-width=512"]
_X86_FLAGS: dict[Isa, list[str]] = {
    Isa.PORTABLE: [],
    Isa.AVX2: _AVX2_FLAGS,
    Isa.AVX512: _AVX512_FLAGS,
    Isa.AMX: [*_AVX512_FLAGS, "-mamx-tile", "-mamx-bf16", "-mamx-int8"],
}
_SANITIZER_FLAGS: dict[Sanitizer, list[str]] = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
_OPTIMIZED, _DEBUGGED = ["-O3"], ["-O1", "-g", "-fno-omit-frame-pointer"]


def detect_isa() -> Isa:
    """The highest instruction set of this machine; PORTABLE where that cannot be told."""
    if platform.machine() not in {"x86_64", "AMD64"}:
        return Isa.PORTABLE
    available, best = _cpu_features("flags"), Isa.PORTABLE
    for isa, needed in _X86_FEATURES.items():
        if not needed <= available:
            break
        best = isa
    return best


def library_path(
    isa: Isa, *, sanitize: Sanitizer | None = None, emulate: bool = False, report: Progress | None = None
) -> Path:
    """The shared library of an instruction set, compiled if the cache does not have it.

    Args:
        sanitize: builds in these checks, at a fraction of the speed; a program that loads it must be built with them.
        emulate: takes plain code in place of the instructions that AVX2 lacks, so that the level runs anywhere.
        report: told before and after compiling.
    Raises:
        NoCompilerError: with what the compiler said.
    """
    exports = f"-Wl,--version-script={SOURCES / 'exports.map'}"
    command = [*_compiler(), *_common_flags(sanitize), "-shared", "-fPIC", *_isa_flags(isa, emulate), exports]
    name = f"{isa.name.lower()}{'-emulated' if emulate else ''}{f'-{sanitize}' if sanitize else ''}"
    directory = _cache_directory()
    path = directory / f"albireo-{name}-{_digest(command)}.so"
    if path.exists():
        return path
    with (directory / f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _tell(f"compiling kernels ({name})", 0.0, report)
            _compile(command, [SOURCES / "albireo.cpp"], path)
            _tell(f"compiling kernels ({name})", 1.0, report)
    return path


def build_program(source: Path, library: Path, target: Path, sanitize: Sanitizer | None = None) -> None:
    """Compiles a program that is linked with a library of `library_path`, for tests.

    Raises:
        NoCompilerError: with what the compiler said.
    """
    command = [*_compiler(), *_common_flags(sanitize), f"-I{SOURCES}"]
    _compile(command, [source, library], target, [f"-Wl,-rpath,{library.parent}"])


def _tell(text: str, fraction: float, report: Progress | None) -> None:
    if report is not None:
        report(text, fraction)
    elif fraction == 0:
        _log.info(text)


def _compiler() -> list[str]:
    chosen = os.environ.get("CXX")
    if chosen:
        program, *arguments = shlex.split(chosen)
        found = shutil.which(program)
        if found is None:
            raise NoCompilerError(f"CXX={chosen}: no such program")
        return [found, *arguments]
    for program in ("g++", "clang++", "c++"):
        found = shutil.which(program)
        if found is not None:
            return [found]
    raise NoCompilerError("the CPU kernels need a C++ compiler: install g++ or clang++, or name one in CXX")


def _common_flags(sanitize: Sanitizer | None) -> list[str]:
    speed = _OPTIMIZED if sanitize is None else [*_DEBUGGED, *_SANITIZER_FLAGS[sanitize]]
    return ["-std=c++20", *speed, "-pthread", "-Wall", "-Wextra", "-Wno-psabi"]


def _isa_flags(isa: Isa, emulate: bool) -> list[str]:
    number = f"-DALBIREO_ISA={int(isa)}"
    if platform.machine() not in {"x86_64", "AMD64"}:
        return [number, "-march=native"]
    return [number, *(_AVX2_FLAGS if emulate else _X86_FLAGS[isa])]


def _digest(command: list[str]) -> str:
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(f"{source.name}\0".encode() + source.read_bytes() + b"\0")
    version = subprocess.run([command[0], "--version"], capture_output=True, check=False).stdout
    digest.update(version + "\0".join(command).encode())
    if "-march=native" in command:
        digest.update(repr(sorted(_cpu_features("Features", "CPU part"))).encode())
    return digest.hexdigest()[:16]


def _compile(command: list[str], inputs: list[Path], target: Path, link_flags: list[str] | None = None) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as directory:
        built = Path(directory) / target.name
        arguments = [*command, *map(str, inputs), "-o", str(built), *(link_flags or [])]
        result = subprocess.run(arguments, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise NoCompilerError(f"{shlex.join(arguments)} failed:\n{result.stderr[-4000:]}")
        os.replace(built, target)


def _cache_directory() -> Path:
    """The first candidate that can be written."""
    chosen, shared = os.environ.get("ALBIREO_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    preferred = Path(chosen) if chosen else (Path(shared) if shared else Path("~/.cache").expanduser()) / "albireo"
    try:
        preferred.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=preferred):
            return preferred
    except OSError:
        return _temporary_cache_directory()


def _temporary_cache_directory() -> Path:
    """A directory of this user alone: nobody else may put a library there."""
    directory = Path(tempfile.gettempdir()) / f"albireo-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.lstat()
    if directory.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o077:
        return Path(tempfile.mkdtemp(prefix="albireo-"))
    return directory


def _cpu_features(*fields: str) -> set[str]:
    """The words of these fields of the first processor in /proc/cpuinfo."""
    try:
        first_processor = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split("\n\n")[0]
    except OSError:
        return set()
    pairs = [line.partition(":") for line in first_processor.splitlines()]
    return {word for name, _, value in pairs if name.strip() in fields for word in value.split()}
