"""Which engine a rank runs."""

from pathlib import Path

import pytest
from structlog.testing import capture_logs

import albireo_kernels.cpu
from albireo.errors import ConfigError
from albireo_kernels.cpu import NoCompilerError
from worker_svc import rank
from worker_svc.config import WorkerConfig
from worker_svc.engine import Engine
from worker_svc.rank import make_engine


def engine_of(run_dir: Path, **flags: object) -> Engine:
    config = WorkerConfig(**{"tp": 1, "rank": 0, **flags})  # type: ignore[arg-type]
    _, engine = make_engine(config, run_dir, lambda _stage, _progress: None)
    engine.close()
    return engine


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank, "may_have_gpu", lambda: False)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_library(**_: object) -> None:
        raise NoCompilerError("install g++")

    monkeypatch.setattr(albireo_kernels.cpu, "load_library", load_library)


@pytest.mark.usefixtures("no_gpu")
def test_a_cpu_runs_compiled_kernels_unless_asked_not_to(tmp_path: Path) -> None:
    assert engine_of(tmp_path).name == engine_of(tmp_path, device="cpu").name == "compiled"
    assert engine_of(tmp_path, eager=True).name == "eager"
    assert engine_of(tmp_path, engine="stub").name == "stub"


@pytest.mark.usefixtures("no_gpu", "no_compiler")
def test_without_a_compiler_the_eager_engine_runs_and_a_warning_says_so(tmp_path: Path) -> None:
    with capture_logs() as logs:
        assert engine_of(tmp_path).name == "eager"
    (warning,) = [entry for entry in logs if entry["log_level"] == "warning"]
    assert "slower" in warning["event"]
    assert warning["reason"] == "install g++"
    with capture_logs() as logs:
        assert engine_of(tmp_path, eager=True).name == "eager"
    assert not logs


@pytest.mark.usefixtures("no_gpu", "no_compiler")
@pytest.mark.parametrize("flags", [{}, {"eager": True}, {"engine": "stub"}])
def test_what_cannot_be_quantized_is_refused(flags: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--quantize w8a8: "):
        engine_of(tmp_path, quantize="w8a8", **flags)


def test_torch_is_asked_where_there_may_be_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that there is none, or that it cannot be used."""
    monkeypatch.setattr(rank, "may_have_gpu", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert engine_of(tmp_path).name == "compiled"
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        engine_of(tmp_path, device="cuda")
