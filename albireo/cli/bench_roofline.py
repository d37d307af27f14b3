"""``albireo bench roofline``: how near a server's decode steps come to what the machine can do.

A decode step reads all weights once, and the keys and values of its sequences. No step can be shorter than reading that
takes with all cores, nor than multiplying it takes.
"""

import argparse
import asyncio
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import albireo
from albireo.cli import client
from albireo.cli.bench_kernels import measure_rates
from albireo.cli.bench_load import Workload, run_load
from albireo.cli.json_file import write_json
from albireo.cli.progress import Bar, counting_bar
from albireo.errors import ConfigError
from albireo.model_spec import ModelSpec, load_model_spec, resolve_model
from albireo.v1 import generation_pb2 as pb

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
_INT8_OUTPUT_BYTES = 8  # an output's scale, and the sum of its integers

_DESCRIPTION = """Measure what this machine reads and multiplies with all cores, then a server's decode steps, and tell
how near they come to it. The server must run on this machine and have nothing else to do."""


@dataclass(frozen=True)
class StepCost:
    """What one decode step has to read and to compute; a multiplication with its addition is two flops."""

    weight_bytes: float
    kv_bytes: float
    linear_flops: float
    attention_flops: float

    @property
    def num_bytes(self) -> float:
        return self.weight_bytes + self.kv_bytes


def step_cost(spec: ModelSpec, batch: int, context: float, dtype: str, quantize: str) -> StepCost:
    """Of a step with a token of each sequence. Rows of the embedding and activations are left out.

    Args:
        context: that a sequence's token sees, on average.
        dtype: of weights and KV cache.
        quantize: none, or w8a8: the weights of linear layers have 8 bits.
    """
    heads, kv_heads = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    hidden, intermediate = spec.hidden_size, spec.intermediate_size
    # Outputs and inputs of each linear layer.
    layer = [(heads + 2 * kv_heads, hidden), (hidden, heads), (2 * intermediate, hidden), (hidden, intermediate)]
    linears = [*layer * spec.num_layers, (spec.vocab_size, hidden)]
    num_weights = sum(num_out * num_in for num_out, num_in in linears)
    if quantize == "w8a8":
        linear_bytes = num_weights + _INT8_OUTPUT_BYTES * sum(num_out for num_out, _ in linears)
    else:
        linear_bytes = num_weights * _ELEMENT_BYTES[dtype]
    return StepCost(
        weight_bytes=linear_bytes + 4 * _num_vector_elements(spec),
        kv_bytes=2 * batch * context * spec.num_layers * kv_heads * _ELEMENT_BYTES[dtype],
        linear_flops=2 * batch * num_weights,
        attention_flops=4 * batch * context * spec.num_layers * heads,
    )


def mean_context(num_prompt_tokens: int, num_output_tokens: int, sliding_window: int | None) -> float:
    """Of the steps that decode an output: its first token comes from the prompt's step."""
    window = sliding_window or num_prompt_tokens + num_output_tokens
    return statistics.mean(min(num_prompt_tokens + index, window) for index in range(1, num_output_tokens))


