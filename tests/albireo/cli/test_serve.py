"""``albireo serve``: what it refuses, how it starts the services, and how it ends, with services that are not real."""

import fcntl
import json
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from albireo.cli import serve
from albireo.cli.main import main
from albireo.cli.run_dir import RunDir, open_run_dir
from albireo.cli.serve import ServeConfig, check_config, child_processes, client_target, parse_config, ready_message
from albireo.errors import ConfigError
from albireo.v1 import plan_pb2


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short, because paths of unix sockets are."""
    return tmp_path_factory.mktemp("s")


@pytest.fixture
def model(tmp_path: Path) -> str:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 1003,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
    }
    path = tmp_path / "tiny"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


@pytest.fixture(params=[False, True], ids=["exclusive", "shared"])
def taken_port(request: pytest.FixtureRequest) -> Iterator[int]:
    """In use; also by a server that would share it, as front ends do."""
    with socket.socket() as listener:
        if request.param:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_taken_port(model: str, taken_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", model, "--port", str(taken_port)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"albireo: --port {taken_port}: cannot listen at 127.0.0.1:{taken_port}: Address already in use"
    )
    assert error.count("\n") == 1


def test_a_taken_metrics_port(model: str, taken_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    """All that will be used are tried: the second front end's is the fourth."""
    argv = ["serve", model, "--port", "0", "--frontends", "2", "--metrics-port", str(taken_port - 3)]
    assert main(argv) == 2
    assert f"--metrics-port {taken_port}: cannot listen" in capsys.readouterr().err


