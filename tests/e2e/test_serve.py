"""`albireo serve` as a user runs it, queried with `albireo generate` and what operators use."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from services import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.alone]


class Server:
    """A running `albireo serve`; its output in ``log``."""

    def __init__(self, tmp_path: Path, *flags: str) -> None:
        self.log = tmp_path / "serve.log"
        self._ready_file = tmp_path / "ready"
        argv = [sys.executable, "-m", "albireo", "serve", *flags, "--port", "0", "--ready-file", str(self._ready_file)]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(argv, stdout=output, stderr=subprocess.STDOUT)

    def wait_until_ready(self) -> str:
        """The server's address."""
        deadline = time.monotonic() + 120
        while not self._ready_file.exists():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)
        return self._ready_file.read_text().strip()

    def stop(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(20)


def generate(target: str, *argv: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "albireo", "generate", *argv, "--target", target]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def metrics_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, stub_model: Path, metrics_port: int
) -> Iterator[tuple[Server, str]]:
    flags = ["--engine", "stub", "--tp", "2", "--frontends", "2", "--metrics-port", str(metrics_port)]
    tmp_path = tmp_path_factory.mktemp("serve")
    server = Server(tmp_path, str(stub_model), *flags, "--first-prompt", "import os")
    try:
        yield server, server.wait_until_ready()
    finally:
        status = server.stop(signal.SIGINT)
    assert status == 0, server.log.read_text()


def test_it_says_how_to_query_it_and_shows_a_completion(server):
    process, target = server
    output = process.log.read_text()
    assert f"served at {target} (stub, modelled" in output
    assert f"--target {target}" in output
    assert "import os" in output


def test_json_answers_are_whole_and_repeatable(server):
    _, target = server
    first, second = (
        generate(target, "import os", "--json", "--max-tokens", "9", "--seed", "3", "--ignore-eos") for _ in range(2)
    )
    assert first.returncode == 0, first.stderr
    answer = json.loads(first.stdout)
    assert answer == json.loads(second.stdout)
    assert len(answer["token_ids"]) == 9
    assert answer["finish_reason"] == "length"
    assert answer["usage"] == {
        "prompt_tokens": len(answer["prompt_token_ids"]),
        "completion_tokens": 9,
        "cached_tokens": 0,
    }


def test_streamed_text_is_the_text_of_the_json_answer(server):
    _, target = server
    flags = ["def f(x):", "--max-tokens", "12", "--seed", "1", "--ignore-eos"]
    streamed, whole = generate(target, *flags), generate(target, *flags, "--json")
    assert streamed.returncode == 0, streamed.stderr
    assert streamed.stdout.rstrip("\n") == json.loads(whole.stdout)["text"].rstrip("\n")


def test_a_file_of_prompts_is_answered_in_order_with_errors_in_their_place(server, tmp_path: Path):
    _, target = server
    lines = [
        {"prompt": "a", "max_tokens": 3, "ignore_eos": True},
        {"prompt_token_ids": [5, 6], "max_tokens": 4, "ignore_eos": True, "temperature": 0},
        {"prompt_token_ids": [5, 1003], "max_tokens": 4},
        {"prompt": "b", "max_tokens": 0},
        {"prompt": "c", "temprature": 1},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = generate(target, "--prompts", str(file))
    assert result.returncode == 1
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [len(answer["token_ids"]) for answer in answers[:2]] == [3, 4]
    errors = [answer["error"] for answer in answers[2:]]
    assert {error["code"] for error in errors} == {"INVALID_ARGUMENT"}
    for word, error in zip(("1003", "max_tokens", "temprature"), errors, strict=True):
        assert word in error["message"]


def test_metrics_reflection_and_health_are_there(server, metrics_port: int):
    _, target = server
    wanted = {0: "albireo_planned_steps_total", 1: "albireo_worker_steps_total", 2: "albireo", 3: "albireo"}
    for offset, name in wanted.items():
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port + offset}/metrics", timeout=5) as answer:
            assert name in answer.read().decode()
    with grpc.insecure_channel(target) as channel:
        names = set(ProtoReflectionDescriptorDatabase(channel).get_services())
    assert {"albireo.v1.Generation", "vllm.grpc.engine.VllmEngine", "grpc.health.v1.Health"} <= names


def children_of(pid: int) -> list[int]:
    with contextlib.suppress(OSError):  # gone meanwhile
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def ranks_of(server: Server) -> dict[int, int]:
    """Rank -> pid: the grandchildren that run `worker_svc --rank`."""
    found = {}
    for pid in (grandchild for child in children_of(server.process.pid) for grandchild in children_of(child)):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"--rank" in words:
                found[int(words[words.index(b"--rank") + 1])] = pid
    return found


def named_log(output: str, name: str) -> Path:
    found = re.search(rf"\S+/{name}\.log", output)
    assert found is not None, output
    return Path(found.group())


def test_a_dead_rank_is_healed_and_the_answers_stay_the_same(tmp_path: Path, stub_model: Path):
    server = Server(tmp_path, str(stub_model), "--engine", "stub", "--tp", "2")
    target = server.wait_until_ready()
    flags = ["import os", "--json", "--max-tokens", "9", "--seed", "3", "--ignore-eos"]
    try:
        before = generate(target, *flags)
        assert before.returncode == 0, before.stderr
        for rank in (1, 0):
            pid = ranks_of(server)[rank]
            os.kill(pid, signal.SIGKILL)
            after = generate(target, *flags)
            assert after.returncode == 0, after.stderr
            assert json.loads(after.stdout)["token_ids"] == json.loads(before.stdout)["token_ids"]
            assert ranks_of(server)[rank] != pid
    finally:
        assert server.stop(signal.SIGTERM) == 0, server.log.read_text()


def test_a_configuration_that_no_rank_takes_ends_the_server_with_the_name_of_its_log(tmp_path: Path, stub_model: Path):
    flags = ["--engine", "stub", "--tp", "2", "--max-num-seqs", "64", "--max-num-batched-tokens", "8"]
    server = Server(tmp_path, str(stub_model), *flags)
    assert server.process.wait(30) == 2
    output = server.log.read_text()
    assert "so a step could not decode every sequence" in output
    assert re.search(r"rank-[01] exited with status 2; its log is \S+/rank-[01].log\n", output), output
    shutil.rmtree(named_log(output, "worker").parents[1])


def test_a_rank_that_never_starts_ends_the_server_with_the_name_of_its_log(tmp_path: Path, stub_model: Path):
    server = Server(tmp_path, str(stub_model), "--engine", "stub", "--tp", "2")
    while server.process.poll() is None:
        if pid := ranks_of(server).get(1):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    assert server.process.returncode == 1
    output = server.log.read_text()
    assert "rank-1 was killed by SIGKILL, failing to start 5 times in a row" in output
    assert named_log(output, "rank-1").exists()
    shutil.rmtree(named_log(output, "worker").parents[1])


def test_sigterm_stops_everything_cleanly(tmp_path: Path, stub_model: Path):
    server = Server(tmp_path, str(stub_model), "--engine", "stub")
    target = server.wait_until_ready()
    run_dir = re.search(r"logs:\s+(\S+)/logs", server.log.read_text())
    assert run_dir is not None
    ranks = ranks_of(server).values()
    assert server.stop(signal.SIGTERM) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert not Path(run_dir.group(1)).exists()
    assert generate(target, "x").returncode == 1
