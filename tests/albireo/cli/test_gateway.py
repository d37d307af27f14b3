"""`albireo serve --http`: what it refuses and how it starts the gateway; the tests in e2e run it."""

import importlib.util
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from albireo.child import Roll
from albireo.cli import gateway
from albireo.cli.ports import address
from albireo.cli.run_dir import RunDir
from albireo.cli.serve import ServeConfig, check_config, child_processes, parse_config, ready_message
from albireo.errors import ConfigError
from albireo.v1 import plan_pb2

HTTP = ServeConfig(model="demo", engine="stub", tp=1, port=0, http=0)


def test_without_the_flag_there_is_no_gateway(tmp_path: Path) -> None:
    config = parse_config([])
    assert config.http is None
    names = [child.name for child in child_processes(config, RunDir(tmp_path, keep=True))]
    assert names == ["worker", "scheduler"]


def test_zero_is_any_free_port() -> None:
    config = check_config(HTTP)
    assert config.http
    assert config.port != config.http


def test_a_gateway_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--http needs the package smg: pip install 'albireo\[gateway\]'"):
        check_config(HTTP)


def test_http_and_grpc_have_ports_of_their_own() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ConfigError, match=f"--http {port}: gRPC clients connect to this port"):
        check_config(replace(HTTP, port=port, http=port))
    with pytest.raises(ConfigError, match=f"--metrics-port {port - 3}: its range takes {port}, the clients' port"):
        check_config(replace(HTTP, http=port, metrics_port=port - 3))


def test_a_taken_port_and_a_host_that_is_none() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--http {port}: cannot listen at 127.0.0.1:{port}: Address already"):
            check_config(replace(HTTP, http=port))
    with pytest.raises(ConfigError, match=r"--http-host no\.such\.host\.invalid: "):
        check_config(replace(HTTP, http_host="no.such.host.invalid"))


@pytest.mark.parametrize("flag", ["tls_cert", "auth_token_file"])
def test_a_gateway_has_nothing_to_show_to_guarded_front_ends(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"--http with --{flag.replace('_', '-')}: "):
        check_config(replace(HTTP, **{flag: "file"}))


def test_a_key_is_needed_beyond_loopback(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("a-key-of-20-letters!\n")
    with pytest.raises(ConfigError, match=r"--http-api-key-file .*key: a token with other characters than letters"):
        check_config(replace(HTTP, http_api_key_file=str(key)))
    key.write_text("short\n")
    with pytest.raises(ConfigError, match=r"--http-api-key-file .*key: a token of 5 characters; at least 16"):
        check_config(replace(HTTP, http_api_key_file=str(key)))
    with pytest.raises(ConfigError, match=r"--http-api-key-file /no/key: No such file"):
        check_config(replace(HTTP, http_api_key_file="/no/key"))
    with pytest.raises(ConfigError, match=r"--http-api-key-file /no/key: without --http nobody asks for the key"):
        check_config(replace(HTTP, http=None, http_api_key_file="/no/key"))
    with pytest.raises(ConfigError, match=r"--http-host 0\.0\.0\.0: beyond loopback only with --http-api-key-file"):
        check_config(replace(HTTP, http_host="0.0.0.0"))
    for host in ("127.0.0.1", "localhost"):
        assert check_config(replace(HTTP, http_host=host)).http
    key.write_text("a-key-of-20-letters-\n")
    assert check_config(replace(HTTP, http_host="0.0.0.0", http_api_key_file=str(key))).http


def test_the_gateway_reads_the_key_by_itself(tmp_path: Path) -> None:
    """Where it stays out of `ps`."""
    config = replace(HTTP, http=8000, http_api_key_file="/etc/it's a key")
    argv = child_processes(config, RunDir(tmp_path, keep=True))[-1].argv
    assert argv[argv.index("--http-api-key-file") + 1] == "/etc/it's a key"
    message = ready_message(config, plan_pb2.GroupInfo(engine="stub"), RunDir(tmp_path, keep=True))
    assert """-H "authorization: Bearer $(cat '/etc/it'"'"'s a key')\"""" in message


def test_the_gateway_stops_first_and_outlives_a_rolling_restart(tmp_path: Path) -> None:
    config = replace(HTTP, port=50051, http=8000, host="0.0.0.0", frontends=3, metrics_port=9000, drain_timeout=2.0)
    worker, scheduler, child = child_processes(config, RunDir(tmp_path, keep=True))
    assert child.stage > scheduler.stage > worker.stage
    assert child.roll is Roll.KEEP
    assert child.argv[child.argv.index("-m") + 1 :] == [
        *("albireo.cli.gateway", "--target", "127.0.0.1:50051", "--host", "127.0.0.1", "--port", "8000"),
        *("--recovery-timeout", "30.0", "--drain-timeout", "2.0", "--log-level", "info", "--metrics-port", "9005"),
    ]


def test_the_ready_message_shows_curl(tmp_path: Path) -> None:
    config = replace(HTTP, served_model_name="it's", http=8000, http_host="::")
    message = ready_message(config, plan_pb2.GroupInfo(engine="stub"), RunDir(tmp_path, keep=True))
    assert "HTTP:  curl http://[::1]:8000/v1/completions" in message
    assert address("0.0.0.0", 1) == "127.0.0.1:1"


def test_where_nobody_answers_no_gateway_is_ready() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert not gateway.is_ready("127.0.0.1", closed.getsockname()[1])
