"""Two engines behind one gateway: a request goes to the engine that holds its beginning."""

import contextlib
import re
import urllib.request
from pathlib import Path

import grpc
import pytest

from albireo.cli.gateway import is_ready
from albireo.v1 import generation_pb2 as pb
from albireo.v1 import generation_pb2_grpc as rpc
from http_server import ask
from load import wait_until
from services import fixed_ports, process, scheduler, worker_group

pytestmark = pytest.mark.e2e

NUM_PROMPTS = 8
BLOCK_SIZE = 32
# By default a new engine gets one request in four that it holds nothing of, and one in eight that another one holds.
EXACTLY = ["--policy", "cache_aware", "--worker-warmup-secs", "0", "--worker-warmup-divert-every", "0"]


def prime(target: str, prompt: str) -> int:
    """Has the engine compute a prompt behind the gateway's back, which learns of it from the engine's events alone.
    Returns the number of full blocks."""
    params = pb.SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    with grpc.insecure_channel(target) as channel:
        request = pb.GenerateRequest(text=prompt, sampling_params=params)
        *_, last = rpc.GenerationStub(channel).Generate(request, timeout=30)
    return int(last.finish.usage.prompt_tokens) // BLOCK_SIZE


def num_indexed_blocks(metrics_port: int) -> list[int]:
    """What the gateway knows of each engine's cache, by the engine's port."""
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=5) as answer:
        found = re.findall(r"^(smg_kv_index_blocks\{.*\}) (\d+)$", answer.read().decode(), re.MULTILINE)
    return [int(number) for _, number in sorted(found)]


async def test_a_prefix_leads_to_the_engine_that_holds_it(tmp_path: Path, stub_model: Path):
    ports = fixed_ports(4)
    http, metrics = ports + 2, ports + 3
    prompts = [f"prompt {index} " + f"says {index} things " * 20 for index in range(NUM_PROMPTS)]
    with contextlib.ExitStack() as stack:
        targets = []
        for index in range(2):
            group = stack.enter_context(worker_group(tmp_path / f"g{index}", stub_model, engine="stub"))
            flags = {"port": ports + index, "served_model_name": "demo"}
            targets.append(stack.enter_context(scheduler(tmp_path / f"s{index}", stub_model, group, **flags)))
        argv = ["smg", "launch", "--host", "127.0.0.1", "--port", str(http), "--worker-startup-check-interval", "1"]
        argv += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics), "--worker-urls"]
        argv += [f"grpc://{target}" for target in targets]
        stack.enter_context(process([*argv, "--shutdown-grace-period-secs", "1", *EXACTLY], tmp_path / "smg.log"))
        await wait_until(lambda: is_ready("127.0.0.1", http), "the gateway is ready")
        num_blocks = [
            sum(prime(target, prompt) for prompt in prompts[index::2]) for index, target in enumerate(targets)
        ]
        await wait_until(lambda: num_indexed_blocks(metrics) == num_blocks, "it knows what they hold")
        for prompt in prompts:
            body = {"model": "demo", "prompt": f"{prompt} and", "max_tokens": 1, "temperature": 0, "ignore_eos": True}
            status, answer = ask(http, "/v1/completions", body)
            assert status == 200, answer
            usage = answer["usage"]
            least = usage["prompt_tokens"] - 2 * BLOCK_SIZE
            assert usage["prompt_tokens_details"]["cached_tokens"] >= least > 0
        status, loads = ask(http, "/get_loads")
        assert (status, loads["dp_rank_count"]) == (200, 2)
        assert [load["max_running_requests"] for load in loads["loads"]] == [64, 64]
