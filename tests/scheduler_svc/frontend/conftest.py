"""A small model on disk, a planner that tests script, and a front end between it and real clients."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grpc import aio
from smg_grpc_proto import vllm_engine_pb2_grpc
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from albireo import logprobs
from albireo.arrays import pack_int32, pack_uint64
from albireo.logprobs import Logprobs
from albireo.rpc import make_channel, make_server
from albireo.v1 import frontend_pb2, frontend_pb2_grpc, generation_pb2, generation_pb2_grpc, plan_pb2
from scheduler_svc.frontend.config import FrontendConfig
from scheduler_svc.frontend.model import load_served_model
from scheduler_svc.frontend.server import FrontendServer

WORDS = ["Hello", "Ġworld", "Ġand", "ĠEND", "ab", "cab"]
SPECIAL = ["<|bos|>", "<|eos|>"]
MAX_MODEL_LEN = 64


def byte_level_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are single bytes (in the order of their stand-ins), then WORDS, then SPECIAL."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, *WORDS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def sentencepiece_tokenizer() -> Tokenizer:
    """As Llama 2 has it: a metaspace for the space, byte tokens for what has no token."""
    pieces = ["<unk>", "▁", "▁a", "▁the", "a", "b", "end", "▁▁", "é", "▁é"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {token: i for i, token in enumerate([*pieces, *byte_tokens])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def sentencepiece() -> Tokenizer:
    return sentencepiece_tokenizer()


@pytest.fixture(scope="session")
def ids(byte_level: Tokenizer) -> Callable[..., list[int]]:
    """Names of tokens -> their ids; a space stands for itself."""

    def of(*tokens: str) -> list[int]:
        found = [byte_level.token_to_id(token.replace(" ", "Ġ")) for token in tokens]
        assert None not in found, tokens
        return found

    return of


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory without weights."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    path.mkdir()
    tokenizer = byte_level_tokenizer()
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": MAX_MODEL_LEN,
        "bos_token_id": tokenizer.token_to_id("<|bos|>"),
        "eos_token_id": tokenizer.token_to_id("<|eos|>"),
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "top_k": 7}))
    return path


class FakePlanner(frontend_pb2_grpc.PlannerServicer):
    """Plays the planner: tests read what the front end sent and say what comes back."""

    def __init__(self, eos: int, vocab_size: int) -> None:
        self.group = plan_pb2.GroupInfo(
            engine="stub",
            device="none",
            dtype="float32",
            tp_size=2,
            vocab_size=vocab_size,
            eos_token_ids=[eos],
            block_size=32,
            num_blocks=100,
            max_num_seqs=8,
            max_model_len=MAX_MODEL_LEN,
        )
        self.hello = frontend_pb2.Hello()
        self.submits: asyncio.Queue[frontend_pb2.Submit] = asyncio.Queue()
        self.truncates: asyncio.Queue[frontend_pb2.Truncate] = asyncio.Queue()
        self.cancels: asyncio.Queue[int] = asyncio.Queue()
        self.aborts: asyncio.Queue[str] = asyncio.Queue()
        self.follows: asyncio.Queue[bool] = asyncio.Queue()
        self.flushed = asyncio.Event()
        self.ready = asyncio.Event()  # the group has loaded
        self.ready.set()
        self.load = frontend_pb2.Load(is_serving=True)
        self._context: Any = None
        self._writing = asyncio.Lock()  # what was written may be read before the write has returned

    async def Attach(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        self._context = context
        self.hello = (await anext(aiter(request_iterator))).hello
        await self.ready.wait()
        welcome = frontend_pb2.Welcome(group=self.group)
        await self.send_message(frontend_pb2.PlannerMessage(welcome=welcome, load=self.load))
        async for message in request_iterator:
            if message.flushes_cache:
                self.flushed.set()
            for queue, items in (
                (self.submits, message.submits),
                (self.truncates, message.truncates),
                (self.cancels, message.cancels),
                (self.aborts, [abort.request_id for abort in message.aborts]),
                (self.follows, [message.follows_cache] if message.HasField("follows_cache") else []),
            ):
                for item in items:
                    queue.put_nowait(item)

    async def send(
        self,
        *tokens: tuple[int, int],
        ended: tuple[frontend_pb2.Ended, ...] = (),
        started: tuple[tuple[int, int], ...] = (),
    ) -> None:
        """One message; ``tokens`` are (sequence id, token id), ``started`` (sequence id, number of cached tokens)."""
        await self.send_message(
            frontend_pb2.PlannerMessage(
                token_sequence_ids=pack_uint64([sequence_id for sequence_id, _ in tokens]),
                token_ids=pack_int32([token_id for _, token_id in tokens]),
                ended=ended,
                started_sequence_ids=pack_uint64([sequence_id for sequence_id, _ in started]),
                started_num_cached_tokens=pack_int32([num_cached_tokens for _, num_cached_tokens in started]),
            )
        )

    async def send_logprobs(self, sequence_id: int, token_ids: list[int], num_top: int) -> None:
        """One message with tokens whose logprobs are -1, -2, ..., and so many of the likeliest: 10, 11, ..."""
        num = len(token_ids)
        of_tokens = Logprobs(
            np.arange(num, dtype=np.int32),
            -np.arange(1, num + 1, dtype=np.float32),
            np.arange(1, num + 1, dtype=np.int32),
            np.full(num, num_top, dtype=np.int32),
            np.tile(np.arange(10, 10 + num_top, dtype=np.int32), num),
            np.tile(-0.5 - np.arange(num_top, dtype=np.float32) / 4, num),
        )
        await self.send_message(
            frontend_pb2.PlannerMessage(
                token_sequence_ids=pack_uint64([sequence_id] * num),
                token_ids=pack_int32(token_ids),
                logprobs=logprobs.encode(of_tokens),
            )
        )

    async def send_message(self, message: frontend_pb2.PlannerMessage) -> None:
        async with self._writing:
            await self._context.write(message)

    async def say_serving(self, is_serving: bool) -> None:
        self.load = frontend_pb2.Load(is_serving=is_serving)
        await self.send_message(frontend_pb2.PlannerMessage(load=self.load))

    async def run(self, sequence_id: int, token_ids: list[int], **ended: Any) -> None:
        """A whole sequence, one message per token, its end with the last."""
        ended = {"reason": generation_pb2.FINISH_REASON_LENGTH, "num_output_tokens": len(token_ids)} | ended
        end = frontend_pb2.Ended(sequence_id=sequence_id, **ended)
        for token_id in token_ids[:-1]:
            await self.send((sequence_id, token_id))
        await self.send(*[(sequence_id, token_id) for token_id in token_ids[-1:]], ended=(end,))


class World:
    """A planner, a front end attached to it, and both stubs of a client."""

    def __init__(
        self, planner: FakePlanner, planner_server: aio.Server, frontend: FrontendServer, channel: aio.Channel
    ):
        self.planner = planner
        self.planner_server = planner_server
        self.frontend = frontend
        self.core = frontend._core
        self.channel = channel
        self.native: Any = generation_pb2_grpc.GenerationStub(channel)
        self.vllm: Any = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        self.running = asyncio.create_task(frontend.run())

    async def wait_until_ready(self) -> None:
        while not self.core.link.is_serving:
            await asyncio.sleep(0.002)

    @property
    def sequences(self) -> dict[int, Any]:
        """What the link holds."""
        return self.core.link._sequences


@pytest.fixture
def flags() -> dict[str, Any]:
    """More of the front end's configuration; tests parametrize it."""
    return {}


