# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-call"
"""``python -m albireo_kernels.triton.bench``: sampling on this GPU beside torch's and flashinfer's, as JSON.

Exit status: 0 done · 2 wrong usage, or no GPU.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import triton
from torch import Tensor

from albireo_kernels.reference.sampling import Params
from albireo_kernels.triton import logprobs
from albireo_kernels.triton.candidates import candidates
from albireo_kernels.triton.draw import best, merge_and_draw
from albireo_kernels.triton.filters import draw_filtered
from albireo_kernels.triton.rows import Rows, Shard, make_rows

_TILE = 1024
Case = tuple[str, Callable[[], object]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m albireo_kernels.triton.bench", description=__doc__)
    parser.add_argument("--json", metavar="FILE", default="-", help="where the report goes; default: - (stdout)")
    parser.add_argument("--rows", metavar="LIST", default="1,2,4,8,16,32,64,128,256,512,1024", help="batch sizes")
    parser.add_argument("--vocab-size", type=int, default=151936, metavar="N", help="the shard's width")
    parser.add_argument("--reps", type=int, default=50, metavar="N", help="replays of each case; the median counts")
    args = parser.parse_args(argv)
    try:
        batch_sizes = [int(count) for count in args.rows.split(",")]
    except ValueError:
        parser.error(f"--rows {args.rows}: whole numbers, separated by commas")
    if not torch.cuda.is_available():
        sys.stderr.write("albireo: no GPU here\n")
        return 2
    report = bench(batch_sizes, args.vocab_size, args.reps)
    text = json.dumps(report, indent=1) + "\n"
    if args.json == "-":
        sys.stdout.write(text)
    else:
        with open(args.json, "w", encoding="utf-8") as file:
            file.write(text)
    return 0


def bench(batch_sizes: Sequence[int], vocab_size: int, reps: int) -> dict[str, Any]:
    """The report: microseconds of each case, the median of replays of one CUDA graph with cold caches."""
    measured = []
    for num_rows in batch_sizes:
        generator = torch.Generator("cuda").manual_seed(num_rows)
        # As peaked as a language model's: most of the mass is on some tens of tokens.
        logits = torch.randn(num_rows, vocab_size, generator=generator, device="cuda") * 3
        for name, launch in cases(logits):
            time_us, how = measure(launch, reps)
            sys.stderr.write(f"{num_rows:5} {name:32} {time_us:9.1f} us ({how})\n")
            measured.append({"rows": num_rows, "case": name, "time_us": round(time_us, 2), "how": how})
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "vocab_size": vocab_size,
        "measured": measured,
    }


def cases(logits: Tensor) -> Iterator[Case]:
    """Ours, then torch's, then flashinfer's."""
    shard, num_rows = Shard(logits, 0), len(logits)
    plain = rows_of(num_rows, Params())
    yield "plain", lambda: draw(shard, plain)
    for count in (50, 256):
        filtered = rows_of(num_rows, Params(top_k=count, top_p=0.9))
        yield f"top_k {count}, top_p 0.9", partial(draw_candidates, shard, filtered, count)
    top_p, min_p = rows_of(num_rows, Params(top_p=0.9)), rows_of(num_rows, Params(min_p=0.05))
    top_k = rows_of(num_rows, Params(top_k=1000))
    yield "top_p 0.9", lambda: draw_rounds(shard, top_p, has_top_p=True)
    yield "top_k 1000", lambda: draw_rounds(shard, top_k, has_top_k=True)
    yield "min_p 0.05", lambda: draw_rounds(shard, min_p)
    yield "log_sum_exp", lambda: logprobs.log_sum_exp([logprobs.tile_sums(shard, _TILE)])
    yield "torch: argmax", lambda: logits.argmax(1)
    yield "torch: softmax, multinomial", lambda: torch.multinomial(logits.softmax(1), 1)
    yield "torch: softmax, sort, multinomial", lambda: sort_and_draw(logits, 0.9)
    yield "torch: topk 50, multinomial", lambda: topk_and_draw(logits, 50, 0.9)
    if find_spec("flashinfer"):
        yield from flashinfer_cases(logits)


def rows_of(num_rows: int, params: Params) -> Rows:
    return make_rows([params] * num_rows, range(num_rows), "cuda")


def draw(shard: Shard, rows: Rows) -> Tensor:
    scores, ids = best(shard, rows)
    return merge_and_draw(scores[None], ids[None], None, rows)


def draw_candidates(shard: Shard, rows: Rows, top_k: int) -> Tensor:
    scores, ids = best(shard, rows)
    keys = candidates(shard, rows, rows.top_k, triton.next_power_of_2(top_k))
    return merge_and_draw(scores[None], ids[None], keys[None], rows)


def draw_rounds(shard: Shard, rows: Rows, *, has_top_k: bool = False, has_top_p: bool = False) -> Tensor:
    ((scores, ids),) = draw_filtered([shard], rows, lambda *_: None, has_top_k=has_top_k, has_top_p=has_top_p)
    return merge_and_draw(scores[None], ids[None], None, rows)


def sort_and_draw(logits: Tensor, top_p: float) -> Tensor:
    probs, ids = logits.softmax(1).sort(dim=1, descending=True)
    probs = probs.where(probs.cumsum(1) - probs < top_p, 0.0)
    return ids.gather(1, torch.multinomial(probs, 1))


def topk_and_draw(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    values, ids = logits.topk(top_k, dim=1)
    probs = values.softmax(1)
    probs = probs.where(probs.cumsum(1) - probs < top_p, 0.0)
    return ids.gather(1, torch.multinomial(probs, 1))


def flashinfer_cases(logits: Tensor) -> Iterator[Case]:
    from flashinfer import sampling

    yield "flashinfer: softmax, sample", lambda: sampling.sampling_from_probs(logits.softmax(1))
    yield "flashinfer: softmax, top_p 0.9", lambda: sampling.top_p_sampling_from_probs(logits.softmax(1), 0.9)
    yield "flashinfer: top_k 50, top_p 0.9", lambda: sampling.top_k_top_p_sampling_from_logits(logits, 50, 0.9)
    yield "flashinfer: top_k 256, top_p 0.9", lambda: sampling.top_k_top_p_sampling_from_logits(logits, 256, 0.9)


def measure(launch: Callable[[], object], reps: int) -> tuple[float, str]:
    """Microseconds, and how they were measured: "graph", or "eager" where the case cannot be captured."""
    launch()  # compiles
    torch.cuda.synchronize()
    how, replay = "eager", launch
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        how, replay = "graph", graph.replay
    except RuntimeError:  # it waits for the device
        torch.cuda.synchronize()
    # A forward pass leaves none of the logits' neighbours in the cache; 256 MB are more than any has.
    flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(reps):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in times) * 1000, how


if __name__ == "__main__":
    sys.exit(main())
