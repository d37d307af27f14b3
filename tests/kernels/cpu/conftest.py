"""The libraries of all levels that run on this machine; of those that do not, with plain code for what is missing."""

import platform
from collections.abc import Iterator

import pytest

from albireo_kernels.cpu import Isa, Library, detect_isa, load_library
from cpu_kernels import DEVICES


def _levels() -> list[tuple[Isa, bool]]:
    """Levels and whether they are emulated."""
    best = detect_isa()
    if best is Isa.PORTABLE:
        return [(Isa.PORTABLE, False)]
    levels = [(Isa.PORTABLE, False), (Isa.AVX2, False), (Isa.AVX512, True), (Isa.AMX, True)]
    return levels + [(isa, False) for isa in (Isa.AVX512, Isa.AMX) if isa <= best]


def _name(level: tuple[Isa, bool]) -> str:
    isa, is_emulated = level
    return isa.name.lower() + ("-emulated" if is_emulated else "")


@pytest.fixture(scope="session", params=_levels(), ids=_name)
def library(request: pytest.FixtureRequest) -> Library:
    isa, is_emulated = request.param
    return load_library(isa, emulate=is_emulated)


@pytest.fixture(scope="session", params=[1, 2, 3], ids=lambda count: f"threads{count}")
def num_threads(request: pytest.FixtureRequest) -> int:
    count: int = request.param
    return count


@pytest.fixture(scope="session")
def native() -> Library:
    """The machine's own level."""
    return load_library()


@pytest.fixture(scope="session", autouse=True)
def _devices() -> Iterator[None]:
    assert platform.system() == "Linux", "compiled kernels are for Linux"
    yield
    DEVICES.close()
