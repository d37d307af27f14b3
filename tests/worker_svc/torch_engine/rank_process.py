"""One rank, in a process of its own, of a group of four and then of one of two.

Tells the story of each checkpoint and writes what came of it, in files under OUTPUT_DIR/TP_SIZE.

Usage: rank_process.py RANK OUTPUT_DIR CHECKPOINT...
"""

import json
import sys
from pathlib import Path

import torch
from engine_story import engine_config, tell
from safetensors.torch import save_file

from worker_svc.torch_engine.collectives import Rendezvous


def check_collectives(rank: int, size: int, run_dir: Path) -> dict[str, list[list[float]]]:
    """Sums and joins whose results tell which rank contributed what."""
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


def run_group(rank: int, size: int, run_dir: Path, checkpoints: list[Path]) -> None:
    (run_dir / f"collectives-{rank}.json").write_text(json.dumps(check_collectives(rank, size, run_dir)))
    for checkpoint in checkpoints:
        # All groups meet in one directory, as the restarts of a group do.
        story = tell(engine_config(checkpoint, run_dir, rank, size))
        outputs = {slot: sequence.output for slot, sequence in story.sequences.items()}
        (run_dir / f"{checkpoint.name}-{rank}.json").write_text(json.dumps(outputs))
        if rank == 0:
            logits = {str(slot): torch.stack(sequence.logits) for slot, sequence in story.sequences.items()}
            save_file(logits, run_dir / f"{checkpoint.name}.safetensors")


def main() -> None:
    rank, output = int(sys.argv[1]), Path(sys.argv[2])
    for size in (4, 2):
        if rank < size:
            run_group(rank, size, output / str(size), [Path(name) for name in sys.argv[3:]])


if __name__ == "__main__":
    main()
