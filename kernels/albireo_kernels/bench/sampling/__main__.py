"""``python -m albireo_kernels.bench.sampling``, which ``albireo bench sampling`` runs.

Exit status: 0 done · 1 the schemes did not draw the same tokens · 2 wrong usage, no compiler, or an instruction set
that this machine does not have.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import albireo
from albireo.cli.json_file import write_json
from albireo.cli.progress import Bar, counting_bar
from albireo.errors import AlbireoError, ConfigError, GroupError
from albireo_kernels.bench.machine import describe, open_library
from albireo_kernels.bench.sampling.payload import SAMPLINGS, Shape, received_bytes
from albireo_kernels.bench.sampling.ranks import Effort, Ranks
from albireo_kernels.bench.sampling.report import ratios_of, table
from albireo_kernels.cpu import SCHEMES, Isa, Library
from albireo_kernels.cpu.structs import MAX_RANKS

if TYPE_CHECKING:
    from albireo_kernels.bench.sampling.in_torch import InTorch

_GROWTH = (1, 2, 4, 8)
_VOCAB_SIZES = range(64, (1 << 20) + 1)
_BATCHES = range(1, 1025)
_REPS = range(1, 1001)
_MOST_REPS = 200  # unless more are asked for
_MIN_TORCH_REPS = 3  # a sort of many rows takes seconds
_MEMORY_SHARE = 0.5  # of the machine's, that a run may take
_TORCH_COPIES = 10  # what torch's sort of a batch takes, in times its logits
_DESCRIPTION = """Measure three ways to share out sampling among ranks, with the same compiled kernels. merge: each rank
offers the best tokens of its part of the vocabulary, and draws a part of the rows from what all offer. batch-sharded:
each rank fetches a part of the rows whole, and draws from it. gather: each rank fetches all rows whole, and draws from
them. Where there are more ranks than cores, only what rank 0 does is measured, and labelled as modelled. torch samples
the whole batch with as many threads, and sorts it where there is a filter."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured.

    Attributes:
        shapes: each with all samplings.
        effort: of each.
    """

    tp: int
    vocab_size: int
    batches: tuple[int, ...]
    grows: bool
    effort: Effort

    @property
    def shapes(self) -> list[Shape]:
        """All batches at the TP degree asked for; the largest one also at others."""
        shapes = [Shape(self.vocab_size, batch, self.tp) for batch in self.batches]
        if self.grows:
            shapes += [Shape(self.vocab_size, self.batches[-1], tp) for tp in _GROWTH if tp != self.tp]
        return shapes


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    cores = sorted(os.sched_getaffinity(0))
    settings = _settings(parser, args, len(cores))
    try:
        save_picture = None if args.plot is None else _find_plot()
        _check_memory(settings, len(cores))
        report = bench(open_library(args.isa), cores, settings)
        print_to = sys.stderr if args.json == "-" else sys.stdout
        print_to.write(table(report) + "\n")
        if args.json:
            write_json(args.json, report)
        if save_picture is not None:
            save_picture(args.plot, report)
    except AlbireoError as error:
        sys.stderr.write(f"albireo: {error}\n")
        return 1 if isinstance(error, GroupError) else 2
    except KeyboardInterrupt:
        return 130
    return 0


def bench(library: Library, cores: Sequence[int], settings: Settings) -> dict[str, Any]:
    """The report, of ranks on these cores. Raises GroupError where the schemes do not draw the same tokens."""
    in_torch = _find_torch(min(settings.tp, len(cores)))
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": albireo.__version__,
        "machine": describe(),
        "isa": library.isa.name.lower(),
        "vocab": settings.vocab_size,
        "min_reps": settings.effort.min_reps,
    }
    num_batches = len(settings.batches) if in_torch else 0
    total = (len(settings.shapes) + num_batches) * len(SAMPLINGS)
    with counting_bar(total, "sampling", "measurement") as bar:
        rows = [row for shape in settings.shapes for row in _measure(library, shape, cores, settings.effort, bar)]
        torch_rows = list(_measure_torch(in_torch, settings, bar)) if in_torch else []
    return {**facts, "rows": rows, "ratios": ratios_of(rows), "torch": torch_rows}


def _measure(
    library: Library, shape: Shape, cores: Sequence[int], effort: Effort, bar: Bar
) -> Iterator[dict[str, Any]]:
    with Ranks(library, shape, cores) as ranks:
        for name, sampling in SAMPLINGS.items():
            bar.set_description_str(f"{name}, {shape.batch} rows, TP {shape.tp}")
            seconds = ranks.measure(sampling, effort)
            bar.update()
            for scheme in SCHEMES:
                yield {
                    "scheme": scheme,
                    "sampling": name,
                    "batch": shape.batch,
                    "tp": shape.tp,
                    "time_ms": seconds[scheme] * 1e3,
                    "bytes_per_rank": received_bytes(scheme, shape, sampling),
                    "source": "modelled" if ranks.is_modelled else "measured",
                }


def _measure_torch(in_torch: "InTorch", settings: Settings, bar: Bar) -> Iterator[dict[str, Any]]:
    effort = replace(settings.effort, min_reps=min(_MIN_TORCH_REPS, settings.effort.min_reps))
    for batch in settings.batches:
        for name, sampling in SAMPLINGS.items():
            bar.set_description_str(f"{name}, {batch} rows, torch")
            seconds = in_torch.measure(settings.vocab_size, batch, sampling, effort)
            bar.update()
            yield {"sampling": name, "batch": batch, "time_ms": seconds * 1e3, "threads": in_torch.num_threads}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="albireo bench sampling", description=_DESCRIPTION)
    levels = [isa.name.lower() for isa in Isa]
    parser.add_argument("--tp", type=int, default=2, metavar="N", help="ranks; default: %(default)s")
    parser.add_argument("--vocab", type=int, metavar="N", help="token ids; default: 151936, as of Qwen3")
    parser.add_argument("--batch", metavar="LIST", help="rows of a step; default: 8,32,128")
    parser.add_argument("--growth", action="store_true", help="the largest batch also with 1, 2, 4 and 8 ranks")
    parser.add_argument("--json", metavar="FILE", help="write the report here as one JSON object; - is stdout")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw bytes and times over ranks; does --growth")
    parser.add_argument("--reps", type=int, metavar="N", help="medians are over so many at least; default: 15")
    parser.add_argument("--isa", choices=levels, help="instruction set; default: the machine's highest")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that all works; figures mean nothing")
    return parser


def _settings(parser: argparse.ArgumentParser, args: argparse.Namespace, num_cores: int) -> Settings:
    vocab_size = args.vocab if args.vocab is not None else 2048 if args.quick else 151_936
    reps = args.reps if args.reps is not None else 2 if args.quick else 15
    listed = args.batch or ("2,5" if args.quick else "8,32,128")
    try:
        batches = tuple(sorted({int(count) for count in listed.split(",")}))
    except ValueError:
        parser.error(f"--batch {listed}: whole numbers, separated by commas")
    limits = [
        ("--tp", args.tp, range(1, MAX_RANKS + 1)),
        ("--vocab", vocab_size, _VOCAB_SIZES),
        ("--reps", reps, _REPS),
    ]
    limits += [("--batch", batch, _BATCHES) for batch in batches]
    for flag, value, limit in limits:
        if value not in limit:
            parser.error(f"{flag} {value}: {limit.start} to {limit.stop - 1}")
    if args.plot is not None and (args.plot.suffix != ".png" or not args.plot.parent.is_dir()):
        parser.error(f"--plot {args.plot}: a file that ends in .png, in a directory that is there")
    effort = Effort(reps, reps, 0.0) if args.quick else Effort(reps, max(reps, _MOST_REPS))
    grows = args.growth or args.plot is not None or args.tp > num_cores
    return Settings(args.tp, vocab_size, batches, grows, effort)


def _check_memory(settings: Settings, num_cores: int) -> None:
    """Raises ConfigError where logits, and copies of them, would not fit."""
    batch = settings.batches[-1]
    num_copies = 2 + num_cores + _TORCH_COPIES
    needed = 4 * batch * settings.vocab_size * num_copies
    allowed = _MEMORY_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > allowed:
        most = int(allowed / (needed / batch))
        raise ConfigError(
            f"--batch {batch}: {most} at most with --vocab {settings.vocab_size} in this machine's memory"
        )


def _find_torch(num_threads: int) -> "InTorch | None":
    try:
        from albireo_kernels.bench.sampling.in_torch import InTorch
    except ImportError:
        return None
    return InTorch(num_threads)


def _find_plot() -> Callable[[Path, dict[str, Any]], None]:
    try:
        from albireo_kernels.bench.sampling.plot import save_picture
    except ImportError as error:
        raise ConfigError(f"--plot: matplotlib is needed, which is not installed ({error})") from error
    return save_picture


if __name__ == "__main__":
    sys.exit(main())