def test_metrics_ports_that_take_the_clients_port(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert main(["serve", model, "--port", str(port), "--metrics-port", str(port)]) == 2
    assert f"its range takes {port}, the clients' port" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--tp", "3"], "--tp 3: 8 attention heads of tiny do not divide by it"),
        (["--tp", "-1"], "--tp -1: must not be negative"),
        (["--frontends", "0"], "--frontends 0: at least 1"),
        (["--depth", "-1"], "--depth -1: at least 1"),
        (["--max-streams", "0"], "--max-streams 0: at least 1"),
        (["--drain-timeout", "-1"], "--drain-timeout -1.0: a positive number"),
        (["--recovery-timeout", "0"], "--recovery-timeout 0.0: a positive number"),
        (["--max-num-seqs", "-1"], "--max-num-seqs -1: must not be negative"),
        (["--kv-cache-gib", "-0.5"], "--kv-cache-gib -0.5: must not be negative"),
        (["--port", "65536"], "--port 65536: not a port"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid: "),
        (["--host", "192.0.2.1"], "cannot listen at 192.0.2.1:0: Cannot assign requested address"),
        (["--run-dir", "/tmp/" + "x" * 90], "too long for unix sockets"),
        (["--run-dir", "/dev/null/x"], "--run-dir /dev/null/x: Not a directory"),
        (["--ready-file", "/no/such/dir/file"], "--ready-file /no/such/dir/file: its directory does not exist"),
    ],
)
def test_what_could_not_work(model: str, argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", model, "--port", "0", *argv]) == 2
    out, error = capsys.readouterr()
    assert error.startswith("albireo: ")
    assert complaint in error
    assert error.count("\n") == 1
    assert not out


@pytest.mark.parametrize("name", ["/no/such/dir", "nothing"])
def test_a_model_that_is_not_there(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", name]) == 2
    assert capsys.readouterr().err.startswith(f"albireo: model '{name}': no such directory, not a Hub id")


def test_the_stub_models_any_number_of_ranks(model: str) -> None:
    assert check_config(ServeConfig(model=model, tp=64, engine="stub", port=0)).tp == 64


def test_model_by_position_flag_variable_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[albireo]\nmodel = "file"\ntp = 2\n')
    assert parse_config([]).model == "demo"
    assert parse_config(["--config", str(file)]) == ServeConfig(model="file", tp=2)
    monkeypatch.setenv("ALBIREO_MODEL", "variable")
    assert parse_config(["--config", str(file)]).model == "variable"
    assert parse_config(["--model", "flag"]).model == "flag"
    assert parse_config(["positional", "--tp", "4"]) == ServeConfig(model="positional", tp=4)


def test_help_explains_the_metrics_ports(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["serve", "--help"])
    assert exit_info.value.code == 0
    assert "planner on this port P, worker leader on P+1, front ends from P+2 on" in " ".join(
        capsys.readouterr().out.split()
    )


def test_the_services_are_told_what_was_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALBIREO_TP", "8")
    monkeypatch.setenv("ALBIREO_STARTUP_TIMEOUT", "5")
    config = ServeConfig(
        model="/m", served_model_name="m", engine="stub", tp=2, max_num_seqs=9, metrics_port=9000, drain_timeout=2
    )
    worker, scheduler = child_processes(config, RunDir(tmp_path, keep=True))
    start = worker.argv.index("-m") + 1
    assert worker.argv[start:] == [
        *("worker_svc", "--model", "/m", "--engine", "stub", "--tp", "2", "--device", "auto", "--dtype", "auto"),
        *("--quantize", "none", "--sampler", "merge", "--max-num-seqs", "9"),
        *("--listen", f"unix:{tmp_path}/group.sock", "--run-dir", f"{tmp_path}/group"),
        *("--log-level", "info", "--metrics-port", "9001"),
    ]
    assert scheduler.argv[start:] == [
        *("scheduler_svc", "--model", "/m", "--served-model-name", "m", "--group", f"unix:{tmp_path}/group.sock"),
        *("--planner", f"unix:{tmp_path}/planner.sock", "--host", "127.0.0.1", "--port", "50051", "--frontends", "1"),
        *("--depth", "2", "--max-waiting", "4096", "--prefix-cache", "on", "--max-streams", "4096"),
        *("--recovery-timeout", "30.0", "--drain-timeout", "2"),
        *("--run-dir", str(tmp_path), "--log-level", "info", "--metrics-port", "9000"),
    ]
    assert "ALBIREO_TP" not in worker.env, "what serve reads must not reach the services a second way"
    assert worker.env["ALBIREO_STARTUP_TIMEOUT"] == "5", "what it does not know must"


def test_profiles_are_written_where_the_operator_says(tmp_path: Path) -> None:
    """Where nothing is said, the scheduler knows a place."""
    for config, given in ((ServeConfig(profile_dir="/p"), ["--profile-dir", "/p"]), (ServeConfig(), [])):
        scheduler = child_processes(config, RunDir(tmp_path, keep=True))[-1]
        assert [word for word in scheduler.argv if word in ("--profile-dir", "/p")] == given


@pytest.mark.parametrize(
    ("host", "port", "target"),
    [
        ("127.0.0.1", 50051, "127.0.0.1:50051"),
        ("0.0.0.0", 1234, "127.0.0.1:1234"),
        ("::", 1234, "[::1]:1234"),
        ("localhost", 1234, "localhost:1234"),
    ],
)
def test_the_ready_message_says_how_to_query(tmp_path: Path, host: str, port: int, target: str) -> None:
    config = ServeConfig(served_model_name="demo", host=host, port=port)
    assert client_target(config) == target
    info = plan_pb2.GroupInfo(engine="stub", device="cpu", dtype="float32", tp_size=2)
    message = ready_message(config, info, RunDir(tmp_path, keep=True))
    assert message.startswith(f"demo is served at {target} (stub, modelled, TP 2)")
    assert ("--target" in message) == (port != 50051)


def test_a_temporary_run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr("albireo.cli.run_dir._MAX_PATH_BYTES", 200)
    with open_run_dir(None) as run_dir:
        assert run_dir.path.parent == tmp_path
        assert stat.S_IMODE(run_dir.path.stat().st_mode) == 0o700
        assert run_dir.logs.is_dir()
        assert run_dir.group.is_dir()
    assert not run_dir.path.exists()
    with open_run_dir(None) as run_dir:
        run_dir.keep = True
    assert run_dir.path.exists()


def test_a_runtime_dir_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/no/such/dir")
    with open_run_dir(None) as run_dir:
        assert run_dir.path.parent == Path("/tmp")


def test_a_run_dir_in_use(tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    with open_run_dir(path), pytest.raises(ConfigError, match="another server is using it"), open_run_dir(path):
        pass
    with open_run_dir(path) as run_dir:
        assert run_dir.keep, "what the user named is the user's"
    assert (tmp_path / "run").exists()
    with (tmp_path / "run" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# Services that are not real: the worker loads for a while, the scheduler has a health service.
_WORKER = """
import asyncio, pathlib, sys
import grpc
from albireo import rpc
from albireo.v1 import plan_pb2 as pb, plan_pb2_grpc
class Group(plan_pb2_grpc.WorkerGroupServicer):
    num_calls = 0
    async def GetStatus(self, request, context):
        Group.num_calls += 1
        if Group.num_calls < 4:
            return pb.GroupStatus(state=1, stage="reading weights", progress=Group.num_calls / 4)
        return pb.GroupStatus(state=2, info=pb.GroupInfo(engine="stub", device="cpu", dtype="float32", tp_size=2))
    async def Run(self, plans, context): ...
async def main():
    server = rpc.make_server()
    plan_pb2_grpc.add_WorkerGroupServicer_to_server(Group(), server)
    server.add_insecure_port(sys.argv[sys.argv.index("--listen") + 1])
    await server.start()
    print("worker is up", flush=True)
    {act}
    await server.wait_for_termination()
asyncio.run(main())
"""
_SCHEDULER = """
import asyncio, sys
from albireo import rpc
async def main():
    server = rpc.make_server()
    health = await rpc.add_health(server, [])
    server.add_insecure_port("127.0.0.1:" + sys.argv[sys.argv.index("--port") + 1])
    server.add_insecure_port("unix:" + sys.argv[sys.argv.index("--run-dir") + 1] + "/frontend-0.sock")
    await server.start()
    await asyncio.sleep(0.3)
    await health.set_serving(True)
    await server.wait_for_termination()
asyncio.run(main())
"""
_LAUNCHER = """
import sys
from albireo.cli import main, serve
serve.python_module = lambda name: [sys.executable, f"{{dir}}/{{name}}.py"]
sys.exit(main.main(["serve", *sys.argv[1:]]))
"""


class Served:
    """`albireo serve` in a process of its own, on services that are not real."""

    def __init__(self, tmp_path: Path, model: str, *argv: str, act: str = "") -> None:
        (tmp_path / "worker_svc.py").write_text(_WORKER.replace("{act}", act))
        (tmp_path / "scheduler_svc.py").write_text(_SCHEDULER)
        self.ready_file = tmp_path / "ready"
        launcher = _LAUNCHER.replace("{{dir}}", str(tmp_path)).replace("{{name}}", "{name}")
        flags = ["--port", "0", "--engine", "stub", "--tp", "2", "--ready-file", str(self.ready_file), *argv]
        self.process = subprocess.Popen(
            [sys.executable, "-c", launcher, model, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_from_start_to_ctrl_c(tmp_path: Path, model: str, number: signal.Signals) -> None:
    (tmp_path / "ready").write_text("stale")
    served = Served(tmp_path, model, "--run-dir", str(tmp_path / "run"))
    wait_until(lambda: served.ready_file.exists() and served.ready_file.read_text() != "stale")
    target = served.ready_file.read_text()
    served.process.send_signal(number)
    code, out, err = served.finish()
    assert code == 0
    assert target.startswith("127.0.0.1:")
    assert out.startswith(f"tiny is served at {target.strip()} (stub, modelled, TP 2)")
    assert f"--target {target.strip()}" in out
    assert "albireo: reading weights\n" in err
    assert (tmp_path / "run" / "logs" / "worker.log").read_text() == "worker is up\n"


def test_a_service_that_dies_while_loading(tmp_path: Path, model: str) -> None:
    served = Served(tmp_path, model, "--run-dir", str(tmp_path / "run"), act="raise ValueError('no weights')")
    code, out, err = served.finish()
    assert (code, out) == (1, "")
    assert "worker exited with status 1" in err
    assert str(tmp_path / "run" / "logs" / "worker.log") in err
    assert "ValueError: no weights" in err
    assert not served.ready_file.exists()


def test_a_service_that_dies_is_started_again(tmp_path: Path, model: str) -> None:
    act = "flag = pathlib.Path(sys.argv[0] + '.died'); flag.exists() or (flag.touch(), sys.exit(3))"
    served = Served(tmp_path, model, "--run-dir", str(tmp_path / "run"), act=act)
    wait_until(served.ready_file.exists)
    served.process.send_signal(signal.SIGTERM)
    code, _, err = served.finish()
    assert code == 0
    assert f"worker exited with status 3 and is started again; its log is {tmp_path}/run/logs/worker.log\n" in err
    assert (tmp_path / "run" / "logs" / "worker.log").read_text().count("worker is up\n") == 2


def test_a_service_that_cannot_start(tmp_path: Path, model: str) -> None:
    """Its report, whose end names the log of the process which failed, is what the user sees."""
    act = "print('rank-1 exited with status 2; its log is /run/rank-1.log'); sys.exit(2)"
    served = Served(tmp_path, model, "--run-dir", str(tmp_path / "run"), act=act)
    code, out, err = served.finish()
    assert (code, out) == (2, "")
    assert "  | rank-1 exited with status 2; its log is /run/rank-1.log\n" in err
    assert err.splitlines()[-1].startswith("worker exited with status 2; its log is ")


def test_the_temporary_run_dir_is_kept_for_the_logs_of_the_dead(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/no/such/dir")
    monkeypatch.setattr(serve, "python_module", lambda name: [sys.executable, "-c", f"print('{name} here')"])
    assert main(["serve", model, "--port", "0"]) == 1
    error = capsys.readouterr().err
    log = Path(next(word for word in error.split() if word.endswith(".log")))
    assert "here" in log.read_text()
    shutil.rmtree(log.parent.parent)


def test_what_is_left_to_a_service_is_not_passed_on(tmp_path: Path) -> None:
    worker, scheduler = child_processes(replace(ServeConfig(), model="/m"), RunDir(tmp_path, keep=True))
    passed_on = {*worker.argv, *scheduler.argv}
    assert not {"--max-num-seqs", "--max-model-len", "--kv-cache-gib", "--metrics-port"} & passed_on
