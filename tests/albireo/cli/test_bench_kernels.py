"""``albireo bench kernels``: a child process, whose flags and status are passed on."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from albireo.cli import bench_kernels
from albireo.cli.main import main
from albireo.errors import ConfigError


def test_a_quick_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    assert main(["bench", "kernels", "--quick", "--rows", "1", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert len(report["rows"]) > 20
    out = capfd.readouterr().out
    assert all(word in out for word in ("GB/s", "share, %", "attention"))


def test_its_flags_and_status(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--help"]) == 0
    assert "--rates-only" in capfd.readouterr().out
    assert main(["bench", "kernels", "--rows", "many"]) == 2
    assert "--rows many" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    assert "kernels" in capfd.readouterr().out


def test_rates() -> None:
    report = bench_kernels.measure_rates("--quick")
    assert report["rates"]["all_threads"]["read_gb_s"]["best"] > 0
    with pytest.raises(ConfigError, match="could not be measured"):
        bench_kernels.measure_rates("--threads", "0")


def test_a_child_that_is_killed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As by an instruction that the processor lacks."""
    monkeypatch.setattr(
        subprocess, "run", lambda argv, **_: subprocess.CompletedProcess(argv, -signal.SIGILL, stdout=None)
    )
    assert main(["bench", "kernels"]) == 1
    assert "SIGILL" in capsys.readouterr().err


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def find_spec(name: str) -> Any:
        return None if name == "ml_dtypes" else object()

    monkeypatch.setattr("importlib.util.find_spec", find_spec)
    assert main(["bench", "kernels"]) == 2
    err = capsys.readouterr().err
    assert "ml_dtypes" in err
    assert "extra `worker`" in err
