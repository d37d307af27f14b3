"""Flags, environment, file: who wins, what is refused."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from albireo.config import flag, from_namespace, parse, parser_for, to_argv


@dataclass(frozen=True)
class Config:
    max_num_seqs: int = flag(64, "sequences")
    share: float = flag(0.5, "a share")
    engine: str = flag("torch", "the engine", ("torch", "stub"))
    run_dir: str | None = flag(None, "a directory")
    eager: bool = flag(False, "no graphs")
    derived: int = 7  # no flag

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ValueError("--max-num-seqs: at least 1")


def read(*argv: str) -> Config:
    return parse(Config, "prog", "description", list(argv))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "albireo.toml"
    file.write_text('[albireo]\nmax-num-seqs = 2\nengine = "stub"\neager = true\n\n[other]\nshare = 0.9\n')
    return file


def test_defaults() -> None:
    assert read() == Config(64, 0.5, "torch", None, False, 7)


def test_file(file: Path) -> None:
    assert read("--config", str(file)) == Config(max_num_seqs=2, engine="stub", eager=True)


def test_environment_overrides_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALBIREO_MAX_NUM_SEQS", "3")
    monkeypatch.setenv("ALBIREO_EAGER", "false")
    monkeypatch.setenv("ALBIREO_RUN_DIR", "/run/x")
    assert read("--config", str(file)) == Config(max_num_seqs=3, engine="stub", eager=False, run_dir="/run/x")


def test_flags_override_all(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALBIREO_MAX_NUM_SEQS", "3")
    argv = ["--config", str(file), "--max-num-seqs", "4", "--engine", "torch", "--share", "0.25"]
    assert read(*argv) == Config(max_num_seqs=4, engine="torch", eager=True, share=0.25)


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--engine", "abacus"], "invalid choice: 'abacus'"),
        (["--max-num-seqs", "many"], "invalid int value: 'many'"),
        (["--max-num-seqs", "0"], "--max-num-seqs: at least 1"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_wrong_flags(argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        read(*argv)
    assert exit_info.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('[albireo]\nengine = "abacus"', "invalid choice: 'abacus'"),
        ("[albireo]\nno-such-key = 1", "no-such-key"),
        ("[albireo", "TOML"),
    ],
)
def test_wrong_files(tmp_path: Path, content: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "albireo.toml"
    file.write_text(content)
    with pytest.raises(SystemExit) as exit_info:
        read("--config", str(file))
    assert exit_info.value.code == 2
    assert complaint in capsys.readouterr().err


def test_a_missing_file_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        read("--config", "/no/such/file.toml")
    assert exit_info.value.code == 2
    assert "/no/such/file.toml" in capsys.readouterr().err


def test_a_wrong_choice_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALBIREO_ENGINE", "abacus")
    with pytest.raises(SystemExit):
        read()


def test_help_names_variables_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        read("--help")
    assert exit_info.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "ALBIREO_MAX_NUM_SEQS" in text
    assert "(default: 64)" in text
    assert "derived" not in text


def test_to_argv_gives_a_child_the_same_values() -> None:
    config = Config(3, 0.25, "stub", "/a b", True)
    argv = to_argv(config, "max_num_seqs", "share", "engine", "run_dir", "eager")
    assert argv == ["--max-num-seqs", "3", "--share", "0.25", "--engine", "stub", "--run-dir", "/a b", "--eager"]
    assert read(*argv) == config


def test_to_argv_leaves_out_what_is_absent() -> None:
    assert to_argv(Config(), "run_dir", "eager") == []
    assert to_argv(Config(max_num_seqs=1, share=0.0), "share") == ["--share", "0.0"], "zero is a value"


def test_other_arguments_of_the_parser_are_left_alone() -> None:
    parser = parser_for(Config, "prog", "description")
    parser.add_argument("model")
    assert from_namespace(Config, parser.parse_args(["demo", "--share", "1"])) == Config(share=1.0)
