"""Children die with their parent, in order, and say why; nothing is left behind."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from albireo.supervise import Child, python_module, run_until_exit

# A supervisor as a process of its own: children given as [name, code] pairs, logs in a directory.
_SUPERVISOR = """
import asyncio, json, sys
from pathlib import Path
from albireo.supervise import Child, run_until_exit
children, logs, options = json.loads(sys.argv[1])
python = [sys.executable, "-I", "-S", "-c"]
children = [Child(name, [*python, code], Path(logs) / f"{name}.log") for name, code in children]
sys.exit(asyncio.run(run_until_exit(children, **options)))
"""
_SLEEP = "import time; print('up', flush=True); time.sleep(60)"
_STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
# Takes its time to stop, and writes down when it has.
_ORDERLY = """
import signal, sys, time
def stop(*_):
    time.sleep(0.1)
    open({journal!r}, "a").write("{name}\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("up", flush=True)
time.sleep(60)
"""


class Supervisor:
    """A supervisor under test."""

    def __init__(self, logs: Path, children: Sequence[tuple[str, str]], **options: Any) -> None:
        self.logs = logs
        self.names = [name for name, _ in children]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SUPERVISOR, json.dumps([children, str(logs), options])],
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_until_up(self) -> None:
        wait_until(lambda: all("up" in self.log(name) for name in self.names))

    def log(self, name: str) -> str:
        file = self.logs / f"{name}.log"
        return file.read_text() if file.exists() else ""

    def children(self) -> list[int]:
        return child_pids(self.process.pid)

    def finish(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=20)
        return self.process.returncode, errors


def child_pids(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_gone(pid: int) -> bool:
    """Dead and reaped, or dead and left to an init that reaps late."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("last_act", "how"),
    [
        ("sys.exit(3)", "exited with status 3"),
        ("sys.exit(0)", "exited with status 0"),
        ("os.kill(os.getpid(), 11)", "was killed by SIGSEGV"),
        ("raise ValueError('no such luck')", "exited with status 1"),
    ],
)
def test_a_dead_child_ends_all_and_is_named(tmp_path: Path, last_act: str, how: str) -> None:
    dying = f"import os, sys\nfor i in range(100): print(f'line {{i}}', flush=True)\n{last_act}"
    code, errors = Supervisor(tmp_path, [("steady", _SLEEP), ("dying", dying)]).finish()
    assert code == 1
    assert f"dying {how}" in errors
    assert str(tmp_path / "dying.log") in errors
    assert "line 99\n" in errors, "the end of the log"
    assert "line 50\n" not in errors, "but not all of it"
    assert ("no such luck" in errors) == ("luck" in last_act), "stderr goes to the log as well"
    assert "steady" not in errors


def test_the_cause_is_told_from_what_followed(tmp_path: Path) -> None:
    """Two children die together; the one that a signal killed comes last in the report, with its log."""
    victim = "import os, time; print('last words', flush=True); time.sleep(0.05); os.kill(os.getpid(), 9)"
    code, errors = Supervisor(tmp_path, [("reacting", "raise SystemExit(4)"), ("victim", victim)]).finish()
    assert code == 1
    lines = errors.splitlines()
    assert lines[0] == "the log of victim ends:"
    assert lines[-2].startswith("reacting exited with status 4; ")
    assert lines[-1] == f"victim was killed by SIGKILL; its log is {tmp_path / 'victim.log'}"


def test_work_of_a_child_that_supervises_is_reported_through(tmp_path: Path) -> None:
    """The report of the inner supervisor is the end of its log, so the outer one shows who died in the end."""
    leaf = "import sys\nfor i in range(100): print(f'line {i}')\nsys.exit(7)"
    inner = json.dumps([[["leaf", leaf]], str(tmp_path), {}])
    nested = f"import os; os.execv({sys.executable!r}, [{sys.executable!r}, '-c', {_SUPERVISOR!r}, {inner!r}])"
    _, errors = Supervisor(tmp_path, [("nested", nested)]).finish()
    assert f"| leaf exited with status 7; its log is {tmp_path / 'leaf.log'}" in errors
    assert "nested exited with status 1" in errors.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_children_in_reverse_order(tmp_path: Path, number: signal.Signals) -> None:
    journal = tmp_path / "journal"
    names = ["first", "second", "third"]
    children = [(name, _ORDERLY.format(journal=str(journal), name=name)) for name in names]
    supervisor = Supervisor(tmp_path, children)
    supervisor.wait_until_up()
    pids = supervisor.children()
    assert len(pids) == 3
    supervisor.process.send_signal(number)
    assert supervisor.finish() == (0, "")
    assert journal.read_text().split() == names[::-1]
    assert all(is_gone(pid) for pid in pids)


def test_together_tells_all_at_once(tmp_path: Path) -> None:
    journal = str(tmp_path / "journal")
    supervisor = Supervisor(
        tmp_path,
        [(f"c{i}", _ORDERLY.format(journal=journal, name=i).replace("0.1", "0.7")) for i in range(6)],
        together=True,
    )
    supervisor.wait_until_up()
    start = time.monotonic()
    supervisor.process.terminate()
    assert supervisor.finish()[0] == 0
    assert time.monotonic() - start < 6 * 0.7


