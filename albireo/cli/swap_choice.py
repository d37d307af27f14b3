"""Whether swapping is quicker than computing again, and whether the planner knows: one load on a real model, swapped
always, never, and as it chooses.

The same requests come in each turn, to services of its own, which have measured nothing but a short request. One
tenant's come at once and take the pool; when the first of them decodes, another tenant's come and get their share of
it, from sequences that are preempted and go on later.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Any

from albireo.cli import client
from albireo.cli.bench_load import SAMPLING
from albireo.cli.host_services import Services, Setting, running
from albireo.cli.host_window import Figures, medians
from albireo.cli.ports import check_port
from albireo.cli.progress import Bar
from albireo.cli.scrape import read_metrics
from albireo.cli.trace import read_ledger
from albireo.errors import ConfigError
from albireo.model_spec import load_model_spec, resolve_model
from albireo.v1 import generation_pb2 as pb

if TYPE_CHECKING:
    from albireo.v1.generation_pb2_grpc import GenerationAsyncStub

MODES = ("always", "never", "auto")
_BLOCK_SIZE = 32
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
_WARM_UP_TOKENS = 8
_SEED = 0

_COUNTERS = {
    "num_preemptions": "albireo_preemptions_total",
    "num_blocks_out": "albireo_kv_blocks_out_total",
    "num_blocks_in": "albireo_kv_blocks_in_total",
    "num_blocks_not_stored": "albireo_kv_blocks_not_stored_total",
    "num_loads_slow": "albireo_kv_loads_slow_total",
}


@dataclass(frozen=True)
class Crowd:
    """Requests of equal lengths, half of them another tenant's, which come later.

    Attributes:
        num_blocks: of the pool.
    """

    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_blocks: int


def setting_of(model: str, tp: int, crowd: Crowd, swap: str) -> Setting:
    """Raises ConfigError for a model that cannot be served, or a pool that does not hold one request."""
    spec = load_model_spec(resolve_model(model))
    num_tokens = crowd.num_prompt_tokens + crowd.num_output_tokens
    if num_tokens > spec.max_position_embeddings:
        raise ConfigError(f"{num_tokens} tokens of prompt and output; {spec.name} takes {spec.max_position_embeddings}")
    words = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * _BLOCK_SIZE
    return Setting(
        tp=tp,
        batch=crowd.num_requests,
        depth=2,
        engine="torch",
        model=model,
        clients="none",
        prompt_tokens=crowd.num_prompt_tokens,
        output_tokens=crowd.num_output_tokens,
        kv_cache_gib=crowd.num_blocks * words * _DTYPE_BYTES[spec.dtype] / tp / 2**30,
        swap=swap,
    )


async def measure_choice(model: str, tp: int, crowd: Crowd, reps: int, bar: Bar) -> dict[str, Any]:
    """The report: by mode, medians of ``reps`` runs, which take turns. ``auto_ratio``: of auto's time by that of the
    better one of the others. GroupError: services fail."""
    runs: dict[str, list[Figures]] = {mode: [] for mode in MODES}
    for rep in range(reps):
        for mode in MODES[rep % len(MODES) :] + MODES[: rep % len(MODES)]:  # none is always first
            runs[mode].append(await _run(setting_of(model, tp, crowd, mode), crowd, bar))
    by_mode = {mode: medians(each) for mode, each in runs.items()}
    return {
        "modelled": False,
        "model": model,
        "tp": tp,
        "num_requests": crowd.num_requests,
        "num_prompt_tokens": crowd.num_prompt_tokens,
        "num_output_tokens": crowd.num_output_tokens,
        "num_blocks": crowd.num_blocks,
        "auto_ratio": by_mode["auto"]["wall_s"] / min(by_mode[mode]["wall_s"] for mode in ("always", "never")),
        **{mode: {**by_mode[mode], "runs": runs[mode]} for mode in MODES},
    }


async def _run(setting: Setting, crowd: Crowd, bar: Bar) -> Figures:
    """One run with services of its own."""
    setting = replace(
        setting,
        port=check_port("127.0.0.1", 0, "--port"),
        metrics_port=check_port("127.0.0.1", 0, "--metrics-port"),
    )
    async with (
        running(setting) as services,
        client.connect(client.Server(f"127.0.0.1:{setting.port}")) as (stub, info),
    ):
        rng, ids = Random(_SEED), range(info.vocab_size)  # noqa: S311  # no secret
        prompts = [rng.choices(ids, k=crowd.num_prompt_tokens) for _ in range(crowd.num_requests)]
        await _ask(stub, rng.choices(ids, k=_WARM_UP_TOKENS), _WARM_UP_TOKENS)
        before, done_before = read_metrics(setting.metrics_port), await _done(services)
        start = time.monotonic()
        await _ask_all(stub, prompts, crowd.num_output_tokens)
        wall_s = time.monotonic() - start
        after, done = read_metrics(setting.metrics_port), await _done(services)
    bar.update()
    return {
        "wall_s": wall_s,
        **{name: done[name] - done_before[name] for name in done},
        **{name: after[metric] - before[metric] for name, metric in _COUNTERS.items()},
        "in_mb_s": after["albireo_kv_in_bytes_per_second"] / 1e6,
        "out_mb_s": after["albireo_kv_out_bytes_per_second"] / 1e6,
        "rtt_ms": 1e3 * after["albireo_kv_store_rtt_seconds"],
    }


async def _ask_all(stub: "GenerationAsyncStub", prompts: Sequence[Sequence[int]], num_tokens: int) -> None:
    begun = asyncio.Event()

    async def ask_later(prompt: Sequence[int]) -> None:
        await begun.wait()
        await _ask(stub, prompt, num_tokens, "later")

    first = -(-len(prompts) // 2)
    await asyncio.gather(
        *(_ask(stub, prompt, num_tokens, "first", begun) for prompt in prompts[:first]),
        *map(ask_later, prompts[first:]),
    )


async def _ask(
    stub: "GenerationAsyncStub",
    prompt: Sequence[int],
    num_tokens: int,
    tenant: str = "",
    begun: asyncio.Event | None = None,
) -> None:
    """``begun`` is set when the first token comes."""
    sampling = pb.SamplingParams(max_tokens=num_tokens, ignore_eos=True, n=1)
    sampling.MergeFrom(SAMPLING["greedy"])
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling_params=sampling)
    async for _ in client.stream(stub, request, client.CallOptions(tenant=tenant)):
        if begun is not None:
            begun.set()


async def _done(services: Services) -> Figures:
    """Steps so far, and their tokens: the ledger keeps 8192 of them."""
    pages = await read_ledger(client.Server(services.ledgers[0]))
    columns = [page["num_tokens"] for page in pages if page.is_planner]
    return {"num_steps": sum(map(len, columns)), "num_computed_tokens": sum(int(each.sum()) for each in columns)}


_ROWS = {
    "wall_s": "time, s",
    "num_steps": "steps",
    "num_computed_tokens": "tokens computed",
    "num_preemptions": "preemptions",
    "num_blocks_out": "blocks stored",
    "num_blocks_in": "blocks loaded",
    "num_blocks_not_stored": "blocks not stored",
    "num_loads_slow": "loads too slow",
    "in_mb_s": "loads, MB/s",
    "out_mb_s": "stores, MB/s",
}


def table(report: Mapping[str, Any]) -> str:
    """The report for people: a column per mode."""
    lines = [
        f"{report['model']} · TP {report['tp']} · {report['num_requests']} requests of two tenants, "
        f"{report['num_prompt_tokens']} -> {report['num_output_tokens']} tokens, pool of {report['num_blocks']} blocks",
        f"median of {len(report['auto']['runs'])}; auto by the better one: {report['auto_ratio']:.3f}",
        "",
        f"{'':24}" + "".join(f"{mode:>12}" for mode in MODES),
    ]
    for key, title in _ROWS.items():
        lines.append(f"{title:24}" + "".join(f"{report[mode][key]:>12.2f}" for mode in MODES))
    return "\n".join(lines)
