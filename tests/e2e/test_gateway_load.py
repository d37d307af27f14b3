"""A published load generator, unmodified, against `albireo serve demo --http`: minutes without an error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from http_server import http_server
from load import EMPTY, wait_for_metrics, write_report

pytestmark = [pytest.mark.e2e, pytest.mark.alone, pytest.mark.soak]

AIPERF = "aiperf==0.13.*"
DURATION_S = 300
DEMO = Path(__file__).parents[2] / "albireo" / "demo"
LOAD = [
    *("--endpoint-type", "chat", "--streaming", "--use-server-token-count", "--concurrency", "8"),
    *("--synthetic-input-tokens-mean", "100", "--synthetic-input-tokens-stddev", "30"),
    *("--output-tokens-mean", "60", "--output-tokens-stddev", "20", "--random-seed", "1", "--ui", "none"),
]


@pytest.fixture(scope="module")
def aiperf(request: pytest.FixtureRequest) -> Path:
    """The tool in an environment of its own, which pytest's cache keeps."""
    environment = request.config.cache.mkdir("aiperf")
    tool = environment / "bin" / "aiperf"
    if not tool.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
        subprocess.run([environment / "bin" / "pip", "install", "--quiet", AIPERF], check=True)
    return tool


async def test_a_load_generator_meets_no_error(tmp_path: Path, aiperf: Path):
    results = tmp_path / "results"
    with http_server(tmp_path, "demo") as server:
        argv = [aiperf, "profile", "--model", "demo", "--url", f"http://127.0.0.1:{server.port}", *LOAD]
        argv += ["--tokenizer", DEMO, "--benchmark-duration", str(DURATION_S), "--artifact-dir", results]
        # What this environment says of the Hub or of Python's path is not meant for the tool.
        env = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "PYTHONPATH")}
        with (tmp_path / "aiperf.log").open("wb") as log:
            ended = subprocess.run(
                argv, env={**env, "HOME": str(tmp_path)}, stdout=log, stderr=log, timeout=DURATION_S + 300, check=False
            )
        assert ended.returncode == 0, (tmp_path / "aiperf.log").read_text()[-4000:]
        await wait_for_metrics(server.metrics_port, EMPTY)
    found = json.loads((results / "profile_export_aiperf.json").read_text())
    figures = ("request_count", "request_error_rate", "request_throughput", "output_token_throughput")
    report = {name: found[name]["avg"] for name in figures}
    waits = {name: found[name]["p99"] for name in ("time_to_first_token", "inter_token_latency")}
    write_report({"test": "aiperf", "seconds": DURATION_S, **report, "p99_ms": waits})
    assert (found["error_summary"], report["request_error_rate"], found["was_cancelled"]) == ([], 0, False)
    assert report["request_count"] > DURATION_S
