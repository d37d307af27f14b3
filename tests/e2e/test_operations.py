"""The operations of vllm.grpc.engine on real services, with the stub engine."""

import hashlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

from albireo.block_hash import chain_hashes, root_hash
from services import Service, scheduler_service, worker_group

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]
PROMPT = list(range(100, 228))  # four blocks
BLOCK_SIZE = 32


@pytest.fixture(scope="module")
def service(stub_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    run_dir = tmp_path_factory.mktemp("operations")
    with (
        worker_group(run_dir / "w", stub_model, engine="stub", tp=1, max_num_seqs=4) as group,
        scheduler_service(run_dir / "s", stub_model, group) as service,
    ):
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[Any]:
    with grpc.insecure_channel(service.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield vllm_engine_pb2_grpc.VllmEngineStub(channel)


def generate(client: Any, prompt: list[int], num_tokens: int = 8) -> list[int]:
    params = pb.SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=0)
    request = pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=prompt), sampling_params=params)
    (answer,) = client.Generate(request, timeout=30)
    return list(answer.complete.output_ids)


def hashes_of(tokens: list[int]) -> list[int]:
    chain = chain_hashes(root_hash(""), np.array(tokens, dtype=np.int32), BLOCK_SIZE)
    return [int.from_bytes(each[:8], "little", signed=True) for each in chain]


class Router:
    """What a gateway knows of a server's cache."""

    def __init__(self, client: Any) -> None:
        self.call = client.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest(), timeout=60)
        self.blocks: dict[int, tuple[int | None, list[int]]] = {}  # by hash: parent, tokens
        self.num_cleared = 0
        self.last = 0

    def read_until(self, holds: Any) -> Any:
        """Returns the batch after which it holds."""
        for batch in self.call:
            if not batch.load.load_only:
                assert self.last in (0, batch.sequence_number - 1)
                self.last = batch.sequence_number
            for event in batch.events:
                self._apply(event)
            if holds(batch):
                return batch
        raise AssertionError("the stream ended")

    def _apply(self, event: Any) -> None:
        if event.HasField("cleared"):
            self.blocks.clear()
            self.num_cleared += 1
        for block_hash in event.removed.block_hashes:
            del self.blocks[block_hash]
        parent = event.stored.parent_block_hash if event.stored.HasField("parent_block_hash") else None
        for block in event.stored.blocks:
            assert block.block_size == BLOCK_SIZE
            self.blocks[block.block_hash] = (parent, list(block.token_ids))
            parent = block.block_hash


def test_a_gateway_follows_the_cache_and_the_load(service: Service, client: Any) -> None:
    """Through a flush, and through the death of the planner, whose successor has nothing cached."""
    generate(client, PROMPT)
    router = Router(client)
    router.read_until(lambda _: len(router.blocks) == 4)
    hashes = hashes_of(PROMPT)
    assert [router.blocks[each] for each in hashes] == [
        (parent, PROMPT[32 * i : 32 * i + 32]) for i, parent in enumerate([None, *hashes[:-1]])
    ]
    other = [7, *PROMPT[1:]]
    output = generate(client, other, num_tokens=40)
    router.read_until(lambda _: len(router.blocks) == 9)
    assert set(hashes_of(other + output)) == router.blocks.keys() - set(hashes)
    record = router.read_until(lambda batch: batch.load.load_only and batch.load.cache_hit_rate == 0)
    assert record.load.max_running_requests == 4
    generate(client, PROMPT)
    router.read_until(lambda batch: batch.load.load_only and batch.load.cache_hit_rate > 0)

    assert client.FlushCache(common_pb2.FlushCacheRequest(timeout_s=5), timeout=30).success
    router.read_until(lambda _: router.num_cleared == 2)
    assert not router.blocks

    (planner,) = service.pids("planner")
    service.send_signal(planner, signal.SIGKILL)
    generate(client, PROMPT)
    router.read_until(lambda _: router.num_cleared == 3 and len(router.blocks) == 4)
    assert router.blocks.keys() == set(hashes)
    router.call.cancel()


def test_load_figures_follow_what_runs(client: Any) -> None:
    before = client.GetLoads(pb.GetLoadsRequest(include=["core"]), timeout=10).loads[0]
    generate(client, PROMPT, num_tokens=64)
    deadline = time.monotonic() + 20
    while not (load := client.GetLoads(pb.GetLoadsRequest(), timeout=10).loads[0]).gen_throughput:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert load.max_total_num_tokens == before.max_total_num_tokens > 0
    assert load.max_total_num_tokens % BLOCK_SIZE == 0


def test_a_profile_is_a_trace_of_what_ran(service: Service, client: Any) -> None:
    """Of the steps between the two calls alone, in the run directory."""
    generate(client, PROMPT)
    assert client.StartProfile(common_pb2.StartProfileRequest(), timeout=10).success
    generate(client, PROMPT, num_tokens=12)
    generate(client, PROMPT, num_tokens=3)
    answer = client.StopProfile(common_pb2.StopProfileRequest(), timeout=10)
    assert answer.success, answer.message
    file = Path(answer.message)
    assert file.parent == service.run_dir / "profiles"
    events = json.loads(file.read_text())["traceEvents"]
    processes = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert processes == {"frontend-0", "planner", "rank-0"}
    for name in ("T1 plan", "T3 forward"):
        num_steps = len({event["args"]["step"] for event in events if event["name"] == name})
        assert 15 <= num_steps <= 15 + 2 * 2, "with what is planned past an end"


def test_a_profile_of_so_many_steps_ends_by_itself(service: Service, client: Any) -> None:
    directory = service.run_dir / "profiles"
    before = set(directory.glob("*"))
    request = common_pb2.StartProfileRequest(output_dir=str(directory), num_steps=5)
    assert client.StartProfile(request, timeout=10).success
    generate(client, PROMPT, num_tokens=40)
    answer = client.StopProfile(common_pb2.StopProfileRequest(), timeout=10)
    assert answer.success, answer.message
    (file,) = set(directory.glob("*")) - before
    events = json.loads(file.read_text())["traceEvents"]
    assert len({event["args"]["step"] for event in events if event["name"] == "T3 forward"}) == 5


def test_the_tokenizer_is_the_models(stub_model: Path, client: Any) -> None:
    chunks = list(client.GetTokenizer(common_pb2.GetTokenizerRequest(), timeout=10))
    data = b"".join(chunk.data for chunk in chunks)
    assert chunks[-1].sha256 == hashlib.sha256(data).hexdigest()
    assert data.startswith(b"PK")
    assert b"tokenizer.json" in data