def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path, [("stubborn", _STUBBORN), ("steady", _SLEEP)], grace_s=0.3)
    supervisor.wait_until_up()
    pids = supervisor.children()
    supervisor.process.terminate()
    code, errors = supervisor.finish()
    assert code == 0
    assert errors == "killing stubborn: still there after 0.3 s\n"
    assert all(is_gone(pid) for pid in pids)


def test_a_second_signal_kills_at_once(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path, [("steady", _STUBBORN), ("stubborn", _STUBBORN)], grace_s=60)
    supervisor.wait_until_up()
    pids = supervisor.children()
    supervisor.process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert supervisor.process.poll() is None
    supervisor.process.send_signal(signal.SIGINT)
    code, errors = supervisor.finish()
    assert code == 130
    assert "killing stubborn" in errors
    assert all(is_gone(pid) for pid in pids)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")
def test_no_orphan_survives_a_killed_parent(tmp_path: Path) -> None:
    """Also two levels down: a service that supervises its own processes."""
    inner = json.dumps([[["leaf", _STUBBORN]], str(tmp_path), {}])
    nested = f"import os, sys; os.execv({sys.executable!r}, [{sys.executable!r}, '-c', {_SUPERVISOR!r}, {inner!r}])"
    supervisor = Supervisor(tmp_path, [("stubborn", _STUBBORN), ("nested", nested)])
    wait_until(lambda: "up" in supervisor.log("stubborn") and "up" in supervisor.log("leaf"))
    pids = supervisor.children()
    pids += [leaf for pid in pids for leaf in child_pids(pid)]
    assert len(pids) == 3
    supervisor.process.kill()
    supervisor.finish()
    wait_until(lambda: all(is_gone(pid) for pid in pids), timeout_s=5)


def test_children_have_sessions_of_their_own(tmp_path: Path) -> None:
    """So that Ctrl-C in a terminal does not reach them."""
    supervisor = Supervisor(tmp_path, [("steady", _SLEEP)])
    supervisor.wait_until_up()
    (pid,) = supervisor.children()
    assert os.getsid(pid) == pid != os.getsid(supervisor.process.pid)
    supervisor.process.terminate()
    assert supervisor.finish()[0] == 0


def _child(tmp_path: Path, *argv: str) -> Child:
    return Child("child", argv, tmp_path / "child.log")


def _python(tmp_path: Path, code: str) -> Child:
    return _child(tmp_path, sys.executable, "-I", "-S", "-c", code)


async def test_work_beside_the_children_may_end_early(tmp_path: Path) -> None:
    reports: list[str] = []
    done = asyncio.Event()

    async def beside() -> None:
        done.set()

    child = _python(tmp_path, "import time; time.sleep(0.3)")
    assert await run_until_exit([child], beside=beside, say=reports.append) == 1
    assert done.is_set()
    log = tmp_path / "child.log"
    assert reports == [f"the log of child ends:\n  | (empty)\nchild exited with status 0; its log is {log}"]


async def test_work_beside_the_children_is_cancelled_when_one_dies(tmp_path: Path) -> None:
    cancelled = asyncio.Event()

    async def beside() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    assert await run_until_exit([_python(tmp_path, "")], beside=beside, say=lambda _: None) == 1
    assert cancelled.is_set()


async def test_an_error_beside_the_children_stops_them(tmp_path: Path) -> None:
    pids: list[int] = []
    others = set(child_pids(os.getpid()))

    async def beside() -> None:
        pids.extend(set(child_pids(os.getpid())) - others)
        raise RuntimeError("beside")

    with pytest.raises(RuntimeError, match="beside"):
        await run_until_exit([_python(tmp_path, _SLEEP)], beside=beside)
    assert pids
    assert not set(pids) & set(child_pids(os.getpid())), "stopped and reaped"


async def test_a_program_that_is_not_there_is_reported(tmp_path: Path) -> None:
    reports: list[str] = []
    assert await run_until_exit([_child(tmp_path, "/no/such/program")], say=reports.append) == 1
    assert "cannot start /no/such/program: No such file or directory" in reports[0]


async def test_environment_and_arguments_reach_the_child(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['HERE'], 'HOME' in os.environ, sys.argv[1:])"
    argv = [sys.executable, "-I", "-S", "-c", code, "--flag", "a b"]
    await run_until_exit([Child("child", argv, tmp_path / "log", {"HERE": "x"})], say=lambda _: None)
    assert (tmp_path / "log").read_text() == "x False ['--flag', 'a b']\n"


def test_a_module_does_not_run_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless this process itself imports from there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["/elsewhere"])
    assert python_module("some_service") == [sys.executable, "-P", "-m", "some_service"]
    monkeypatch.setattr(sys, "path", [str(tmp_path), "/elsewhere"])
    assert python_module("some_service") == [sys.executable, "-m", "some_service"]
