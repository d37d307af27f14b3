"""`albireo bench kv` runs against a store of its own, and reports every path, direction and size."""

import json
from pathlib import Path

import pytest

from albireo.cli.main import main

PNG = b"\x89PNG"


def test_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    report, picture = tmp_path / "kv.json", tmp_path / "kv.png"
    assert main(["bench", "kv", "--reps", "2", "--json", str(report), "--plot", str(picture)]) == 0
    rows = json.loads(report.read_text())["rows"]
    settings = {(row["path"], row["direction"], row["part_bytes"]) for row in rows}
    sizes = [64 << 10, 256 << 10, 1 << 20, 4 << 20]
    assert settings == {(path, way, size) for path in ("shm", "remote") for way in ("out", "in") for size in sizes}
    assert all(row["mb_s"] > 0 and row["p99_ms"] >= row["p50_ms"] > 0 for row in rows)
    assert picture.read_bytes().startswith(PNG)
    assert "memcpy" in capsys.readouterr().out


def test_too_few_calls_are_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["bench", "kv", "--reps", "1"])
    assert "--reps: at least 2" in capsys.readouterr().err
