"""The kernels' benchmark: its arithmetic, and a quick run of all of it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from albireo_kernels.bench import __main__ as command
from albireo_kernels.bench import machine
from albireo_kernels.bench.limits import Cost, Limit, Rate, Rates, limit_of
from albireo_kernels.bench.measure import Measurement
from albireo_kernels.bench.settings import QUICK
from albireo_kernels.bench.steps import RowInputs, Sampling, step_of
from albireo_kernels.cpu import BLOCK, Dtype, Isa

RATES = Rates(
    memory=Rate((10e9, 20e9, 5e9)),
    cache=Rate((200e9,)),
    multiply={Dtype.FLOAT32: Rate((100e9,)), Dtype.INT8: Rate((400e9, 300e9))},
)
LINEARS = ("qkv", "output", "gate_up", "down", "lm_head")
SAMPLES = ("greedy", "temperature", "top-k 50, top-p 0.95")


@pytest.mark.parametrize(
    ("cost", "limit"),
    [
        (Cost(2_000_000), Limit(1e-4, "memory")),
        (Cost(2_000_000, 10_000_000, 9_000_000), Limit(1e-4, "memory")),
        (Cost(2_000_000, 40_000_000, 9_000_000), Limit(2e-4, "cache")),
        (Cost(2_000_000, 40_000_000, 50_000_000), Limit(5e-4, "arithmetic")),
        (Cost(2_000_000, 0, 50_000_000, Dtype.INT8), Limit(1.25e-4, "arithmetic")),
        (Cost(0, 200_000), Limit(1e-6, "cache")),
    ],
)
def test_the_limit_is_what_takes_longest(cost: Cost, limit: Limit) -> None:
    assert limit_of(cost, RATES) == limit


def test_rates() -> None:
    """The best of all measurements counts."""
    rates = RATES + Rates(Rate((30e9,)), Rate((1e9,)), {Dtype.FLOAT32: Rate((1e9,)), Dtype.INT8: Rate((500e9,))})
    assert (rates.memory.best, rates.cache.best) == (30e9, 200e9)
    assert {dtype: rate.best for dtype, rate in rates.multiply.items()} == {Dtype.FLOAT32: 100e9, Dtype.INT8: 500e9}
    assert RATES.to_json() == {
        "read_gb_s": {"best": 20, "median": 10},
        "read_cache_gb_s": {"best": 200, "median": 200},
        "multiply_gflop_s": {"float32": {"best": 100, "median": 100}, "int8": {"best": 400, "median": 350}},
    }


def test_the_report_of_a_kernel() -> None:
    measured = Measurement("gemm", "1 x 2 -> 3", Cost(2_000_000, 8, 12), 2e-4, 1e-3)
    report = measured.to_json(RATES)
    assert (report["kernel"], report["shape"], report["bound"]) == ("gemm", "1 x 2 -> 3", "memory")
    assert (report["num_bytes"], report["num_cached_bytes"], report["num_flops"]) == (2_000_000, 8, 12)
    assert [report[name] for name in ("time_us", "limit_us", "share")] == pytest.approx([200, 100, 0.5])
    assert [report[name] for name in ("torch_us", "torch_ratio")] == pytest.approx([1000, 5])
    alone = Measurement("gemm", "", Cost(1), 1.0, None).to_json(RATES)
    assert (alone["torch_us"], alone["torch_ratio"]) == (None, None)


def test_steps() -> None:
    rows = RowInputs.of(3, context=70)
    assert sorted(rows.block_tables.reshape(-1)) == list(range(9))
    assert rows.positions.tolist() == [69, 69, 69]
    assert rows.slot_mapping.tolist() == (rows.block_tables[:, 2] * BLOCK + 5).tolist()
    prompt = RowInputs.of(1, tokens_per_row=40, context=40)
    assert prompt.positions.tolist() == list(range(40))
    assert prompt.query_starts.tolist() == [0, 40]
    assert len(np.unique(prompt.slot_mapping)) == 40
    step = step_of(rows, sampling=Sampling(temperature=0.5))
    assert (step.c.num_tokens, step.c.num_rows, step.c.num_samples) == (3, 3, 3)
    assert step_of(rows).c.num_samples == 0


def run_quick(tmp_path: Path, *flags: str, preamble: str = "") -> tuple[dict, subprocess.CompletedProcess]:
    file = tmp_path / "report.json"
    code = f"import sys\n{preamble}\nfrom albireo_kernels.bench.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    argv = [sys.executable, "-c", code, "--quick", "--json", str(file), *flags]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(file.read_text()), result


def test_a_quick_run(tmp_path: Path) -> None:
    report, result = run_quick(tmp_path)
    assert report.keys() == {"date", "version", "machine", "isa", "threads", "torch", "rates", "rows"}
    assert report["isa"] in [isa.name.lower() for isa in Isa]
    assert report["machine"]["num_usable_cpus"] == report["threads"]
    for rates in report["rates"].values():
        multiplied = rates.pop("multiply_gflop_s")
        assert multiplied.keys() == {"float32", "bfloat16", "int8"}
        for rate in (*rates.values(), *multiplied.values()):
            assert 0 < rate["median"] <= rate["best"]

    kernels = {f"{name} {dtype}": 2 for name in LINEARS for dtype in ("bfloat16", "float32", "int8")}
    kernels |= {f"sample, {name}": 2 for name in SAMPLES}
    kernels |= dict.fromkeys(("quantize", "add_norm", "embed"), 2) | {"rope": 3, "attention": 3}
    if report["threads"] > 1:
        kernels["all-reduce of 2"] = 2
    seen = [row["kernel"] for row in report["rows"]]
    assert {kernel: seen.count(kernel) for kernel in seen} == kernels
    for row in report["rows"]:
        assert row["share"] > 0
        assert row["share"] == pytest.approx(row["limit_us"] / row["time_us"])
        assert row["bound"] in ("memory", "cache", "arithmetic")
        has_torch = "int8" not in row["kernel"] and row["kernel"] not in ("quantize", "all-reduce of 2")
        assert (row["torch_us"] is not None) == (row["torch_ratio"] is not None) == has_torch
        assert row["torch_us"] is None or row["torch_us"] > 0
        assert f"{row['kernel']}" in result.stdout
    assert f"{4 + len(seen)}/{4 + len(seen)}" in result.stderr, "a progress bar"

    by_kernel = {(row["kernel"], row["shape"]): row for row in report["rows"]}
    qkv = by_kernel["qkv bfloat16", "8 x 128 -> 256"]
    assert (qkv["num_bytes"], qkv["num_flops"]) == (2 * 128 * 256, 2 * 8 * 128 * 256)
    assert by_kernel["down int8", "1 x 256 -> 128"]["num_bytes"] == 256 * 128 + 8 * 128
    decode = by_kernel["attention", "4 x 1, context 70"]
    assert (decode["num_bytes"], decode["num_flops"]) == (4 * 70 * 2 * 2 * 32 * 2, 4 * 70 * 4 * 4 * 32)
    prefill = by_kernel["attention", "48 tokens"]
    assert (prefill["num_bytes"], prefill["num_flops"]) == (48 * 2 * 2 * 32 * 2, 4 * 4 * 32 * 48 * 49 // 2)
    assert by_kernel["sample, greedy", "8 x 2048"]["num_bytes"] == 8 * 2048 * 4


def test_without_torch(tmp_path: Path) -> None:
    report, result = run_quick(tmp_path, "--rows", "2", "--threads", "1", preamble="sys.modules['torch'] = None")
    assert (report["torch"], report["threads"]) == (None, 1)
    assert {row["torch_us"] for row in report["rows"]} == {None}
    assert "all-reduce of 2" not in result.stdout, "there is one thread only"
    assert "torch is not installed" in result.stdout
    assert "2 x 128 -> 256" in result.stdout


def test_rates_only(tmp_path: Path) -> None:
    report, result = run_quick(tmp_path, "--rates-only", "--isa", "portable")
    assert (report["rows"], report["isa"]) == ([], "portable")
    assert "GB/s" in result.stdout
    assert "kernel" not in result.stdout


def test_an_instruction_set_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "detect_isa", lambda: Isa.AVX2)
    assert command.main(["--isa", "amx"]) == 2
    assert "avx2 at most" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--rows", "0,1"], ["--rows", "many"], ["--threads", "0"], ["--threads", "9999"]])
def test_wrong_usage(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        command.main(flags)
    assert exit_info.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_only_what_fits_is_sampled() -> None:
    assert QUICK.sampled == (1, 8)