@pytest.fixture
async def planner(byte_level: Tokenizer) -> FakePlanner:
    return FakePlanner(byte_level.token_to_id("<|eos|>"), byte_level.get_vocab_size())


async def serve_planner(planner: FakePlanner, tmp_path: Path) -> aio.Server:
    server = make_server()
    frontend_pb2_grpc.add_PlannerServicer_to_server(planner, server)
    server.add_insecure_port(f"unix:{tmp_path}/planner.sock")
    await server.start()
    return server


@pytest.fixture
async def planner_server(planner: FakePlanner, tmp_path: Path) -> AsyncIterator[aio.Server]:
    server = await serve_planner(planner, tmp_path)
    yield server
    await server.stop(None)


@pytest.fixture
async def restart_planner(
    planner: FakePlanner, planner_server: aio.Server, tmp_path: Path
) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Starts the planner again, when `planner_server` has been stopped."""
    servers: list[aio.Server] = []

    async def restart() -> None:
        servers.append(await serve_planner(planner, tmp_path))

    yield restart
    for server in servers:
        await server.stop(None)


@pytest.fixture
def config(model_path: Path, tmp_path: Path, flags: dict[str, Any]) -> FrontendConfig:
    own = f"unix:{tmp_path}/frontend.sock"
    return FrontendConfig(model=str(model_path), planner=f"unix:{tmp_path}/planner.sock", port=0, listen=own, **flags)


@pytest.fixture
async def world(planner: FakePlanner, planner_server: aio.Server, config: FrontendConfig) -> AsyncIterator[World]:
    async with open_world(planner, planner_server, config) as world:
        async with asyncio.timeout(10):
            await world.wait_until_ready()
        yield world


@pytest.fixture
async def loading_world(
    planner: FakePlanner, planner_server: aio.Server, config: FrontendConfig
) -> AsyncIterator[World]:
    """As `world`, but its group still loads: ``planner.ready`` is not set."""
    planner.ready.clear()
    async with open_world(planner, planner_server, config) as world:
        yield world


@contextlib.asynccontextmanager
async def open_world(planner: FakePlanner, planner_server: aio.Server, config: FrontendConfig) -> AsyncIterator[World]:
    frontend = FrontendServer(config, load_served_model(config))
    await frontend.start()
    assert config.listen is not None
    channel = make_channel(config.listen)
    world = World(planner, planner_server, frontend, channel)
    yield world
    await channel.close()
    await frontend.stop(0)
    world.running.cancel()
    await asyncio.gather(world.running, return_exceptions=True)
