"""Runs `albireo bench host` over batch sizes and TP degrees, one after the other, and draws the pictures.

    python tools/host_grid.py docs/benchmarks/host            the grid below, about 40 minutes on two cores
    python tools/host_grid.py /tmp/host --only main           one part of it

Reports that are there already are kept, so that a run that was cut off goes on.
"""

import argparse
import subprocess
import sys
from pathlib import Path

# name -> flags of each run
PARTS: dict[str, dict[str, str]] = {
    "main": {
        "t4-b256": "--tp 4 --batch 256 --steps 2000 --reps 3",
    },
    "batch": {
        f"t4-b{batch}": f"--tp 4 --batch {batch} --steps 1000 --reps 1 --no-shortest" for batch in (32, 64, 1024)
    },
    "tp": {f"t{tp}-b256": f"--tp {tp} --batch 256 --steps 1000 --reps 1 --no-shortest" for tp in (1, 2, 8)},
    "grpc": {
        f"grpc-t4-b{batch}": f"--tp 4 --batch {batch} --clients grpc --depth 2 --steps 2000 --reps 3 --no-shortest"
        for batch in (64, 256)
    },
    "torch": {
        f"{engine}-t{tp}-b16": f"--engine {engine} --tp {tp} --batch 16 --depth 1,2 --steps 300 --reps 3 --no-shortest"
        for engine in ("torch", "eager")
        for tp in (1, 2)
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--only", choices=list(PARTS), action="append")
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    for part in args.only or PARTS:
        for name, flags in PARTS[part].items():
            report = args.directory / f"{name}.json"
            if not report.exists():
                print(f"{name}: {flags}", flush=True)
                command = [sys.executable, "-m", "albireo", "bench", "host", *flags.split(), "--json", str(report)]
                subprocess.run(command, check=True)
    reports = sorted(args.directory.glob("t[0-9]*.json"))
    if reports:
        plot = Path(__file__).with_name("plot_host.py")
        subprocess.run(
            [sys.executable, str(plot), *map(str, reports), "-o", str(args.directory / "host.png")], check=True
        )


if __name__ == "__main__":
    main()
