"""``albireo bench roofline``: bytes and flops counted by hand, and a server without a model."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from albireo.cli import bench_kernels, bench_roofline
from albireo.cli.bench_roofline import StepCost, compare, mean_context, step_cost
from albireo.cli.main import main
from albireo.model_spec import ModelSpec, RopeSpec
from albireo.v1 import generation_pb2 as pb
from fake_server import FakeServer

SPEC = ModelSpec(
    path=Path("/tiny"),
    architecture="LlamaForCausalLM",
    model_type="llama",
    vocab_size=100,
    hidden_size=8,
    intermediate_size=12,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=5,
    rms_norm_eps=1e-6,
    rope=RopeSpec(10000.0),
    max_position_embeddings=64,
    tie_word_embeddings=True,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    qk_norm=False,
    sliding_window=None,
    dtype="float32",
    eos_token_ids=(2,),
    bos_token_id=None,
)
# qkv 40 x 8, output 8 x 20, gate and up 24 x 8, down 8 x 12; lm_head 100 x 8.
NUM_WEIGHTS = 3 * (320 + 160 + 192 + 96) + 800
NUM_OUTPUTS = 3 * (40 + 8 + 24 + 8) + 100
NORM_BYTES = 4 * (3 * 16 + 8)
RATES = {
    "read_gb_s": {"best": 20.0, "median": 1.0},
    "multiply_gflop_s": {"float32": {"best": 100.0}, "bfloat16": {"best": 50.0}, "int8": {"best": 200.0}},
}


def test_bytes_and_flops_of_a_step() -> None:
    cost = step_cost(SPEC, 2, 10, "bfloat16", "none")
    assert cost.weight_bytes == 2 * NUM_WEIGHTS + NORM_BYTES
    assert cost.kv_bytes == 2 * 10 * 3 * (2 * 2 * 5) * 2, "keys and values of each sequence, token, and layer"
    assert cost.num_bytes == cost.weight_bytes + cost.kv_bytes
    assert cost.linear_flops == 2 * 2 * NUM_WEIGHTS
    assert cost.attention_flops == 2 * 10 * 3 * (2 * 2 * 20), "a head's products with keys, and with values"

    assert step_cost(SPEC, 1, 10, "float32", "none").weight_bytes == 4 * NUM_WEIGHTS + NORM_BYTES
    quantized = step_cost(SPEC, 2, 10, "bfloat16", "w8a8")
    assert quantized.weight_bytes == NUM_WEIGHTS + 8 * NUM_OUTPUTS + NORM_BYTES
    assert quantized.kv_bytes == cost.kv_bytes


@pytest.mark.parametrize(
    ("field", "num_elements"),
    [("qkv_bias", 3 * 40), ("output_bias", 3 * 8), ("mlp_bias", 3 * (24 + 8)), ("qk_norm", 3 * 10)],
)
def test_vectors_that_some_models_have(field: str, num_elements: int) -> None:
    spec = dataclasses.replace(SPEC, **{field: True})
    more = step_cost(spec, 1, 1, "float32", "none").weight_bytes - step_cost(SPEC, 1, 1, "float32", "none").weight_bytes
    assert more == 4 * num_elements


def test_the_mean_context() -> None:
    assert mean_context(16, 2, None) == 17
    assert mean_context(16, 128, None) == 16 + 64
    assert mean_context(3, 5, 5) == (4 + 5 + 5 + 5) / 4


def test_limits_and_shares() -> None:
    cost = StepCost(weight_bytes=30e6, kv_bytes=10e6, linear_flops=100e6, attention_flops=50e6)
    assert compare(cost, RATES, "float32", "none", 4.0) == {
        "reading_limit_ms": 2.0,
        "multiplying_limit_ms": 1.5,
        "measured_ms": 4.0,
        "share_of_reading_limit": 0.5,
        "share_of_limit": 0.5,
    }
    compared = compare(cost, RATES, "bfloat16", "none", 4.0)
    assert (compared["multiplying_limit_ms"], compared["share_of_limit"]) == (3.0, 0.75)
    compared = compare(cost, RATES, "bfloat16", "w8a8", 4.0)
    assert compared["multiplying_limit_ms"] == 1.5, "attention stays in bfloat16"


@pytest.fixture
def quick_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_roofline, "measure_rates", lambda: bench_kernels.measure_rates("--quick"))


@pytest.mark.usefixtures("quick_rates")
def test_a_server(server: FakeServer, stub_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model is the server's own unless told; every batch runs at once, in each repetition."""
    server.info.path = str(stub_model)
    file = tmp_path / "report.json"
    flags = ["--batch", "4,1", "--prompt", "5", "--output", "9", "--reps", "2", "--json", str(file)]
    assert main(["bench", "roofline", "--target", server.target, *flags]) == 0
    report = json.loads(file.read_text())
    assert (report["model"], report["engine"], report["modelled"]) == ("fake", "stub", True)
    assert (report["dtype"], report["quantize"], report["tp"]) == ("float32", "none", 2)
    assert [row["concurrency"] for row in report["rows"]] == [1, 4]
    for row in report["rows"]:
        assert (row["num_prompt_tokens"], row["num_output_tokens"], row["context"]) == (5, 9, 9.5)
        assert 0 < row["share_of_reading_limit"] <= row["share_of_limit"]
        assert len(row["runs"]) == 2
    assert report["rows"][1]["kv_bytes"] == 4 * report["rows"][0]["kv_bytes"]
    assert server.max_open == 4
    measured = [each for each in server.requests if each.sampling_params.max_tokens == 9]
    assert len(measured) == 2 * (1 + 4)
    out = capsys.readouterr().out
    assert all(word in out for word in ("modelled", "GB/s", "share of limit", "TP 2"))

    flags = ["--batch", "1", "--output", "9", "--reps", "1", "--model", str(stub_model), "--quantize", "w8a8"]
    assert main(["bench", "roofline", "--target", server.target, *flags, "--json", "-"]) == 0
    quantized = json.loads(capsys.readouterr().out)
    assert quantized["quantize"] == "w8a8"
    assert quantized["rows"][0]["weight_bytes"] < report["rows"][0]["weight_bytes"] / 2


@pytest.mark.parametrize(
    ("info", "flags", "message"),
    [
        ({}, [], "name it in --model"),
        ({}, ["--model", "demo"], "not the model that is served"),
        ({"dtype": "float8"}, ["--model", "STUB"], "float8"),
        ({"max_model_len": 100}, ["--model", "STUB"], "144 tokens"),
        ({"max_num_seqs": 4}, ["--model", "STUB"], "--batch 8"),
    ],
)
def test_what_cannot_be_measured(
    server: FakeServer,
    stub_model: Path,
    info: dict[str, Any],
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.info.MergeFrom(pb.ModelInfo(**info))
    flags = [str(stub_model) if flag == "STUB" else flag for flag in flags]
    assert main(["bench", "roofline", "--target", server.target, *flags]) == 2
    assert message in capsys.readouterr().err
    assert not server.requests


def test_no_server(dead_target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "roofline", "--target", dead_target]) == 1
    assert dead_target in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [["--batch", "two"], ["--batch", "0"], ["--prompt", "0"], ["--output", "1"], ["--reps", "0"]]
)
def test_wrong_usage(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", "roofline", *flags])
    assert exit_info.value.code == 2
    assert flags[0] in capsys.readouterr().err
