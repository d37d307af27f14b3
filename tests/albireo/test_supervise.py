"""Children are kept running and die with their parent, in order, and say why; nothing is left behind."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from albireo import child as child_module
from albireo import supervise as supervise_module
from albireo.child import Child, Roll, python_module
from albireo.supervise import MAX_FAILURES, supervise

pytestmark = pytest.mark.alone

# A supervisor as a process of its own: children given as (name, code, further fields), logs in a directory, constants.
_SUPERVISOR = """
import asyncio, json, sys
from pathlib import Path
from albireo import child, supervise
children, logs, options, constants = json.loads(sys.argv[1])
for name, value in constants.items():
    setattr(child if hasattr(child, name) else supervise, name, value)
python = [sys.executable, "-I", "-S", "-c"]
children = [
    child.Child(name, [*python, code], Path(logs) / f"{name}.log",
        **{"watched": False, **more, "roll": child.Roll[more.get("roll", "RESTART")]})
    for name, code, more in children
]
sys.exit(asyncio.run(supervise.supervise(children, **options)))
"""
_SLEEP = "import time; print('up', flush=True); time.sleep(60)"
_STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
# Takes its time to stop, and writes down when it has.
_ORDERLY = """
import signal, sys, time
def stop(*_):
    time.sleep({seconds})
    open({journal!r}, "a").write("{name}\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("up", flush=True)
time.sleep(60)
"""
# Does what it must, writes down when it is ready and when it was told to end.
_SERVICE = """
import os, signal, socket, sys, time
def note(what):
    print(what, os.getpid(), flush=True)
    with open({journal!r}, "a") as file:
        file.write(f"{name} {{what}} {{os.getpid()}}\\n")
def stop(*_):
    note("told")
    time.sleep(0.2)
    note("gone")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
def tell(message):
    try:
        notify.sendto(message, os.environ["NOTIFY_SOCKET"])
    except OSError:
        pass
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.setblocking(False)
tell(b"WATCHDOG=1")
time.sleep(0.2)
note("up")
tell(b"WATCHDOG=1\\nREADY=1")
while True:
    time.sleep(0.05)
    tell(b"WATCHDOG=1")
"""


def orderly(journal: Path, name: str, seconds: float = 0.1) -> str:
    return _ORDERLY.format(journal=str(journal), name=name, seconds=seconds)


def service(journal: Path, name: str) -> str:
    return _SERVICE.format(journal=str(journal), name=name)


def nested(logs: Path, children: Sequence[tuple[str, str, dict[str, Any]]], **constants: float) -> str:
    """The code of a child that is a supervisor itself."""
    argument = json.dumps([children, str(logs), {}, constants])
    return f"import os; os.execv({sys.executable!r}, [{sys.executable!r}, '-c', {_SUPERVISOR!r}, {argument!r}])"


class Supervisor:
    """A supervisor under test."""

    def __init__(
        self,
        logs: Path,
        children: Sequence[tuple[str, str] | tuple[str, str, dict[str, Any]]],
        constants: dict[str, float] | None = None,
        **options: Any,
    ) -> None:
        self.logs = logs
        self.names = [name for name, *_ in children]
        whole = [(*each, {})[:3] for each in children]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SUPERVISOR, json.dumps([whole, str(logs), options, constants or {}])],
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

    def stop(self) -> str:
        """Ends it in order; returns what it said."""
        self.process.terminate()
        code, errors = self.finish()
        assert code == 0, errors
        return errors


def child_pids(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def state(pid: int) -> str:
    """Its letter in ps; empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def is_gone(pid: int) -> bool:
    """Dead and reaped, or dead and left to an init that reaps late."""
    return state(pid) in ("", "Z")


def wait_until(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def events(journal: Path) -> list[tuple[str, str, int]]:
    """Who did what, with its pid, in order."""
    lines = journal.read_text().splitlines() if journal.exists() else []
    return [(name, what, int(pid)) for name, what, pid in (line.split() for line in lines)]


def pids_up(journal: Path, name: str) -> list[int]:
    return [pid for who, what, pid in events(journal) if (who, what) == (name, "up")]


@pytest.mark.parametrize(
    ("last_act", "how"),
    [
        ("os.kill(os.getpid(), 9)", "was killed by SIGKILL"),
        ("sys.exit(3)", "exited with status 3"),
        ("sys.exit(0)", "exited with status 0"),
    ],
)
def test_a_dead_child_is_started_again_alone(tmp_path: Path, last_act: str, how: str) -> None:
    dying = f"import os, sys\nif not os.path.exists({str(tmp_path / 'dying.again')!r}):\n"
    dying += f"    open({str(tmp_path / 'dying.again')!r}, 'w')\n    {last_act}\n{_SLEEP}"
    supervisor = Supervisor(tmp_path, [("steady", _SLEEP), ("dying", dying)])
    supervisor.wait_until_up()
    assert len(supervisor.children()) == 2
    assert supervisor.log("steady") == "up\n"
    errors = supervisor.stop()
    assert errors == f"dying {how} and is started again; its log is {tmp_path / 'dying.log'}\n"


def test_a_child_killed_again_and_again_is_healed_as_long_as_it_gets_ready(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    supervisor = Supervisor(tmp_path, [("service", service(journal, "service"), {"watched": True})])
    for deaths in range(MAX_FAILURES + 2):
        wait_until(lambda deaths=deaths: len(pids_up(journal, "service")) > deaths)
        time.sleep(0.05)
        os.kill(pids_up(journal, "service")[-1], signal.SIGKILL)
    wait_until(lambda: len(pids_up(journal, "service")) > MAX_FAILURES + 2)
    assert supervisor.stop().count("was killed by SIGKILL and is started again") == MAX_FAILURES + 2


@pytest.mark.parametrize("last_act", ["sys.exit(0)", "os.kill(os.getpid(), 11)", "raise ValueError('no such luck')"])
def test_a_child_that_never_starts_ends_all_and_is_named(tmp_path: Path, last_act: str) -> None:
    dying = f"import os, sys\nfor i in range(100): print(f'line {{i}}', flush=True)\n{last_act}"
    supervisor = Supervisor(tmp_path, [("steady", _SLEEP), ("dying", dying)], {"_BACKOFF_S": 0.01})
    code, errors = supervisor.finish()
    assert code == 1
    assert supervisor.log("dying").count("line 99\n") == MAX_FAILURES
    assert f", failing to start {MAX_FAILURES} times in a row; its log is {tmp_path / 'dying.log'}" in errors
    assert "line 99\n" in errors, "the end of the log"
    assert "line 50\n" not in errors, "but not all of it"
    assert ("no such luck" in errors) == ("luck" in last_act), "stderr goes to the log as well"
    assert "steady" not in errors


def test_status_2_ends_all_at_once(tmp_path: Path) -> None:
    """A restart cannot help, says the child; also through a supervisor between, whose log ends with its report."""
    leaf = "import sys\nfor i in range(100): print(f'line {i}')\nsys.exit(2)"
    middle = nested(tmp_path, [("leaf", leaf, {}), ("other", _SLEEP, {})])
    supervisor = Supervisor(tmp_path, [("middle", middle, {"supervises": True}), ("steady", _SLEEP)])
    code, errors = supervisor.finish()
    assert code == 2
    assert supervisor.log("leaf").count("line 0\n") == 1
    assert "  |   | line 99\n" in errors
    assert f"| leaf exited with status 2; its log is {tmp_path / 'leaf.log'}\n" in errors
    assert errors.splitlines()[-1] == f"middle exited with status 2; its log is {tmp_path / 'middle.log'}"


def test_a_supervisor_that_gave_up_is_not_started_again(tmp_path: Path) -> None:
    middle = nested(tmp_path, [("leaf", "print('x'); raise SystemExit(7)", {})], _BACKOFF_S=0.01)
    supervisor = Supervisor(tmp_path, [("middle", middle, {"supervises": True})])
    code, errors = supervisor.finish()
    assert code == 1
    assert supervisor.log("leaf") == "x\n" * MAX_FAILURES
    assert (
        f"| leaf exited with status 7, failing to start 5 times in a row; its log is {tmp_path / 'leaf.log'}" in errors
    )
    assert errors.splitlines()[-1] == f"middle exited with status 1; its log is {tmp_path / 'middle.log'}"


def test_a_frozen_child_is_replaced(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    children = [(name, service(journal, name), {"watched": True}) for name in ("frozen", "lively")]
    supervisor = Supervisor(tmp_path, children)
    supervisor.wait_until_up()
    start = time.monotonic()
    os.kill(pids_up(journal, "frozen")[0], signal.SIGSTOP)
    wait_until(lambda: len(pids_up(journal, "frozen")) == 2)
    assert 3.5 < time.monotonic() - start < 7
    assert len(pids_up(journal, "lively")) == 1
    assert supervisor.stop().startswith(
        "killing frozen: it did not answer for 4 s\nfrozen was killed by SIGKILL and is"
    )


def test_a_child_that_never_beats_is_killed_if_it_is_watched(tmp_path: Path) -> None:
    children = [("mute", _SLEEP, {"watched": True}), ("plain", _SLEEP)]
    supervisor = Supervisor(tmp_path, children, {"FIRST_BEAT_S": 0.6})
    wait_until(lambda: supervisor.log("mute") == "up\nup\n")
    assert supervisor.log("plain") == "up\n"
    assert "killing mute: it did not answer for 0.6 s\n" in supervisor.stop()


def test_a_supervisor_that_was_stopped_itself_blames_nobody(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    supervisor = Supervisor(
        tmp_path, [("service", service(journal, "service"), {"watched": True})], {"SILENCE_S": 1.0, "_CHECK_S": 0.1}
    )
    supervisor.wait_until_up()
    (pid,) = supervisor.children()
    os.kill(pid, signal.SIGSTOP)  # both, as when the whole machine sleeps
    supervisor.process.send_signal(signal.SIGSTOP)
    time.sleep(2)
    supervisor.process.send_signal(signal.SIGCONT)
    time.sleep(0.5)
    os.kill(pid, signal.SIGCONT)
    time.sleep(0.5)
    assert supervisor.children() == [pid]
    assert supervisor.stop() == ""


def test_a_supervisor_beats_and_gets_ready_with_its_children(tmp_path: Path) -> None:
    """A frozen one is replaced like any other child, and its own children die with it."""
    journal = tmp_path / "journal"
    middle = nested(tmp_path, [(name, service(journal, name), {"watched": True}) for name in ("a", "b")])
    constants = {"SILENCE_S": 1.5, "_CHECK_S": 0.1}
    supervisor = Supervisor(tmp_path, [("middle", middle, {"watched": True})], constants)
    wait_until(lambda: bool(pids_up(journal, "a") and pids_up(journal, "b")))
    time.sleep(2)  # longer than it may be silent
    (pid,) = supervisor.children()
    leaves = child_pids(pid)
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: len(pids_up(journal, "a")) == len(pids_up(journal, "b")) == 2)
    assert all(is_gone(each) for each in (pid, *leaves))
    supervisor.stop()
    assert all(is_gone(each) for each in pids_up(journal, "a") + pids_up(journal, "b"))


def test_a_rolling_restart_leaves_no_gap(tmp_path: Path) -> None:
    """A child that overlaps is told to end when its successor is ready; one that does not is gone before."""
    journal = tmp_path / "journal"
    plain, overlapping = ("plain", "RESTART"), ("overlapping", "OVERLAP")
    supervisor = Supervisor(
        tmp_path,
        [(name, service(journal, name), {"watched": True, "roll": roll}) for name, roll in (plain, overlapping)]
        + [("kept", service(journal, "kept"), {"watched": True, "roll": "KEEP"})],
    )
    supervisor.wait_until_up()
    supervisor.process.send_signal(signal.SIGUSR2)
    wait_until(lambda: ("overlapping", "gone") in [(name, what) for name, what, _ in events(journal)])
    time.sleep(0.3)
    after_start = events(journal)[3:]
    assert [(name, what) for name, what, _ in after_start] == [
        *(("plain", "told"), ("plain", "gone"), ("plain", "up")),
        *(("overlapping", "up"), ("overlapping", "told"), ("overlapping", "gone")),
    ]
    assert len(supervisor.children()) == 3
    os.kill(pids_up(journal, "overlapping")[-1], signal.SIGKILL)  # the successor is looked after like its predecessor
    wait_until(lambda: len(pids_up(journal, "overlapping")) == 3)
    errors = supervisor.stop().splitlines()
    assert errors[:2] == ["plain is replaced", "overlapping is replaced"]
    assert errors[2].startswith("overlapping was killed by SIGKILL and is started again")
    assert len(errors) == 3


def test_children_are_healed_during_a_rolling_restart(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    slow = service(journal, "slow").replace("time.sleep(0.2)\nnote", "time.sleep(1.5)\nnote")
    supervisor = Supervisor(tmp_path, [("slow", slow, {"roll": "OVERLAP"}), ("other", service(journal, "other"))])
    supervisor.wait_until_up()
    supervisor.process.send_signal(signal.SIGUSR2)
    wait_until(lambda: len(supervisor.children()) == 3)
    supervisor.process.send_signal(signal.SIGUSR2)  # once is enough
    os.kill(pids_up(journal, "slow")[0], signal.SIGKILL)  # its successor is on its way
    os.kill(pids_up(journal, "other")[0], signal.SIGKILL)
    wait_until(lambda: len(pids_up(journal, "other")) == 3)
    assert len(pids_up(journal, "slow")) == 2
    errors = supervisor.stop()
    assert "other was killed by SIGKILL and is started again" in errors
    assert "slow is replaced\nother is replaced\n" in errors
    assert "no rolling restart now" in errors


def test_a_rolling_restart_ends_early_when_a_successor_fails(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    once = f"import os, sys\nif os.path.exists({str(journal)!r}): sys.exit('not twice')\n"
    first, second = once + service(journal, "first"), service(journal, "second")
    supervisor = Supervisor(tmp_path, [("first", first, {"roll": "OVERLAP"}), ("second", second)])
    # Both are up, and the second one has not made the first fail to start.
    wait_until(lambda: "up" in supervisor.log("second"))
    pids = supervisor.children()
    supervisor.process.send_signal(signal.SIGUSR2)
    wait_until(lambda: "not twice" in supervisor.log("first"))
    time.sleep(0.3)
    assert supervisor.children() == pids
    errors = supervisor.stop()
    assert "  | not twice\nfirst exited with status 1, as successor of one that goes on; its log is" in errors
    assert "the rolling restart ends early: the new first did not become ready\n" in errors


def test_a_rolling_restart_is_passed_on_to_supervisors(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    middle = nested(tmp_path, [("leaf", service(journal, "leaf"), {"watched": True})])
    supervisor = Supervisor(tmp_path, [("middle", middle, {"watched": True, "supervises": True})])
    wait_until(lambda: bool(supervisor.children()))
    supervisor.process.send_signal(signal.SIGUSR2)  # too early: nothing is replaced, nobody dies
    wait_until(lambda: bool(pids_up(journal, "leaf")))
    pids = supervisor.children()
    for _ in range(4):  # it may still be too early
        supervisor.process.send_signal(signal.SIGUSR2)
        with contextlib.suppress(AssertionError):
            wait_until(lambda: len(pids_up(journal, "leaf")) == 2, 5)
            break
    assert supervisor.children() == pids
    assert supervisor.stop() == ""
    assert supervisor.log("middle") == "leaf is replaced\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_children_stage_by_stage(tmp_path: Path, number: signal.Signals) -> None:
    journal = tmp_path / "journal"
    stages = {"first": 1, "second": 2, "third": 0}
    children = [(name, orderly(journal, name), {"stage": stage}) for name, stage in stages.items()]
    supervisor = Supervisor(tmp_path, children)
    supervisor.wait_until_up()
    pids = supervisor.children()
    assert len(pids) == 3
    supervisor.process.send_signal(number)
    assert supervisor.finish() == (0, "")
    assert journal.read_text().split() == ["second", "first", "third"]
    assert all(is_gone(pid) for pid in pids)


def test_the_children_of_a_stage_are_told_at_once(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    supervisor = Supervisor(tmp_path, [(f"c{i}", orderly(journal, str(i), 0.7)) for i in range(6)])
    supervisor.wait_until_up()
    start = time.monotonic()
    assert supervisor.stop() == ""
    assert time.monotonic() - start < 6 * 0.7


def test_a_frozen_child_holds_up_the_end_for_the_grace_time_only(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    children = [("frozen", _SLEEP, {"stage": 1}), ("orderly", orderly(journal, "orderly"))]
    supervisor = Supervisor(tmp_path, children, grace_s=0.5)
    supervisor.wait_until_up()
    pid = supervisor.children()[0]
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: state(pid) == "T")  # else SIGTERM might overtake it
    start = time.monotonic()
    assert supervisor.stop() == "killing frozen: still there after 0.5 s\n"
    assert time.monotonic() - start < 3
    assert journal.read_text() == "orderly\n"


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
    middle = nested(tmp_path, [("leaf", _STUBBORN, {})])
    supervisor = Supervisor(tmp_path, [("stubborn", _STUBBORN), ("middle", middle)])
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
    return Child("child", argv, tmp_path / "child.log", watched=False)


def _python(tmp_path: Path, code: str) -> Child:
    return _child(tmp_path, sys.executable, "-I", "-S", "-c", code)


async def test_work_beside_the_children_may_end_early(tmp_path: Path) -> None:
    reports: list[str] = []
    done = asyncio.Event()

    async def beside() -> None:
        done.set()

    child = _python(tmp_path, "import sys, time; time.sleep(0.3); sys.exit(2)")
    assert await supervise([child], beside=beside, say=reports.append) == 2
    assert done.is_set()
    log = tmp_path / "child.log"
    assert reports == [f"the log of child ends:\n  | (empty)\nchild exited with status 2; its log is {log}"]


async def test_work_beside_the_children_is_cancelled_when_all_end(tmp_path: Path) -> None:
    cancelled = asyncio.Event()

    async def beside() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    assert await supervise([_python(tmp_path, "raise SystemExit(2)")], beside=beside, say=lambda _: None) == 2
    assert cancelled.is_set()


async def test_an_error_beside_the_children_stops_them(tmp_path: Path) -> None:
    pids: list[int] = []
    others = set(child_pids(os.getpid()))

    async def beside() -> None:
        while not (started := set(child_pids(os.getpid())) - others):
            await asyncio.sleep(0.01)
        pids.extend(started)
        raise RuntimeError("beside")

    with pytest.raises(RuntimeError, match="beside"):
        await supervise([_python(tmp_path, _SLEEP)], beside=beside)
    assert pids
    assert not set(pids) & set(child_pids(os.getpid())), "stopped and reaped"


async def test_a_program_that_is_not_there_is_reported(tmp_path: Path) -> None:
    reports: list[str] = []
    assert await supervise([_child(tmp_path, "/no/such/program")], say=reports.append) == 2
    assert "cannot start /no/such/program: No such file or directory" in reports[0]


async def test_a_log_that_cannot_be_written_is_raised(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await supervise([_python(tmp_path, _SLEEP), Child("child", ["true"], tmp_path / "no" / "log")])
    assert not child_pids(os.getpid())


async def test_environment_and_arguments_reach_the_child(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['HERE'], 'HOME' in os.environ, sys.argv[1:], flush=True); os._exit(2)"
    argv = [sys.executable, "-I", "-S", "-c", code, "--flag", "a b"]
    await supervise([Child("child", argv, tmp_path / "log", {"HERE": "x"})], say=lambda _: None)
    assert (tmp_path / "log").read_text() == "x False ['--flag', 'a b']\n"


async def test_nothing_is_left_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After restarts, rolling ones and kills: no file descriptor, no socket, no directory."""
    directories: list[Path] = []
    mkdtemp = tempfile.mkdtemp

    def noted(*args: Any, **kwargs: Any) -> str:
        directories.append(Path(mkdtemp(*args, **kwargs)))
        return str(directories[-1])

    monkeypatch.setattr(tempfile, "mkdtemp", noted)
    monkeypatch.setattr(supervise_module, "_BACKOFF_S", 0.01)
    monkeypatch.setattr(child_module, "FIRST_BEAT_S", 0.3)
    await supervise([_python(tmp_path, "raise SystemExit(2)")], say=lambda _: None)  # what the first use opens, stays
    before = len(os.listdir("/proc/self/fd"))
    journal = tmp_path / "journal"
    argv = [sys.executable, "-I", "-S", "-c", service(journal, "service")]

    async def roll_and_stop() -> None:
        while not journal.exists():
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR2)
        while "gone" not in journal.read_text():
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(60)

    mute = Child("mute", [sys.executable, "-c", _SLEEP], tmp_path / "mute.log", roll=Roll.KEEP)
    rolled = Child("rolled", argv, tmp_path / "rolled.log", roll=Roll.OVERLAP)
    assert await supervise([rolled, mute], beside=roll_and_stop, say=lambda _: None) == 0
    assert not child_pids(os.getpid())
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(directories) == 2
    assert not any(each.exists() for each in directories)


def test_a_module_does_not_run_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless this process itself imports from there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["/elsewhere"])
    assert python_module("some_service") == [sys.executable, "-P", "-m", "some_service"]
    monkeypatch.setattr(sys, "path", [str(tmp_path), "/elsewhere"])
    assert python_module("some_service") == [sys.executable, "-m", "some_service"]
