"""``albireo bench swap`` starts services with and without a KV store, and reports how each of them did."""

import json
from pathlib import Path

import pytest

from albireo.cli import swap_choice, swap_traffic
from albireo.cli.host_services import stages
from albireo.cli.main import main
from albireo.cli.processes import option
from albireo.errors import ConfigError


@pytest.mark.e2e
@pytest.mark.alone
def test_a_short_run_on_the_modelled_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Blocks move where there is a store only; steps take as long as the clock says, at least."""
    file = tmp_path / "swap.json"
    argv = ["--batch", "8", "--step-ms", "2", "--steps", "500", "--reps", "1", "--json", str(file)]
    assert main(["bench", "swap", *argv]) == 0
    report = json.loads(file.read_text())
    assert report["modelled"]
    assert report["swapped"]["num_blocks_out"] > 0
    assert report["swapped"]["kv_fraction"] > 0
    assert report["recomputed"]["num_blocks_out"] == report["roomy"]["num_blocks_out"] == 0
    assert report["roomy"]["num_preemptions"] == 0 < report["recomputed"]["num_preemptions"]
    for name in ("roomy", "recomputed", "swapped"):
        assert 2 <= report[name]["step_p50_ms"] <= report[name]["step_p99_ms"]
        assert 0 <= report[name]["kv_exposed_fraction"] <= report[name]["kv_fraction"]
    assert "step p99 by roomy" in capsys.readouterr().out


@pytest.mark.e2e
@pytest.mark.soak
def test_a_short_run_on_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Swapping computes less than computing again."""
    file = tmp_path / "swap.json"
    argv = ["--model", "demo", "--requests", "16", "--prompt-tokens", "64", "--output-tokens", "256", "--blocks", "40"]
    assert main(["bench", "swap", *argv, "--reps", "2", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["always"]["num_computed_tokens"] < report["never"]["num_computed_tokens"]
    assert report["always"]["num_blocks_in"] > 0 == report["never"]["num_blocks_in"]
    best = min(report[mode]["wall_s"] for mode in ("always", "never"))
    assert report["auto_ratio"] == pytest.approx(report["auto"]["wall_s"] / best)
    assert "auto by the better one" in capsys.readouterr().out


def test_what_is_started():
    """Store, ranks and planner know of each other, and the pool has the size that was asked for."""
    setting = swap_choice.setting_of("demo", 2, swap_choice.Crowd(4, 64, 32, 48), "never")
    paths = (Path("/r"), Path("/r/group"), Path("/r/logs"))
    (store,), (worker,), (planner,), *_ = stages(setting, *paths)
    assert option(list(planner.argv), "--kv-store") == option(list(store.argv), "--listen")
    assert option(list(worker.argv), "--kv-store") == f"unix:{option(list(store.argv), '--run-dir')}/kv-arena.sock"
    assert option(list(planner.argv), "--swap") == "never"
    assert option(list(worker.argv), "--max-model-len") == "128"
    block_bytes_per_rank = 4 * 2 * 32 * 2 * 32 * 2  # layers, heads, head's size, keys and values, tokens, bfloat16
    assert setting.kv_cache_gib * 2**30 == 48 * block_bytes_per_rank


def test_settings_of_the_modelled_device_differ_in_pool_and_store_only():
    roomy, recomputed, swapped = swap_traffic.settings(2, 8, 10.0).values()
    assert (roomy.kv_cache_gib, roomy.swap, recomputed.swap, swapped.swap) == (0.0, "", "", "always")
    assert recomputed.kv_cache_gib == swapped.kv_cache_gib > 0
    assert {each.output_tokens for each in (roomy, recomputed, swapped)} == {roomy.output_tokens}


def test_a_request_that_the_model_does_not_take_is_refused():
    with pytest.raises(ConfigError, match="700 tokens of prompt and output; demo takes 512"):
        swap_choice.setting_of("demo", 2, swap_choice.Crowd(4, 600, 100, 48), "auto")


@pytest.mark.parametrize("flags", [["--reps", "0"], ["--step-ms", "0"], ["--blocks", "0"], ["--prompt-tokens", "0"]])
def test_wrong_usage(flags: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["bench", "swap", *flags])
    assert f"{flags[0]}: " in capsys.readouterr().err
