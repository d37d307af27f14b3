"""``albireo bench api``: its arithmetic, and a short run of the real services with every API."""

import json
from pathlib import Path

import pytest

from albireo.cli import bench_api
from albireo.cli.main import main

PER_REQUEST_US = {"gateway": 500.0, "frontend-0": 1000.0, "planner": 300.0, "rank-0": 9.0}
PER_TOKEN_US = {"gateway": 10.0, "frontend-0": 40.0, "planner": 5.0, "rank-0": 9.0}


def costs(factor: float) -> bench_api.Costs:
    """On a line each, with and without a gateway."""
    of_lengths = {
        length: {name: factor * (PER_REQUEST_US[name] + length * PER_TOKEN_US[name]) for name in PER_REQUEST_US}
        for length in (8, 64, 256)
    }
    return {"native": of_lengths, "http": of_lengths}


def test_a_line_tells_a_request_from_its_tokens() -> None:
    assert bench_api.fit({8: 1320, 64: 3560, 256: 11240}) == pytest.approx((1000, 40))
    per_request, per_token = bench_api.fit({8: 1320, 64: 3560, 256: 1.05 * 11240})
    assert (per_request, per_token) == pytest.approx((1000, 40), rel=0.06), "errors count by the cost that they are of"


def test_rows_are_medians_of_each_process_and_of_all_that_a_request_passes() -> None:
    rows = {(row["path"], row["process"]): row for row in bench_api.rows([costs(1), costs(3), costs(1.5)])}
    assert list(rows) == [
        *[("native", name) for name in ("frontend-0", "planner", "all")],
        *[("http", name) for name in ("gateway", "frontend-0", "planner", "all")],
    ]
    native, http = rows["native", "all"], rows["http", "all"]
    assert (native["us_per_request"], native["us_per_token"]) == pytest.approx((1950, 67.5))
    assert (http["us_per_request"], http["us_per_token"]) == pytest.approx((2700, 82.5))
    assert rows["native", "planner"]["us_by_num_tokens"] == pytest.approx({8: 510, 64: 930, 256: 2370})


def test_the_table_says_what_is_modelled_and_what_is_missing() -> None:
    report = {
        "num_streams": 4,
        "step_ms": 10.0,
        "reps": 1,
        "num_cpus": 2,
        "load_average_before": 0.5,
        "num_output_tokens": [8, 64, 256],
        "not_measured": bench_api._NO_GATEWAY,
        "rows": bench_api.rows([{"native": costs(1)["native"]}]),
    }
    first, *_, last = bench_api.table(report).splitlines()
    assert "modelled" in first
    assert "smg is not installed" in last


@pytest.mark.parametrize("flags", [["--streams", "0"], ["--tokens", "8"], ["--tokens", "0,8"], ["--window-s", "0"]])
def test_wrong_flags(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "api", *flags])
    assert flags[0] in capsys.readouterr().err


@pytest.mark.e2e
@pytest.mark.soak
def test_every_api_is_measured_on_the_real_services(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each answer has the tokens that were asked for, or the run fails."""
    report_file = tmp_path / "report.json"
    argv = ["--streams", "2", "--tokens", "1,40", "--step-ms", "2", "--window-s", "0.1", "--reps", "1"]
    assert main(["bench", "api", *argv, "--json", str(report_file)]) == 0
    report = json.loads(report_file.read_text())
    assert report["modelled"]
    assert [(row["path"], row["process"]) for row in report["rows"]] == [
        *[(path, name) for path in ("native", "vllm") for name in ("frontend-0", "planner", "all")],
        *[("http", name) for name in ("gateway", "frontend-0", "planner", "all")],
    ]
    assert all(row["us_per_token"] > 0 for row in report["rows"])
    assert "VllmEngine" in capsys.readouterr().out
