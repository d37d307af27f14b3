"""The cache of compiled libraries: built once, named by what they are made of, with errors that can be acted upon."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from albireo_kernels.cpu import Isa, Library, NoCompilerError, build, detect_isa, library_path
from albireo_kernels.cpu import library as library_module

# Notes each compilation, and "compiles" in a moment.
_FAKE_COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then echo "fake 1.0"; exit; fi
echo "$@" >> "$(dirname "$0")/calls"
sleep 0.2
while [ $# -gt 0 ]; do [ "$1" = -o ] && echo built > "$2"; shift; done
"""
_AVX2 = {"avx2", "fma", "f16c"}
_AVX512 = {*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni"}
_AMX = {*_AVX512, "amx_tile", "amx_bf16", "amx_int8"}


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake compiler and an empty cache."""
    path = tmp_path / "compiler" / "fake++"
    path.parent.mkdir()
    path.write_text(_FAKE_COMPILER)
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    monkeypatch.setenv("ALBIREO_CACHE_DIR", str(tmp_path / "cache"))
    return path


def calls(compiler: Path) -> list[str]:
    noted = compiler.parent / "calls"
    return noted.read_text().splitlines() if noted.exists() else []


def test_a_library_is_compiled_once_and_tells_so(compiler: Path) -> None:
    told: list[tuple[str, float]] = []
    path = library_path(Isa.AVX2, report=lambda text, fraction: told.append((text, fraction)))
    assert library_path(Isa.AVX2, report=lambda text, fraction: told.append((text, fraction))) == path
    assert path.read_text() == "built\n"
    assert len(calls(compiler)) == 1
    assert told == [("compiling kernels (avx2)", 0.0), ("compiling kernels (avx2)", 1.0)]


def test_what_a_library_is_made_of_is_in_its_name(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "src"
    shutil.copytree(build.SOURCES, sources)
    monkeypatch.setattr(build, "SOURCES", sources)
    paths = [
        library_path(Isa.PORTABLE),
        library_path(Isa.AVX2),
        library_path(Isa.AVX512),
        library_path(Isa.AVX512, emulate=True),
        library_path(Isa.AVX2, sanitize="address"),
        library_path(Isa.AVX2, sanitize="thread"),
    ]
    (sources / "vector.h").write_text("// something else")
    paths.append(library_path(Isa.AVX2))
    compiler.write_text(_FAKE_COMPILER.replace("1.0", "1.1"))
    paths.append(library_path(Isa.AVX2))
    assert len(set(paths)) == len(paths)


def test_processes_that_start_together_build_once(compiler: Path) -> None:
    code = "from albireo_kernels.cpu import *; print(library_path(Isa.AVX2))"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert len(paths) == 1
    assert Path(paths.pop()).exists()
    assert len(calls(compiler)) == 1


def test_what_the_compiler_says_is_in_the_error(compiler: Path) -> None:
    compiler.write_text("#!/bin/sh\n[ $1 = --version ] && exit\necho 'no such header' >&2\nexit 1\n")
    with pytest.raises(NoCompilerError, match="no such header"):
        library_path(Isa.PORTABLE)
    assert not list(Path(os.environ["ALBIREO_CACHE_DIR"]).glob("*.so"))


def test_without_a_compiler_the_error_says_what_to_install(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(NoCompilerError, match="CXX=/nowhere/c"):
        library_path(Isa.PORTABLE)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(compiler.parent))
    with pytest.raises(NoCompilerError, match=r"install g\+\+"):
        library_path(Isa.PORTABLE)


@pytest.mark.usefixtures("compiler")
def test_a_cache_that_cannot_be_written_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("ALBIREO_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    directory = library_path(Isa.PORTABLE).parent
    assert directory == tmp_path / "tmp" / f"albireo-{os.getuid()}"
    assert directory.stat().st_mode & 0o077 == 0
    directory.chmod(0o777)  # somebody else could put a library there
    assert library_path(Isa.PORTABLE).parent != directory


@pytest.mark.usefixtures("compiler")
def test_the_cache_lies_where_the_system_keeps_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALBIREO_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert library_path(Isa.PORTABLE).parent == tmp_path / "xdg" / "albireo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert library_path(Isa.PORTABLE).parent == tmp_path / "home" / ".cache" / "albireo"


@pytest.mark.parametrize(
    ("features", "machine", "expected"),
    [
        (set(), "x86_64", Isa.PORTABLE),
        ({"avx2", "fma"}, "x86_64", Isa.PORTABLE),
        (_AVX2, "x86_64", Isa.AVX2),
        (_AVX512 - {"avx512_bf16"}, "x86_64", Isa.AVX2),
        (_AVX512, "x86_64", Isa.AVX512),
        (_AMX - {"amx_int8"}, "x86_64", Isa.AVX512),
        (_AMX, "x86_64", Isa.AMX),
        (_AMX - {"fma"}, "x86_64", Isa.PORTABLE),
        (_AMX, "aarch64", Isa.PORTABLE),
    ],
)
def test_the_highest_level_that_the_processor_has_is_found(
    features: set[str], machine: str, expected: Isa, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(build, "_cpu_features", lambda *_fields: features)
    assert detect_isa() is expected


def test_a_system_that_refuses_tiles_gets_the_level_below(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def __init__(self, isa: Isa) -> None:
            self.isa = isa

        def allow(self) -> bool:
            return False

    monkeypatch.setattr(library_module, "library_path", lambda isa, **_options: isa)
    monkeypatch.setattr(library_module, "_open", Refusing)
    assert library_module.load_library(Isa.AMX).isa is Isa.AVX512


def test_each_library_is_of_its_level_and_shows_only_its_interface(library: Library) -> None:
    shown = subprocess.run(["nm", "-D", "--defined-only", library.path], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in shown.stdout.splitlines()]
    assert names
    assert all(name.startswith("albireo_") for name in names)
    assert library.isa.name.lower() in library.path.name
    assert library.allow()


@pytest.mark.parametrize("isa", list(Isa), ids=lambda isa: isa.name.lower())
def test_every_level_compiles_where_it_cannot_run(isa: Isa) -> None:
    assert library_path(isa).exists()


def test_a_library_of_another_interface_is_refused(native: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_module, "ABI", library_module.ABI + 1)
    with pytest.raises(NoCompilerError, match=f"interface {library_module.ABI - 1}"):
        Library(native.path)
