"""The KV store behind real models: swapped sequences and prefixes of another TP degree, at the float32 level."""

import asyncio
import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoints import make_checkpoint
from e2e_oracle import Case, Oracle, generate_completions
from kv_stores import kv_store, stats_of, until
from services import Service, fixed_ports, read_metrics, scheduler, worker_group

pytestmark = pytest.mark.e2e

NUM_REQUESTS, NUM_TOKENS = 12, 120
NUM_SWAPPED = 4  # at least
# Of all ranks: 2 layers, 2 KV heads of 16, keys and values in float32.
BLOCK_BYTES = 2 * 2 * 2 * 16 * 32 * 4
SMALL_POOL, ROOMY_POOL = 9, 256
NUM_SHARED = 128


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    directory = make_checkpoint(tmp_path_factory.mktemp("qwen3"), "qwen3")
    return directory, Oracle(directory)


def make_prompts(vocab_size: int) -> list[list[int]]:
    """Short ones, for long answers: most can start in the small pool, and two fit at their ends."""
    rng = random.Random("swap")
    return [random_prompt(rng, vocab_size, rng.randrange(8, 40)) for _ in range(NUM_REQUESTS)]


def random_prompt(rng: random.Random, vocab_size: int, num: int) -> list[int]:
    return [rng.randrange(3, vocab_size) for _ in range(num)]


@contextlib.contextmanager
def group_of(directory: Path, model: Path, store: Service, tp: int, num_blocks: int, **flags: object) -> Iterator[str]:
    """A worker group's address."""
    limits = {"max_num_seqs": NUM_REQUESTS, "max_model_len": 192, "max_num_batched_tokens": 96, "dtype": "float32"}
    more = {"kv_cache_gib": num_blocks * BLOCK_BYTES / tp / 2**30, "kv_store": f"unix:{store.run_dir}/kv-arena.sock"}
    with worker_group(directory, model, device="cpu", tp=tp, **limits, **more, **flags) as group:
        yield group


@contextlib.contextmanager
def swapping(directory: Path, model: Path, group: str, store: Service, swap: str) -> Iterator[tuple[str, int]]:
    """The client address of a scheduler that knows the store, and the port of its metrics."""
    ports = fixed_ports(2)
    flags = {"kv_store": store.address, "swap": swap, "metrics_port": ports + 1}
    with scheduler(directory, model, group, port=ports, **flags) as target:

        async def is_connected() -> bool:
            return read_metrics(ports + 1)["albireo_kv_store_connected"] == 1

        asyncio.run(until(is_connected, "the store is found"))
        yield target, ports + 1


async def generate_all(target: str, cases: list[Case]) -> list[list[int]]:
    answers = await asyncio.gather(*(generate_completions(target, case, 1) for case in cases))
    return [tokens for (tokens,), _ in answers]


@pytest.mark.parametrize("eager", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_tokens_do_not_depend_on_pool_and_swap(model: tuple[Path, Oracle], tmp_path: Path, eager: bool):
    """A roomy pool; then one for a few of the sequences, which are computed again, or swapped in and out."""
    directory, oracle = model
    cases = [Case(prompt, NUM_TOKENS, []) for prompt in make_prompts(oracle.vocab_size)]
    flags = {"eager": True} if eager else {}
    with kv_store(tmp_path / "kv", arena_gib=64 / 1024) as store:
        with (
            group_of(tmp_path / "roomy", directory, store, 2, ROOMY_POOL, **flags) as group,
            scheduler(tmp_path / "plain", directory, group) as target,
        ):
            answers = asyncio.run(generate_all(target, cases))
        cases = [Case(case.prompt, NUM_TOKENS, answer) for case, answer in zip(cases, answers, strict=True)]
        with group_of(tmp_path / "small", directory, store, 2, SMALL_POOL, **flags) as group:
            for swap in ("never", "always"):
                with swapping(tmp_path / swap, directory, group, store, swap) as (target, metrics_port):
                    for case, tokens in zip(cases, asyncio.run(generate_all(target, cases)), strict=True):
                        oracle.assert_equal(case, tokens)
                    metrics = read_metrics(metrics_port)
                    assert metrics["albireo_preemptions_total"] >= NUM_SWAPPED, swap
                    if swap == "always":
                        assert metrics["albireo_kv_loads_loaded_total"] >= NUM_SWAPPED
                        assert metrics["albireo_kv_loads_damaged_total"] == 0


def test_a_prefix_is_read_at_another_tp_degree(model: tuple[Path, Oracle], tmp_path: Path):
    """What one group computes at TP 1, another one reads at TP 2."""
    directory, oracle = model
    rng = random.Random("prefix")
    shared = random_prompt(rng, oracle.vocab_size, NUM_SHARED)
    with kv_store(tmp_path / "kv", arena_gib=64 / 1024) as store:
        for tp, num_cached in ((1, 0), (2, NUM_SHARED)):
            prompt = [*shared, *random_prompt(rng, oracle.vocab_size, 9)]
            case = Case(prompt, 12, oracle.generate(prompt, 12))
            with (
                group_of(tmp_path / f"g{tp}", directory, store, tp, ROOMY_POOL) as group,
                swapping(tmp_path / f"s{tp}", directory, group, store, "always") as (target, _),
            ):
                (tokens,), cached = asyncio.run(generate_completions(target, case, 1))
                oracle.assert_equal(case, tokens)
                assert cached == [num_cached]

                async def is_stored() -> bool:
                    return (await stats_of(store)).used_bytes >= NUM_SHARED // 32 * BLOCK_BYTES

                asyncio.run(until(is_stored, "the prefix is stored"))
