"""OpenAI's HTTP API through a real gateway, on the demo model: what it answers, and what it refuses."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import openai
import pytest

from albireo.cli.gateway import is_ready
from albireo.v1 import generation_pb2 as pb
from albireo.v1 import generation_pb2_grpc as rpc
from http_server import HttpServer, ask, http_server
from load import wait_until
from services import read_metrics

pytestmark = pytest.mark.e2e

README = Path(__file__).parents[2] / "README.md"
PROMPT = "def read_lines(path):"
QUESTION = [{"role": "user", "content": "Read a file."}]
QUESTION_AS_PROMPT = '"""Read a file."""\n\n'  # by the demo model's chat template
LONG_PROMPT = "def read_lines(path):\n    return path\n\n" * 12  # of several blocks
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
GREEDY = {"max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    with http_server(tmp_path_factory.mktemp("h"), "demo", "--dtype", "float32") as served:
        yield served


@pytest.fixture(scope="module")
def client(server: HttpServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30) as made:
        yield made


def run_shell(script: str) -> str:
    result = subprocess.run(["bash", "-ec", script], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def native_text(server: HttpServer, prompt: str) -> str:
    """Of the same greedy completion over gRPC."""
    request = pb.GenerateRequest(text=prompt, sampling_params=pb.SamplingParams(**GREEDY))
    with grpc.insecure_channel(server.service.address) as channel:
        return "".join(response.text for response in rpc.GenerationStub(channel).Generate(request, timeout=30))


def test_the_ready_message_shows_a_request_that_works(server: HttpServer):
    command = re.search(r"HTTP: +(curl .*)", server.log.read_text())
    assert command is not None
    assert json.loads(run_shell(f"{command[1]} --silent"))["usage"]["completion_tokens"] > 0


def test_the_examples_of_the_readme_work(server: HttpServer):
    """As they are printed, but for the port."""
    section = README.read_text().split("## OpenAI's HTTP API")[1].split("\n## ")[0].replace(":8000", f":{server.port}")
    (curl,) = (block for block in re.findall(r"```\n(.*?)```", section, re.DOTALL) if "curl" in block)
    (python,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    for line in re.findall(r"^curl .*?[^\\]$", curl, re.DOTALL | re.MULTILINE):
        assert json.loads(run_shell(line))["choices"]
    answer = subprocess.run([sys.executable, "-c", python], capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 0, answer.stderr
    assert len(answer.stdout) > 20


def test_the_served_name_is_the_models_id(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["demo"]


def test_a_completion_is_that_of_the_native_api(server: HttpServer, client: openai.OpenAI):
    answer = client.completions.create(model="demo", prompt=PROMPT, **GREEDY)
    assert answer.choices[0].text == native_text(server, PROMPT)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 24)


def test_a_chat_is_a_completion_of_its_template(server: HttpServer, client: openai.OpenAI):
    answer = client.chat.completions.create(model="demo", messages=QUESTION, **GREEDY)
    assert answer.choices[0].message.content == native_text(server, QUESTION_AS_PROMPT)


def test_streams_carry_the_same_text_and_the_usage_at_the_end(client: openai.OpenAI):
    chat = client.chat.completions.create(model="demo", messages=QUESTION, **GREEDY)
    *chunks, last = client.chat.completions.create(
        model="demo", messages=QUESTION, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == chat.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["length"]
    assert last.usage is not None
    assert chat.usage is not None
    assert last.usage.completion_tokens == chat.usage.completion_tokens == 24
    completion = client.completions.create(model="demo", prompt=PROMPT, **GREEDY)
    pieces = client.completions.create(model="demo", prompt=PROMPT, stream=True, **GREEDY)
    assert "".join(piece.choices[0].text for piece in pieces) == completion.choices[0].text


def test_several_completions_of_one_prompt(client: openai.OpenAI):
    """Greedy ones are alike, drawn ones are not, and come again with their seed."""
    greedy = client.chat.completions.create(model="demo", messages=QUESTION, n=3, **GREEDY)
    assert len({choice.message.content for choice in greedy.choices}) == 1
    assert [choice.index for choice in greedy.choices] == [0, 1, 2]
    first, second, other = (
        [
            choice.text
            for choice in client.completions.create(
                model="demo", prompt=PROMPT, n=3, max_tokens=24, temperature=1, seed=seed
            ).choices
        ]
        for seed in (7, 7, 8)
    )
    assert len(set(first)) == 3
    assert first == second != other


def test_prompts_in_a_batch_are_answered_in_order(client: openai.OpenAI):
    prompts = [PROMPT, "import os", "class Stack:"]
    answer = client.completions.create(model="demo", prompt=prompts, n=2, **GREEDY)
    alone = [client.completions.create(model="demo", prompt=prompt, **GREEDY).choices[0].text for prompt in prompts]
    assert [choice.text for choice in answer.choices] == [text for text in alone for _ in range(2)]


def test_logprobs_of_a_chat(client: openai.OpenAI):
    answer = client.chat.completions.create(model="demo", messages=QUESTION, logprobs=True, top_logprobs=3, **GREEDY)
    assert answer.choices[0].logprobs is not None
    tokens = answer.choices[0].logprobs.content
    assert tokens is not None
    assert "".join(token.token for token in tokens) == answer.choices[0].message.content
    for token in tokens:
        assert [top.logprob for top in token.top_logprobs] == sorted(t.logprob for t in token.top_logprobs)[::-1]
        assert (token.token, token.logprob) == (token.top_logprobs[0].token, token.top_logprobs[0].logprob)


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI):
    whole = client.completions.create(model="demo", prompt=PROMPT, **GREEDY).choices[0].text
    stop = whole[len(whole) // 2 :][:5]
    answer = client.completions.create(model="demo", prompt=PROMPT, stop=[stop], **GREEDY)
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens < 24


def test_the_prefix_cache_is_used_and_forgotten_on_request(server: HttpServer):
    def num_cached() -> int:
        usage = server.complete(LONG_PROMPT, max_tokens=1)["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    first, second = num_cached(), num_cached()
    assert second >= first + 32
    status, answer = ask(server.port, "/flush_cache", "")
    assert (status, answer["workers_flushed"]) == (200, 1)
    assert num_cached() == 0


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("completions", {"model": "demo", "prompt": "import os " * 600}, 400, "maximum context length is 512"),
        ("completions", {"model": "nobody", "prompt": "x"}, 404, "nobody"),
        ("chat/completions", {"model": "nobody", "messages": QUESTION}, 404, "nobody"),
        ("completions", '{"model": "demo", "prompt"', 400, "JSON"),
        ("completions", {"model": "demo"}, 400, "prompt"),
        ("completions", {"model": "demo", "prompt": [5, 6]}, 400, "prompt"),
        ("completions", {"model": "demo", "prompt": "x", "max_tokens": 0}, 400, "max_tokens is 0; it must be 1"),
        ("completions", {"model": "demo", "prompt": "x", "temperature": -1}, 400, "emperature"),
        ("completions", {"model": "demo", "prompt": "x", "n": 129}, 400, "n"),
    ],
)
def test_what_is_wrong_is_refused(server: HttpServer, path: str, body: object, status: int, words: str):
    got, answer = ask(server.port, f"/v1/{path}", body)
    assert (got, words in answer["error"]["message"]) == (status, True), answer


@pytest.mark.parametrize(
    "asked",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}},
        {"tools": TOOLS, "tool_choice": "required"},
    ],
)
def test_what_is_not_served_is_refused(server: HttpServer, asked: dict[str, object]):
    """Structured outputs, and with them tool calls, which need a grammar."""
    status, answer = ask(server.port, "/v1/chat/completions", {"model": "demo", "messages": QUESTION, **asked})
    assert (status, "is not served" in answer["error"]["message"]) == (501, True), answer


def test_a_burst_of_equal_requests_gets_equal_answers(server: HttpServer):
    """Whatever batches they come to run in: 48 at once, greedy, in float32."""
    with ThreadPoolExecutor(48) as pool:
        answers = pool.map(lambda _: server.complete(PROMPT, max_tokens=60, temperature=0), range(48))
        texts = {answer["choices"][0]["text"] for answer in answers}
    assert len(texts) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.soak)])
async def test_a_gateway_that_dies_or_freezes_is_started_again(server: HttpServer, number: signal.Signals):
    (pid,) = server.gateway_pids()
    server.service.send_signal(pid, number)
    await wait_until(lambda: pid not in server.gateway_pids(), "it is gone")
    await wait_until(lambda: is_ready("127.0.0.1", server.port), "it is back")
    assert server.complete(PROMPT, **GREEDY)["usage"]["completion_tokens"] == 24


def test_its_metrics_follow_those_of_the_front_ends(server: HttpServer):
    assert read_metrics(server.metrics_port + 3)
