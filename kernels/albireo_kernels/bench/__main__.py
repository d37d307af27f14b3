"""``python -m albireo_kernels.bench``, which ``albireo bench kernels`` runs.

Exit status: 0 done · 2 wrong usage, no compiler, or an instruction set that this machine does not have.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import albireo
from albireo.cli.json_file import write_json
from albireo.cli.progress import Bar, counting_bar
from albireo.errors import AlbireoError
from albireo_kernels.bench.cases import all_groups
from albireo_kernels.bench.limits import Rates
from albireo_kernels.bench.machine import Machine, describe, last_level_bytes, open_library
from albireo_kernels.bench.measure import Bench, Measurement
from albireo_kernels.bench.report import table
from albireo_kernels.bench.settings import FULL, QUICK, Settings
from albireo_kernels.cpu import Isa, Library

if TYPE_CHECKING:
    from albireo_kernels.bench.in_torch import InTorch

_CACHES = 4  # memory is read past so many times the caches
_DESCRIPTION = """Measure what the machine reads and multiplies, and each compiled kernel against it: the limit is what
reading its weights from memory takes, or multiplying, whichever is longer. Where torch is installed, it does the same
work with as many threads."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="albireo bench kernels", description=_DESCRIPTION)
    levels = [isa.name.lower() for isa in Isa]
    parser.add_argument("--json", metavar="FILE", help="write the report here as one JSON object; - is stdout")
    parser.add_argument("--isa", choices=levels, help="instruction set; default: the machine's highest")
    parser.add_argument("--threads", type=int, metavar="N", help="default: one on each core")
    parser.add_argument("--rows", metavar="LIST", help="tokens of a step; default: 1,8,32,512")
    parser.add_argument("--rates-only", action="store_true", help="measure the machine only")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that all works; figures mean nothing")
    args = parser.parse_args(argv)
    settings = QUICK if args.quick else FULL
    try:
        if args.rows:
            settings = replace(settings, rows=tuple(sorted({int(count) for count in args.rows.split(",")})))
    except ValueError:
        parser.error(f"--rows {args.rows}: whole numbers, separated by commas")
    if settings.rows[0] < 1:
        parser.error("--rows: at least 1 is needed")
    cores = sorted(os.sched_getaffinity(0))
    num_threads = len(cores) if args.threads is None else args.threads
    if not 1 <= num_threads <= len(cores):
        parser.error(f"--threads {num_threads}: 1 to {len(cores)} on this machine")
    try:
        report = bench(open_library(args.isa), cores[:num_threads], settings, args.rates_only)
        print_to = sys.stderr if args.json == "-" else sys.stdout
        print_to.write(table(report) + "\n")
        if args.json:
            write_json(args.json, report)
    except AlbireoError as error:
        sys.stderr.write(f"albireo: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def bench(library: Library, cores: Sequence[int], settings: Settings, rates_only: bool) -> dict[str, Any]:
    """The report, with a thread on each of these cores."""
    in_torch = None if rates_only else _find_torch(len(cores))
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": albireo.__version__,
        "machine": describe(),
        "isa": library.isa.name.lower(),
        "threads": len(cores),
        "torch": in_torch.version if in_torch else None,
    }
    groups = [] if rates_only else all_groups(library, settings, len(cores), in_torch)
    num_bytes = max(settings.memory_bytes, 0 if settings.is_quick else _CACHES * last_level_bytes())
    num_cases = sum(group.num_cases for group in groups)
    with (
        Machine(library, cores, num_bytes) as machine,
        counting_bar(4 + num_cases, "the machine", "measurement") as bar,
    ):
        rates = _rates(machine, settings, bar)
        measured: list[Measurement] = []
        kernels = Bench(library, machine, cores, rates["all_threads"], settings)
        for group in groups:
            for case in group.cases():
                bar.set_description_str(f"{case.kernel} {case.shape}")
                measured.append(kernels.measure(case))
                bar.update()
        # Again: where others use the machine, the best that was ever seen is nearest to what it can do.
        rates = {name: rates[name] + again for name, again in _rates(machine, settings, bar).items()}
    return {
        **facts,
        "rates": {name: each.to_json() for name, each in rates.items()},
        "rows": [each.to_json(rates["all_threads"]) for each in measured],
    }


def _rates(machine: Machine, settings: Settings, bar: Bar) -> dict[str, Rates]:
    rates = {}
    for name, num_threads in (("one_thread", 1), ("all_threads", machine.num_threads)):
        rates[name] = machine.rates(num_threads, settings.rate_reps, settings.multiply_s)
        bar.update()
    return rates


def _find_torch(num_threads: int) -> "InTorch | None":
    try:
        from albireo_kernels.bench.in_torch import InTorch
    except ImportError:
        return None
    return InTorch(num_threads)


if __name__ == "__main__":
    sys.exit(main())
