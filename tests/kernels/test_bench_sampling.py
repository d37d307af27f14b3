"""``albireo bench sampling``: its arithmetic, its checks, and a quick run of all of it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from albireo.cli.main import main as albireo
from albireo.errors import GroupError
from albireo_kernels import reference
from albireo_kernels.bench.sampling import in_torch
from albireo_kernels.bench.sampling.__main__ import main
from albireo_kernels.bench.sampling.payload import SAMPLINGS, Shape, received_bytes
from albireo_kernels.bench.sampling.plot import picture
from albireo_kernels.bench.sampling.ranks import NOT_DRAWN, Effort, Ranks, check_tokens
from albireo_kernels.bench.sampling.report import ratios_of
from albireo_kernels.bench.steps import Sampling
from albireo_kernels.cpu import SCHEMES, Library, Program, load_library

ONCE = Effort(min_reps=1, max_reps=1, budget_s=0.0)
CORES = sorted(os.sched_getaffinity(0))
QWEN = Shape(vocab_size=151_936, batch=9, tp=2)
OTHERS = 75_136  # columns of rank 1: rank 0 has 75 tiles of 1024, and rank 1 what is left


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    """The benchmark is a process of its own, and sets torch up for itself."""
    yield
    torch.set_grad_enabled(True)


@pytest.fixture(scope="module")
def library() -> Library:
    return load_library()


@pytest.mark.parametrize(
    ("scheme", "sampling", "expected"),
    [
        *[("gather", name, 9 * 4 * OTHERS) for name in SAMPLINGS],
        *[("batch-sharded", name, 5 * 4 * OTHERS + 4 * 4) for name in SAMPLINGS],
        ("merge", "greedy", 5 * 8 + 4 * 4),
        ("merge", "temperature", 5 * 8 + 4 * 4),
        ("merge", "top_k_top_p", 5 * (4 + 8 * 50) + 4 * 4),
        ("merge", "top_p", 5 * 4 * OTHERS + 4 * 4),
    ],
)
def test_bytes_that_a_rank_receives(scheme: str, sampling: str, expected: int) -> None:
    assert received_bytes(scheme, QWEN, SAMPLINGS[sampling]) == expected


def test_bytes_of_more_ranks() -> None:
    """One for each other rank; a short shard has no k tokens to offer, a rank alone has no others."""
    assert received_bytes("merge", Shape(151_936, 128, 8), SAMPLINGS["greedy"]) == 16 * 7 * 8 + 112 * 4
    short = Shape(96, 4, 4)
    assert [len(short.ids(rank)) for rank in range(4)] == [24] * 4
    assert received_bytes("merge", short, SAMPLINGS["top_k_top_p"]) == 3 * (4 + 8 * 24) + 3 * 4
    for scheme in SCHEMES:
        assert received_bytes(scheme, Shape(2048, 8, 1), SAMPLINGS["top_p"]) == 0


def test_ratios() -> None:
    of = {"sampling": "greedy", "batch": 8, "tp": 2, "source": "measured"}
    times = zip(SCHEMES, (1.0, 2.0, 4.0), strict=True)
    rows = [{"scheme": scheme, "time_ms": time_ms, **of} for scheme, time_ms in times]
    assert ratios_of(rows) == [{**of, "merge_to_gather": 0.25, "merge_to_batch_sharded": 0.5}]


def test_tokens_must_be_the_same() -> None:
    tokens = np.array([3, 1, 4], dtype=np.int32)
    other, mine = np.array([3, 1, 5], dtype=np.int32), np.array([3, NOT_DRAWN, 4], dtype=np.int32)
    check_tokens({"merge": [tokens, tokens], "gather": [tokens, tokens]}, every=1)
    check_tokens({"merge": [mine], "gather": [tokens]}, every=2)
    with pytest.raises(GroupError, match="merge, rank 1, row 2: token 5, where gather has 4"):
        check_tokens({"merge": [tokens, other], "gather": [tokens, tokens]}, every=1)
    with pytest.raises(GroupError, match="gather, rank 1, row 2"):
        check_tokens({"merge": [tokens, tokens], "gather": [tokens, other]}, every=1)
    with pytest.raises(GroupError, match="merge, rank 0, row 1: token 1, where gather has -1"):
        check_tokens({"merge": [tokens], "gather": [tokens]}, every=2)
    with pytest.raises(GroupError, match="row 1"):
        check_tokens({"merge": [mine, mine], "gather": [mine, mine]}, every=1)


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("tp", [1, 3, 16])
def test_a_rank_alone_draws_its_rows(library: Library, tp: int, name: str) -> None:
    """As many tokens as rows, none, and shards without columns."""
    with Ranks(library, Shape(1003, 7, tp), CORES[:1]) as ranks:
        assert ranks.is_modelled == (tp > 1)
        seconds = ranks.measure(SAMPLINGS[name], ONCE)
    assert seconds.keys() == set(SCHEMES)
    assert all(each > 0 for each in seconds.values())


@pytest.mark.skipif(len(CORES) < 2, reason="a core for each rank")
def test_a_scheme_that_draws_nothing_is_noticed(library: Library) -> None:
    with Ranks(library, Shape(500, 3, 2), CORES) as ranks:
        assert not ranks.is_modelled
        ranks.measure(SAMPLINGS["temperature"], ONCE)
        ranks._samples["batch-sharded"][:] = [Program(), Program()]
        with pytest.raises(GroupError, match="batch-sharded, rank 0, row 0: token -1"):
            ranks.measure(SAMPLINGS["temperature"], ONCE)


@pytest.mark.parametrize("sampling", [*SAMPLINGS.values(), Sampling(temperature=1.0, top_k=3)])
def test_torch_draws_survivors(sampling: Sampling) -> None:
    logits = 3 * torch.randn(20, 200, generator=torch.Generator().manual_seed(0))
    for row, token in zip(logits, in_torch.sample(logits, sampling).tolist(), strict=True):
        if sampling.temperature == 0:
            assert token == row.argmax()
        else:
            assert token in reference.survivors(row / sampling.temperature, sampling.top_k, sampling.top_p, 0.0)


def run_quick(tmp_path: Path, *flags: str) -> dict[str, Any]:
    file = tmp_path / "report.json"
    assert main(["--quick", "--json", str(file), *flags]) == 0
    report: dict[str, Any] = json.loads(file.read_text())
    return report


def test_a_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "growth.png"
    report = run_quick(tmp_path, "--tp", "2", "--batch", "3,6", "--plot", str(plot))
    facts = {"date", "version", "machine", "isa", "vocab", "min_reps"}
    assert report.keys() == facts | {"rows", "ratios", "torch"}
    assert (report["vocab"], report["min_reps"]) == (2048, 2)
    shapes = {(row["tp"], row["batch"]) for row in report["rows"]}
    assert shapes == {(2, 3), (2, 6), (1, 6), (4, 6), (8, 6)}
    assert len(report["rows"]) == len(shapes) * len(SCHEMES) * len(SAMPLINGS)
    for row in report["rows"]:
        assert row.keys() == {"scheme", "sampling", "batch", "tp", "time_ms", "bytes_per_rank", "source"}
        assert row["source"] == ("measured" if row["tp"] <= len(CORES) else "modelled")
        assert row["time_ms"] > 0
        assert (row["bytes_per_rank"] == 0) == (row["tp"] == 1)
    assert len(report["ratios"]) == len(shapes) * len(SAMPLINGS)
    assert {(row["sampling"], row["batch"]) for row in report["torch"]} == {(s, b) for s in SAMPLINGS for b in (3, 6)}
    assert {row["threads"] for row in report["torch"]} == {min(2, len(CORES))}
    assert plot.read_bytes().startswith(b"\x89PNG")
    out, err = capsys.readouterr()
    assert all(word in out for word in ("merge / gather", *SAMPLINGS, *{row["source"] for row in report["rows"]}))
    assert "28/28" in err, "a progress bar"


def test_more_ranks_than_cores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_quick(tmp_path, "--tp", "64", "--batch", "2", "--vocab", "64")
    of_64 = [row for row in report["rows"] if row["tp"] == 64]
    assert {row["source"] for row in of_64} == {"modelled"}
    assert {row["tp"] for row in report["rows"]} == {1, 2, 4, 8, 64}
    assert "modelled: more ranks than cores" in capsys.readouterr().out


def test_without_torch_and_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("in_torch", "plot"):
        monkeypatch.setitem(sys.modules, f"albireo_kernels.bench.sampling.{name}", None)
    assert run_quick(tmp_path, "--tp", "1")["torch"] == []
    assert "torch is not installed" in capsys.readouterr().out
    assert main(["--quick", "--plot", str(tmp_path / "growth.png")]) == 2
    assert "--plot: matplotlib" in capsys.readouterr().err


def test_json_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--tp", "1", "--batch", "1", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["rows"]
    assert "merge / gather" in err


def test_modelled_times_are_hollow() -> None:
    machine = {"cpu": "a CPU", "num_usable_cpus": 2}
    rows = [
        {
            "scheme": scheme,
            "sampling": "top_k_top_p",
            "batch": 8,
            "tp": tp,
            "time_ms": 1.0 / tp,
            "bytes_per_rank": tp - 1,
        }
        | {"source": "measured" if tp <= 2 else "modelled"}
        for scheme in SCHEMES
        for tp in (1, 2, 4)
    ]
    figure = picture({"rows": rows, "machine": machine, "isa": "avx2", "vocab": 100})
    received, times = figure.axes
    assert received.get_yscale() == times.get_yscale() == "log"
    markers = [line for line in times.get_lines() if line.get_marker() != "None"]
    hollow = {line.get_xdata()[0] for line in markers if line.get_markerfacecolor() == "white"}
    assert (len(markers), hollow) == (9, {2}), "TP 4 is the third place"
    assert {line.get_xdata()[0] for line in received.get_lines()} == {1, 2}, "a rank alone receives nothing"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*SCHEMES, "measured", "modelled"]


@pytest.mark.parametrize(
    ("flags", "limit"),
    [
        (["--tp", "0"], "1 to 64"),
        (["--tp", "65"], "1 to 64"),
        (["--vocab", "63"], "64 to 1048576"),
        (["--batch", "8,0"], "1 to 1024"),
        (["--batch", "1025"], "1 to 1024"),
        (["--batch", "some"], "whole numbers"),
        (["--reps", "0"], "1 to 1000"),
        (["--plot", "picture.svg"], ".png"),
        (["--plot", "/nowhere/picture.png"], "a directory that is there"),
    ],
)
def test_wrong_usage(flags: list[str], limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(flags)
    assert exit_info.value.code == 2
    err = capsys.readouterr().err
    assert flags[0] in err
    assert limit in err


def test_what_does_not_fit_into_memory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "sysconf", lambda _: 1 << 13)
    assert main(["--batch", "8"]) == 2
    assert "--batch 8: 3 at most with --vocab 151936" in capsys.readouterr().err


def test_the_command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A child process, whose flags and status are passed on."""
    assert albireo(["bench", "sampling", "--tp", "1000"]) == 2
    assert "--tp 1000: 1 to 64" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        albireo(["bench", "--help"])
    assert "sampling" in capfd.readouterr().out
    monkeypatch.setattr(subprocess, "run", lambda argv, **_: subprocess.CompletedProcess(argv, -9, stdout=None))
    assert albireo(["bench", "sampling"]) == 1
    assert "bench.sampling was killed by SIGKILL" in capfd.readouterr().err