def compare(cost: StepCost, rates: dict[str, Any], dtype: str, quantize: str, measured_ms: float) -> dict[str, float]:
    """The limits of a step, and the shares of them that a measured one reaches.

    Args:
        rates: of all threads, as `albireo_kernels.bench` reports them.
    """
    flops_s = {name: 1e9 * rate["best"] for name, rate in rates["multiply_gflop_s"].items()}
    weight_dtype = "int8" if quantize == "w8a8" else dtype
    reading_ms = 1e3 * cost.num_bytes / (1e9 * rates["read_gb_s"]["best"])
    multiplying_ms = 1e3 * (cost.linear_flops / flops_s[weight_dtype] + cost.attention_flops / flops_s[dtype])
    return {
        "reading_limit_ms": reading_ms,
        "multiplying_limit_ms": multiplying_ms,
        "measured_ms": measured_ms,
        "share_of_reading_limit": reading_ms / measured_ms,
        "share_of_limit": max(reading_ms, multiplying_ms) / measured_ms,
    }


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    client.add_server_flags(parser)
    parser.add_argument("--model", help="directory, Hub id or 'demo' that bytes are counted of; default: the server's")
    parser.add_argument("--batch", default="1,8", metavar="LIST", help="sequences at a time; default: %(default)s")
    parser.add_argument("--prompt", type=int, default=16, metavar="N", help="tokens; default: %(default)s")
    parser.add_argument("--output", type=int, default=128, metavar="N", help="tokens; default: %(default)s")
    parser.add_argument("--reps", type=int, default=3, metavar="N", help="medians are over these; default: %(default)s")
    parser.add_argument(
        "--quantize", choices=("none", "w8a8"), default="none", help="as the server has it; default: %(default)s"
    )
    parser.add_argument("--json", metavar="FILE", help="write the report here as one JSON object; - is stdout")


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    for name, least in (("prompt", 1), ("output", 2), ("reps", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name}: at least {least} is needed")
    try:
        batches = sorted({int(batch) for batch in args.batch.split(",")})
    except ValueError:
        parser.error(f"--batch {args.batch}: whole numbers, separated by commas")
    if batches[0] < 1:
        parser.error("--batch: at least 1 is needed")
    server = client.server_of(args)
    info = asyncio.run(_model_info(server))
    spec = _spec(args.model, info)
    _check(info, spec, args.prompt + args.output, batches[-1])
    rates = measure_rates()  # before there is load
    shapes = [Workload(batch, batch, args.prompt, args.output) for batch in batches]
    with counting_bar(args.reps * sum(batches), "decode", "req") as bar:
        runs = asyncio.run(_measure(server, shapes, args.reps, bar))
    report = _report(spec, info, rates, args.quantize, dict(zip(shapes, runs, strict=True)))
    print(table(report), file=sys.stderr if args.json == "-" else sys.stdout)
    if args.json:
        write_json(args.json, report)
    return 0


async def _model_info(server: client.Server) -> pb.ModelInfo:
    async with client.connect(server) as (_, info):
        return info


async def _measure(
    server: client.Server, shapes: Sequence[Workload], reps: int, bar: Bar
) -> list[list[dict[str, float]]]:
    async with client.connect(server) as (stub, info):
        return [await run_load(stub, shape, info.vocab_size, reps=reps, on_done=bar.update) for shape in shapes]


def _spec(model: str | None, info: pb.ModelInfo) -> ModelSpec:
    if model is None and not (info.path and Path(info.path).is_dir()):
        raise ConfigError(f"the server's model {info.path or info.name!r} is no directory here: name it in --model")
    return load_model_spec(resolve_model(info.path if model is None else model))


def _check(info: pb.ModelInfo, spec: ModelSpec, num_tokens: int, batch: int) -> None:
    if spec.vocab_size != info.vocab_size:
        sizes = f"{spec.vocab_size} tokens in its vocabulary, the served one {info.vocab_size}"
        raise ConfigError(f"--model {spec.path} is not the model that is served: it has {sizes}")
    if info.dtype not in _ELEMENT_BYTES:
        raise ConfigError(f"the server computes in {info.dtype}; known are {', '.join(_ELEMENT_BYTES)}")
    if num_tokens > info.max_model_len:
        raise ConfigError(f"--prompt and --output are {num_tokens} tokens, and the server's limit {info.max_model_len}")
    if info.max_num_seqs and batch > info.max_num_seqs:
        raise ConfigError(f"--batch {batch}: the server runs {info.max_num_seqs} sequences at a time")


def _report(
    spec: ModelSpec,
    info: pb.ModelInfo,
    rates: dict[str, Any],
    quantize: str,
    runs: dict[Workload, list[dict[str, float]]],
) -> dict[str, Any]:
    rows = []
    for shape, of_shape in runs.items():
        context = mean_context(shape.num_prompt_tokens, shape.num_output_tokens, spec.sliding_window)
        cost = step_cost(spec, shape.concurrency, context, info.dtype, quantize)
        measured_ms = statistics.median(each["itl_p50_ms"] for each in of_shape)
        compared = compare(cost, rates["rates"]["all_threads"], info.dtype, quantize, measured_ms)
        rows.append({**asdict(shape), "context": context, **asdict(cost), **compared, "runs": of_shape})
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": albireo.__version__,
        "model": info.name,
        "engine": info.engine,
        "tp": info.tp_size,
        "dtype": info.dtype,
        "quantize": quantize,
        "modelled": info.engine == "stub",
        **{name: rates[name] for name in ("machine", "isa", "threads", "rates")},
        "rows": rows,
    }


def _num_vector_elements(spec: ModelSpec) -> int:
    """Of norms and biases, which are float32."""
    heads, kv_heads = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    of_layer = 2 * spec.hidden_size
    of_layer += 2 * spec.head_dim if spec.qk_norm else 0
    of_layer += heads + 2 * kv_heads if spec.qkv_bias else 0
    of_layer += spec.hidden_size if spec.output_bias else 0
    of_layer += 2 * spec.intermediate_size + spec.hidden_size if spec.mlp_bias else 0
    return spec.num_layers * of_layer + spec.hidden_size


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    engine = report["engine"] + (" (modelled)" if report["modelled"] else "")
    quantized = "" if report["quantize"] == "none" else f", {report['quantize']}"
    rates = report["rates"]["all_threads"]
    multiplied = ", ".join(f"{name} {rate['best']:.1f}" for name, rate in rates["multiply_gflop_s"].items())
    shape = report["rows"][0]
    lines = [
        f"{report['model']} · {engine} · TP {report['tp']} · {report['dtype']}{quantized}",
        f"{report['machine']['cpu']} · {report['isa']} · {report['threads']} threads read "
        f"{rates['read_gb_s']['best']:.1f} GB/s and multiply, GFLOP/s: {multiplied}",
        f"{shape['num_prompt_tokens']} -> {shape['num_output_tokens']} tokens; "
        f"medians of {len(shape['runs'])} repetitions",
        "",
        f"{'':8}{'a step':>12}{'at least, ms':>26}{'measured':>12}{'share of limit, %':>24}",
        f"{'batch':8}{'MB':>12}{'reading':>12}{'multiplying':>14}{'ms':>12}{'reading':>12}{'greater':>12}",
    ]
    lines += [
        f"{row['concurrency']:<8}{(row['weight_bytes'] + row['kv_bytes']) / 1e6:>12.1f}"
        f"{row['reading_limit_ms']:>12.2f}{row['multiplying_limit_ms']:>14.2f}{row['measured_ms']:>12.2f}"
        f"{100 * row['share_of_reading_limit']:>12.1f}{100 * row['share_of_limit']:>12.1f}"
        for row in report["rows"]
    ]
    return "\n".join(lines)
