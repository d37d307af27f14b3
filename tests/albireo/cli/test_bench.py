"""``albireo bench serve`` against a server without a model."""

import json
from pathlib import Path

import pytest

from albireo.cli.bench import WORKLOADS
from albireo.cli.bench_load import Workload, percentile
from albireo.cli.main import main
from albireo.v1 import generation_pb2 as pb
from fake_server import FakeServer


@pytest.mark.parametrize(
    ("workload", "sampling"), [("chat", "greedy"), ("decode", "sampled"), ("prefill", "greedy"), ("single", "sampled")]
)
def test_report(
    server: FakeServer, tmp_path: Path, workload: str, sampling: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.json"
    flags = ["--workload", workload, "--sampling", sampling, "--reps", "2", "--json", str(file)]
    assert main(["bench", "serve", "--target", server.target, *flags]) == 0
    report = json.loads(file.read_text())
    assert (report["workload"], report["sampling"], report["model"]) == (workload, sampling, "fake")
    assert (report["engine"], report["tp"], report["dtype"], report["modelled"]) == ("stub", 2, "float32", True)
    metrics = ["out_tok_s", "total_tok_s", "ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms"]
    for name in metrics:
        assert report[name] > 0
        assert min(run[name] for run in report["runs"]) <= report[name] <= max(run[name] for run in report["runs"])
    assert report["total_tok_s"] > report["out_tok_s"]
    out, err = capsys.readouterr()
    assert all(name in out for name in [*metrics, "modelled", "TP 2"])
    assert f"{2 * WORKLOADS[workload].num_requests}/" in err, "a progress bar"


def test_requests_have_the_shape_of_the_workload(server: FakeServer) -> None:
    assert main(["bench", "serve", "--target", server.target, "--workload", "decode", "--reps", "1"]) == 0
    assert len(server.requests) == 8 + 16, "a warm-up, and the measurement"
    assert server.max_open == 8
    measured = server.requests[8:]
    assert {len(request.token_ids.ids) for request in measured} == {16}
    assert all(300 <= token < 1003 for request in measured for token in request.token_ids.ids), "of the vocabulary"
    assert len({tuple(request.token_ids.ids) for request in server.requests}) == 24, "no two prompts are the same"
    params = measured[0].sampling_params
    assert params == pb.SamplingParams(max_tokens=128, ignore_eos=True, n=1, temperature=0, top_p=1, top_k=0)


def test_a_small_model(server: FakeServer, tmp_path: Path) -> None:
    """Prompts keep to a tiny vocabulary and context; what was measured is in the report."""
    server.info.MergeFrom(pb.ModelInfo(vocab_size=5, max_model_len=64, engine="torch"))
    file = tmp_path / "report.json"
    flags = ["--workload", "prefill", "--reps", "1", "--json", str(file)]
    assert main(["bench", "serve", "--target", server.target, *flags]) == 0
    report = json.loads(file.read_text())
    assert not report["modelled"]
    assert report["num_prompt_tokens"] + report["num_output_tokens"] <= 64
    assert {token for request in server.requests for token in request.token_ids.ids} <= set(range(5))


@pytest.mark.parametrize("name", list(WORKLOADS))
def test_clamping_keeps_the_shape(name: str) -> None:
    shape = WORKLOADS[name]
    assert shape.clamped(2048) == shape
    for max_model_len in range(2, 1100):
        clamped = shape.clamped(max_model_len)
        assert clamped.num_prompt_tokens >= 1
        assert clamped.num_output_tokens >= 1
        assert clamped.num_prompt_tokens + clamped.num_output_tokens <= max_model_len
        assert clamped.num_prompt_tokens <= shape.num_prompt_tokens
        assert clamped.num_output_tokens <= shape.num_output_tokens
    assert Workload(1, 1, 128, 64).clamped(96) == Workload(1, 1, 64, 32)


def test_json_on_stdout(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--workload", "single", "--reps", "1", "--json", "-"]
    assert main(["bench", "serve", "--target", server.target, *argv]) == 0
    assert json.loads(capsys.readouterr().out)["workload"] == "single"


def test_percentile() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([0.0, 10.0], 99) == pytest.approx(9.9)
    assert percentile([4.0], 99) == 4.0
    assert percentile([], 50) == 0.0


def test_no_server(dead_target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--target", dead_target]) == 1
    assert dead_target in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["serve", "--workload", "zzz"], ["serve", "--reps", "0"]])
def test_wrong_usage(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", *argv])
    assert exit_info.value.code == 2
