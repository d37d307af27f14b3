"""``albireo generate`` against a server without a model."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from albireo.cli.main import main
from fake_server import FakeServer


def lines_file(tmp_path: Path, *lines: Any) -> str:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(file)


def run(server: FakeServer, *argv: str) -> int:
    return main(["generate", "--target", server.target, *argv])


def test_text(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, "hello", "--max-tokens", "4", "--temperature", "0", "--seed", "7") == 0
    assert capsys.readouterr() == ("t0 t1 t2 t3 \n", "")
    (request,) = server.requests
    assert (request.text, request.sampling_params.seed, request.sampling_params.temperature) == ("hello", 7, 0)
    assert not request.sampling_params.HasField("top_p"), "what was not given is the server's choice"


def test_prompt_from_stdin(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("def f():\n"))
    assert run(server, "-") == 0
    assert server.requests[0].text == "def f():\n"


def test_several_completions_as_text(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, "x", "--n", "2", "--max-tokens", "1") == 0
    assert capsys.readouterr().out == "[1/2]\nt0 \n[2/2]\nt0 \n"


def test_json(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, "ab", "--json", "--max-tokens", "2") == 0
    assert json.loads(capsys.readouterr().out) == {
        "text": "t0 t1 ",
        "prompt_token_ids": [97, 98],
        "token_ids": [0, 1],
        "finish_reason": "length",
        "usage": {"prompt_tokens": 2, "completion_tokens": 2, "cached_tokens": 1},
    }


def test_json_of_several_completions(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, "ab", "--json", "--n", "3") == 0
    answer = json.loads(capsys.readouterr().out)
    assert list(answer) == ["choices"]
    assert [choice["token_ids"] for choice in answer["choices"]] == [[0, 1, 2]] * 3
    assert all(choice["prompt_token_ids"] == [97, 98] for choice in answer["choices"])


def test_logprobs_as_text_and_json(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    """A line per token below the text."""
    assert run(server, "x", "--max-tokens", "2", "--logprobs", "1") == 0
    text, _, *lines = capsys.readouterr().out.splitlines()
    assert text == "t0 t1 "
    assert [line.split() for line in lines] == [
        ["token", "logprob", "rank", "likeliest"],
        ["0", "-0.5000", "1", "0:", "-0.5000"],
        ["1", "-1.5000", "2", "0:", "-0.5000"],
    ]
    assert run(server, "x", "--max-tokens", "2", "--logprobs", "0", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["logprobs"] == [{"logprob": -0.5, "rank": 1, "top": []}, {"logprob": -1.5, "rank": 2, "top": []}]


def test_prompt_logprobs_as_text_and_json(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    """A table of their own, above that of the output; the first token of a prompt has none."""
    assert run(server, "abc", "--max-tokens", "1", "--prompt-logprobs", "0", "--logprobs", "0") == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if line] == [
        ["prompt", "logprob", "rank", "likeliest"],
        ["98", "-1.0000", "1"],
        ["99", "-2.0000", "2"],
        ["token", "logprob", "rank", "likeliest"],
        ["0", "-0.5000", "1"],
    ]
    assert run(server, "ab", "--max-tokens", "1", "--prompt-logprobs", "0", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["prompt_logprobs"] == [None, {"logprob": -1, "rank": 1, "top": []}]
    assert "logprobs" not in answer


def test_text_streams(server: FakeServer) -> None:
    """The first words are there long before the last; Ctrl-C ends the request on the server as well."""
    command = [
        sys.executable,
        "-m",
        "albireo",
        "generate",
        "endless",
        "--max-tokens",
        "1000",
        "--target",
        server.target,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        start = time.monotonic()
        assert os.read(process.stdout.fileno(), 100).startswith(b"t0 ")
        assert time.monotonic() - start < 10
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (130, b"")
    end = time.monotonic() + 5
    while server.num_open:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert server.num_cancelled == 1


def test_a_reader_that_leaves_is_no_error(server: FakeServer) -> None:
    command = f"{sys.executable} -m albireo generate endless --max-tokens 100 --target {server.target} | head -c 1"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, timeout=30, check=False)
    assert done.stdout == b"t"
    assert done.stderr == b""


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_a_refused_request(server: FakeServer, extra: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, "x", "--temperature", "11", *extra) == 1
    out, err = capsys.readouterr()
    if extra:
        expected = {"error": {"code": "INVALID_ARGUMENT", "message": "temperature: must be at most 10"}}
        assert json.loads(out) == expected
    else:
        assert err == "albireo: INVALID_ARGUMENT: temperature: must be at most 10\n"


def test_a_server_that_fails_in_the_middle(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, "break") == 1
    out, err = capsys.readouterr()
    assert out.startswith("t0 ")
    assert err == "albireo: UNAVAILABLE: the worker group is gone\n"


def test_an_aborted_request(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, "abort", "--json") == 0
    assert json.loads(capsys.readouterr().out)["finish_reason"] == "abort"
    assert run(server, "abort") == 1, "half a text must not pass for a whole one"
    assert "aborted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "timeout", "message"),
    [
        ("endless", "0.5", "the request did not end within its timeout of 0.5 s"),
        ("busy", "20", "the request did not end within its timeout of 20 s: the queue takes 30 s"),
    ],
)
def test_a_timeout(
    server: FakeServer, prompt: str, timeout: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether it passes, or the server knows before that it will."""
    argv = [prompt, "--max-tokens", "1000", "--timeout", timeout]
    assert run(server, *argv) == 1
    assert capsys.readouterr().err == f"albireo: DEADLINE_EXCEEDED: {message}\n"
    assert run(server, *argv, "--json") == 1
    assert json.loads(capsys.readouterr().out) == {"error": {"code": "DEADLINE_EXCEEDED", "message": message}}


