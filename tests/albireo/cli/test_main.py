"""The ``albireo`` command itself: subcommands, errors, exit status."""

import subprocess
import sys
from collections.abc import Sequence

import pytest

import albireo
from albireo.cli import main as cli
from albireo.cli.client import CallFailed
from albireo.errors import AlbireoError, ConfigError, GroupError


def test_version_of_the_module() -> None:
    command = [sys.executable, "-m", "albireo", "--version"]
    assert subprocess.check_output(command, text=True) == f"albireo {albireo.__version__}\n"


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--help"])
    assert exit_info.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("serve", "generate", "bench"))


@pytest.mark.parametrize("argv", [[], ["nothing"], ["--nothing"]])
def test_wrong_usage(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(argv)
    assert exit_info.value.code == 2


@pytest.mark.parametrize(
    ("error", "status"),
    [(ConfigError("no"), 2), (GroupError("no"), 1), (CallFailed("UNAVAILABLE", "no"), 1), (KeyboardInterrupt(), 130)],
)
def test_errors_become_a_line_and_a_status(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(argv: Sequence[str]) -> int:
        raise error

    monkeypatch.setitem(cli._COMMANDS, "serve", (fail, "fails"))
    assert cli.main(["serve"]) == status
    assert capsys.readouterr().err == (f"albireo: {error}\n" if isinstance(error, AlbireoError) else "")


def test_the_command_line_needs_no_torch() -> None:
    code = "import sys, albireo.cli.main; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
