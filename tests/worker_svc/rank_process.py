"""One rank, in a process of its own, of a group of four and then of one of two.

Tells the story of each checkpoint and writes what came of it, in files under OUTPUT_DIR/TP_SIZE.

Usage: rank_process.py KIND RANK OUTPUT_DIR CHECKPOINT...
"""

import json
import sys
from pathlib import Path
from typing import get_args

import numpy as np
from engine_story import Kind, engine_config, tell


def check_collectives(rank: int, size: int, run_dir: Path) -> dict[str, list[list[float]]]:
    """Sums and joins of the eager engine, whose results tell which rank contributed what."""
    import torch

    from worker_svc.torch_engine.collectives import Rendezvous

    rendezvous = Rendezvous(rank, size, run_dir, torch.device("cpu"))
    group = rendezvous.join(1)
    total = torch.full((2, 3), 10.0**rank)
    group.all_reduce(total)
    half = torch.full((1, 3), 2.0**rank, dtype=torch.bfloat16)
    group.all_reduce(half)
    group.all_reduce(torch.zeros(0, 3))
    widths = [2, 0, 1, 3][:size]
    joined = group.all_gather(torch.full((2, widths[rank]), float(rank)), widths)
    group.barrier()
    rendezvous.leave()
    return {"total": total.tolist(), "half": half.tolist(), "joined": joined.tolist()}


def run_group(kind: Kind, rank: int, size: int, run_dir: Path, checkpoints: list[Path]) -> None:
    if kind == "eager":
        (run_dir / f"collectives-{rank}.json").write_text(json.dumps(check_collectives(rank, size, run_dir)))
    for checkpoint in checkpoints:
        # All groups meet in one directory, as the restarts of a group do.
        story = tell(kind, engine_config(checkpoint, run_dir, rank, size))
        outputs = {slot: sequence.output for slot, sequence in story.sequences.items()}
        (run_dir / f"{checkpoint.name}-{rank}.json").write_text(json.dumps(outputs))
        if rank == 0:
            logits = {str(slot): np.stack(sequence.logits) for slot, sequence in story.sequences.items()}
            np.savez(run_dir / f"{checkpoint.name}.npz", **logits)


def main() -> None:
    kind, rank, output = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    assert kind in get_args(Kind)
    for size in (4, 2):
        if rank < size:
            run_group(kind, rank, size, output / str(size), [Path(name) for name in sys.argv[4:]])


if __name__ == "__main__":
    main()