def test_each_line_has_the_timeout_and_the_tenant(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"prompt": prompt, "max_tokens": 100} for prompt in ("endless", "a")]
    assert run(server, "--prompts", lines_file(tmp_path, *lines), "--timeout", "0.5", "--tenant", "a team") == 1
    late, answer = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert late["error"]["code"] == "DEADLINE_EXCEEDED"
    assert len(answer["token_ids"]) == 100
    assert server.tenants == ["a team"] * 2


def test_without_flags_there_is_no_timeout_and_no_tenant(server: FakeServer) -> None:
    assert run(server, "busy") == 0
    assert server.tenants == [None]


def test_lines_keep_their_order(server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They run at the same time, whatever each takes."""
    lines = [{"prompt": "wait" if i % 3 == 0 else f"p{i}", "max_tokens": i + 1} for i in range(24)]
    start = time.monotonic()
    assert run(server, "--prompts", lines_file(tmp_path, *lines)) == 0
    assert time.monotonic() - start < 8 * 0.3, "eight lines wait 0.3 s each"
    out, err = capsys.readouterr()
    answers = [json.loads(line) for line in out.splitlines()]
    assert [len(answer["token_ids"]) for answer in answers] == list(range(1, 25))
    assert "24/24" in err, "a progress bar"


def test_errors_of_lines(server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[Any] = [
        {"prompt": "a"},
        {"prompt": "a", "temperature": 11},
        {"prompt": "a", "max_tokens": "5"},
        {"prompt": "a", "max_toks": 5},
        "{",
        "",
        {"prompt": "break"},
        {"prompt_token_ids": [5, 6], "n": 2},
    ]
    assert run(server, "--prompts", lines_file(tmp_path, *lines)) == 1
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(answers) == 7, "the empty line is no request"
    codes = [answer.get("error", {}).get("code") for answer in answers]
    assert codes == [None, *["INVALID_ARGUMENT"] * 4, "UNAVAILABLE", None]
    messages = [answer["error"]["message"] for answer in answers if "error" in answer]
    assert messages[0] == "temperature: must be at most 10"
    assert messages[1].startswith("max_tokens: ")
    assert messages[2].startswith("max_toks: ")
    assert messages[3].startswith("not JSON: ")
    assert [choice["prompt_token_ids"] for choice in answers[-1]["choices"]] == [[5, 6], [5, 6]]
    assert len(server.requests) == 4, "what cannot be a request is not sent"


def test_flags_are_defaults_for_lines(server: FakeServer, tmp_path: Path) -> None:
    lines = [{"prompt": "a"}, {"prompt": "b", "max_tokens": 2, "priority": 1}]
    flags = ["--max-tokens", "1", "--priority", "9", "--seed", "4", "--request-id", "me"]
    assert run(server, "--prompts", lines_file(tmp_path, *lines), *flags) == 0
    first, second = sorted(server.requests, key=lambda request: request.text)
    assert (first.sampling_params.max_tokens, first.priority) == (1, 9)
    assert (second.sampling_params.max_tokens, second.priority) == (2, 1)
    assert {(each.sampling_params.seed, each.request_id) for each in server.requests} == {(4, "me")}


def test_open_streams_are_bounded(server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("albireo.cli.generate._MAX_OPEN_STREAMS", 3)
    lines = [{"prompt": "wait"}] * 7
    assert run(server, "--prompts", lines_file(tmp_path, *lines)) == 0
    assert server.max_open == 3


def test_no_lines_are_no_error(server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, "--prompts", lines_file(tmp_path)) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("extra", [["x"], ["x", "--json"], ["--prompts", os.devnull]])
def test_no_server(dead_target: str, extra: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--target", dead_target, *extra]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"albireo: UNAVAILABLE: no Albireo server answers at {dead_target} ")
    assert err.count("\n") == 1


def test_a_missing_file(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, "--prompts", "/no/such/file") == 2
    assert capsys.readouterr().err == "albireo: /no/such/file: No such file or directory\n"


def test_a_wrong_value_is_wrong_usage(dead_target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "x", "--max-tokens", "-1", "--target", dead_target]) == 2
    assert capsys.readouterr().err == "albireo: max_tokens: -1 is out of range\n"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["x", "--prompts", "f"],
        ["--prompt", "x"],
        ["x", "--max-tokens", "five"],
        ["x", "--timeout", "0"],
        ["x", "--timeout", "inf"],
        ["x", "--timeout", "soon"],
        ["x", "--tenant", "é"],
        ["x", "--tenant", "a\nb"],
        ["x", "--tenant", "x" * 129],
    ],
)
def test_wrong_usage(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["generate", *argv])
    assert exit_info.value.code == 2
